"""What no weight changes, computed before training by all cores: the searches of `train.search_cache`.

Within a step the search of one picture holds up the rest of the batch, and the other ranks. The pictures come through
the run's own processor, so that training finds the maps under the keys it asks for.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from finetune.config import RunConfig, load_config, stage_runs
from finetune.data.collator import processed_images
from finetune.data.dataset import pair_of
from finetune.data.image_size import set_short_side
from finetune.data.images import load_image
from finetune.data.parallel import num_workers, ordered_map
from finetune.data.sources import read_sources, spread
from finetune.errors import ConfigError
from finetune.models.features import images_from_patches
from finetune.models.noise_residual import is_chosen
from finetune.models.vocabulary import load_processor
from finetune.schema import Record
from finetune.training.search_cache import SearchCache, search_cache_problems


class _Task(NamedTuple):
    """A record, which share of such pictures is searched, and where the maps are kept."""

    record: Record
    share: float
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
    found = search_ahead(config, arguments.workers, arguments.seconds, arguments.share, progress=sys.stderr.isatty())
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
        workers: processes; 0 for one per core. seconds: begin no picture after so many.
        share: of the training records, chosen by their names, an authentic picture always with its tampered twin;
            with None, the pictures that `heads.noise_residual.similarity_share` chooses, for which all must be read.
        progress: a bar on stderr.

    Raises:
        ConfigError: the run keeps no searches, or has no use for them.
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
        for problem in search_cache_problems(run, holds_searches=True):
            raise ConfigError(problem)
    deadline = None if seconds is None else time.time() + seconds  # of the clock that processes share
    tasks = [task for run in runs for task in _tasks(run, share)]
    setup = _Setup(config, num_workers(workers), deadline)
    searched = stored = left = 0
    results = ordered_map(_search, tasks, workers, initializer=_start, initargs=(setup,))
    for counts in tqdm(results, total=len(tasks), desc="search", unit="rec", disable=not progress):
        if counts is None:
            left += 1
        else:
            searched, stored = searched + counts[0], stored + counts[1]
    return Searches(searched, stored, left)


def _tasks(run: RunConfig, share: float | None) -> Iterator[_Task]:
    folder, data = Path(str(run.train.search_cache)), run.data
    for record in read_sources(data.train, "train"):
        if share is None:
            yield _Task(record, run.heads.noise_residual.similarity_share, folder)
        elif _is_among(record, share):
            yield _Task(record, 1.0, folder)
    if data.eval:
        evaluated = read_sources(data.eval, "eval")
        for record in evaluated if data.max_eval_samples is None else spread(evaluated, data.max_eval_samples):
            yield _Task(record, 1.0, folder)


def _is_among(record: Record, share: float) -> bool:
    """Whether a record's family is of the share: never one picture of a pair alone, which would give its label away."""
    digest = hashlib.sha256((pair_of(record) or record.id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Setup(NamedTuple):
    """What every process is given: configuration, number of processes, and the time after which none begins."""

    config: RunConfig
    workers: int
    deadline: float | None


class _Worker:
    """One process: its processor, and stores by folder."""

    def __init__(self, setup: _Setup) -> None:
        data = setup.config.data
        self.deadline = setup.deadline
        processor = load_processor(setup.config.model.path, data.min_pixels, data.max_pixels).image_processor
        set_short_side(processor, data.image_short_side)
        self.processor, self.caches = processor, dict[Path, SearchCache]()

    def search(self, task: _Task) -> tuple[int, int] | None:
        """How many pictures were searched, and how many were stored before; None where the time is over."""
        if self.deadline is not None and time.time() >= self.deadline:
            return None
        cache = self.caches.setdefault(task.folder, SearchCache(task.folder))
        before, chosen = cache.num_searched, 0
        for image in self._pictures(task.record):
            if is_chosen(image, task.share):
                chosen += 1
                cache(image)
        searched = cache.num_searched - before
        return searched, chosen - searched

    def _pictures(self, record: Record) -> list[Tensor]:
        """As the noise-residual stream is given them."""
        images = [load_image(image, record.id, record.source) for image in record.images]
        if not images:
            return []
        processor = self.processor
        seen = processed_images(images, processor)
        return images_from_patches(
            seen["pixel_values"],
            seen["image_grid_thw"],
            patch_size=processor.patch_size,
            temporal_patch_size=processor.temporal_patch_size,
            merge_size=processor.merge_size,
            mean=processor.image_mean,
            std=processor.image_std,
        )


_WORKER: list[_Worker] = []


def _start(setup: _Setup) -> None:
    if setup.workers > 1:  # threads of processes that share the cores wait for each other: half the speed
        torch.set_num_threads(1)
        threadpool_limits(1)
    _WORKER[:] = [_Worker(setup)]


def _search(task: _Task) -> tuple[int, int] | None:
    return _WORKER[0].search(task)
