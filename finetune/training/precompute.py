"""What no weight changes, computed before training by all cores: the searches of `train.search_cache`.

Within a step the search of one picture holds up the rest of the batch, and the other ranks. The pictures come through
the run's own processor, so that training finds the maps under the keys it asks for.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from finetune.config import DataConfig, ImagePadding, RunConfig, load_config, stage_runs
from finetune.data.collator import processed_images
from finetune.data.dataset import pair_of
from finetune.data.image_frame import processed_size, set_frame
from finetune.data.images import load_image
from finetune.data.parallel import num_workers, ordered_map
from finetune.data.sources import read_and_hold_back, read_sources, spread
from finetune.errors import ConfigError
from finetune.models.features import cropped, images_from_patches
from finetune.models.noise_residual import is_chosen
from finetune.models.vocabulary import load_processor
from finetune.progress import progress_bar
from finetune.schema import Record
from finetune.training.search_cache import SearchCache, search_cache_problems


class _Pixels(NamedTuple):
    """What decides the pixels that a run sees of an image."""

    min_pixels: int | None
    max_pixels: int | None
    image_short_side: int | None
    image_padding: ImagePadding


class _Task(NamedTuple):
    """Records that belong together, which share of such pictures is searched, how they are seen, and where maps go."""

    records: tuple[Record, ...]
    share: float
    pixels: _Pixels
    folder: Path


class Searches(NamedTuple):
    """Pictures searched now, those whose maps were there already, and records that the time did not suffice for."""

    searched: int
    stored: int
    left: int


def precompute_command(arguments: argparse.Namespace) -> int:
    """`forensics precompute`: the configuration's searches, for all stages; prints what was done."""
    config: RunConfig = load_config(arguments.config, arguments.overrides)
    start = time.monotonic()
    found = search_ahead(config, arguments.workers, arguments.seconds, arguments.share, progress=True)
    rest = f"; the time did not suffice for {found.left} records" if found.left else ""
    took = f"{time.monotonic() - start:.0f} s"
    print(f"searched {found.searched} pictures in {took}, {found.stored} were stored already{rest}")
    return 0


def search_ahead(
    config: RunConfig,
    workers: int = 0,
    seconds: float | None = None,
    share: float | None = None,
    progress: bool = False,
) -> Searches:
    """Fill `train.search_cache` with the pictures that training will search, then with those of the evaluation.

    Args:
        workers: processes; 0 for one per core. seconds: begin no record after so many; which ones are left out has
            nothing to do with their labels, as the order is that of a hash.
        share: of the training pictures, an authentic one of a generated set always with its tampered twin; with None,
            those that `heads.noise_residual.similarity_share` chooses, for which all must be read.
        progress: a bar on stderr.

    Raises:
        ConfigError: the run keeps no searches, or has no use for them, or a share of 0 chooses no picture.
        DataFormatError: a file or record that cannot be read.
    """
    runs = [run.config for run in stage_runs(config)] or [config]
    runs = [run for run in runs if run.train.search_cache]
    if not runs:
        raise ConfigError(
            "train.search_cache is off, so there is nowhere to keep what is computed; give it a folder, e.g. "
            "train.search_cache=runs/searches"
        )
    for run in runs:
        for problem in search_cache_problems(run, will_be_filled=True):
            raise ConfigError(problem)
        if share is None and run.heads.noise_residual.similarity_share == 0:
            raise ConfigError(
                "heads.noise_residual.similarity_share is 0, which chooses no training picture; say which share is to "
                "be searched before training, e.g. --share 0.25"
            )
    deadline = None if seconds is None else time.time() + seconds  # of the clock that processes share
    plans = {repr(_settings(run)): run for run in runs}  # stages mostly see the same pictures
    tasks = [task for run in plans.values() for task in _tasks(run, share)]
    setup = _Setup(config.model.path, num_workers(workers), deadline)
    searched = stored = left = 0
    results = ordered_map(_search, tasks, workers, initializer=_start, initargs=(setup,))
    for task, counts in zip(
        tasks, progress_bar(results, total=len(tasks), desc="search", unit="rec", disable=not progress), strict=True
    ):
        if counts is None:
            left += len(task.records)
        else:
            searched, stored = searched + counts[0], stored + counts[1]
    return Searches(searched, stored, left)


def _settings(run: RunConfig) -> tuple[Any, ...]:
    """All that the tasks of a run depend on."""
    data = run.data
    sources = data.train, data.eval, data.max_eval_samples, data.val_ratio, data.val_seed
    return run.train.search_cache, run.heads.noise_residual.similarity_share, _pixels(data), sources


def _pixels(data: DataConfig) -> _Pixels:
    return _Pixels(data.min_pixels, data.max_pixels, data.image_short_side, data.image_padding)


def _tasks(run: RunConfig, share: float | None) -> Iterator[_Task]:
    """Families of training records in the order of a hash of their names, then single records of the evaluation."""
    folder, data = Path(str(run.train.search_cache)), run.data
    if data.val_ratio and not data.eval:
        records, held = read_and_hold_back(data.train, "train", data.val_ratio, data.val_seed)
    else:
        records = read_sources(data.train, "train")
        held = read_sources(data.eval, "eval") if data.eval else []
    families: dict[str, list[Record]] = {}
    for record in records:
        families.setdefault(_family(record), []).append(record)
    wanted = run.heads.noise_residual.similarity_share if share is None else 1.0
    for place, name in sorted((_place(name), name) for name in families):
        if share is None or place < share:
            yield _Task(tuple(families[name]), wanted, _pixels(data), folder)
    for record in held if data.max_eval_samples is None else spread(held, data.max_eval_samples):
        yield _Task((record,), 1.0, _pixels(data), folder)


def _family(record: Record) -> str:
    """What an authentic picture and its tampered twin share, or several records of one picture; else the name."""
    return pair_of(record) or next((image.path for image in record.images if image.path), None) or record.id


def _place(name: str) -> float:
    """A number in [0, 1) that a name has for ever."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


class _Setup(NamedTuple):
    """What every process is given: the model's folder, number of processes, and the time after which none begins."""

    model: str
    workers: int
    deadline: float | None


class _Worker:
    """One process: its processors by what they are set to, and stores by folder."""

    def __init__(self, setup: _Setup) -> None:
        self.setup = setup
        self.processors: dict[_Pixels, Any] = {}
        self.caches: dict[Path, SearchCache] = {}

    def search(self, task: _Task) -> tuple[int, int] | None:
        """How many pictures were searched, and how many were stored before; None where the time is over."""
        if self.setup.deadline is not None and time.time() >= self.setup.deadline:
            return None
        if task.folder not in self.caches:
            self.caches[task.folder] = SearchCache(task.folder)
        cache = self.caches[task.folder]
        before, chosen = cache.num_searched, 0
        for record in task.records:
            for image in self._pictures(record, task.pixels):
                if is_chosen(image, task.share):
                    chosen += 1
                    cache(image)
        searched = cache.num_searched - before
        return searched, chosen - searched

    def _pictures(self, record: Record, pixels: _Pixels) -> list[Tensor]:
        """As the noise-residual stream is given them."""
        images = [load_image(image, record.id, record.source) for image in record.images]
        if not images:
            return []
        processor = self._processor(pixels)
        seen = processed_images(images, processor)
        given = images_from_patches(
            seen["pixel_values"],
            seen["image_grid_thw"],
            patch_size=processor.patch_size,
            temporal_patch_size=processor.temporal_patch_size,
            merge_size=processor.merge_size,
            mean=processor.image_mean,
            std=processor.image_std,
        )
        return cropped(given, [processed_size((image.height, image.width), processor) for image in images])

    def _processor(self, pixels: _Pixels) -> Any:
        if pixels not in self.processors:
            processor = load_processor(self.setup.model, pixels.min_pixels, pixels.max_pixels).image_processor
            set_frame(processor, pixels.image_short_side, pixels.image_padding)
            self.processors[pixels] = processor
        return self.processors[pixels]


_WORKER: list[_Worker] = []


def _start(setup: _Setup) -> None:
    if setup.workers > 1:  # threads of processes that share the cores wait for each other: half the speed
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        threadpool_limits(1)
    _WORKER[:] = [_Worker(setup)]


def _search(task: _Task) -> tuple[int, int] | None:
    return _WORKER[0].search(task)
