"""Make a data set of authentic and tampered images, with masks, polygons, evidence and provenance, from photographs.

Same seed, same files byte for byte, whatever the number of workers: every sample has its own generator seeded by
(seed, split, index). The set is written beside its final place and renamed at the end, so that it is never half there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
from tqdm import tqdm

from finetune.data.synthesis.answers import LANGUAGES, evidence_text, mask_to_polygons
from finetune.data.synthesis.config import SynthConfig
from finetune.data.synthesis.degradations import apply_plan, canvas_size, draw_plan
from finetune.data.synthesis.operations import OPERATIONS, Donor, NoVisibleEditError, tamper
from finetune.data.synthesis.photos import SPLITS, Photo, PhotoSet, develop, find_photos
from finetune.errors import DataFormatError, ForensicsError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SampleTask:
    """One image to make.

    Args:
        split, index: where in the set it stands.
        operation: how it is tampered, None for an authentic image.
        pair: index that gives the picture before the operation, shared by the two images of a pair; None: `index`.
    """

    split: str
    index: int
    operation: str | None = None
    pair: int | None = None

    @property
    def id(self) -> str:
        """`train-000123`; says nothing about the label."""
        return f"{self.split}-{self.index:06d}"

    def seed(self, config: SynthConfig) -> list[int]:
        """Of host, size, degradations and edit."""
        return [config.seed, SPLITS.index(self.split), self.index if self.pair is None else self.pair]


def synthesize(
    config: SynthConfig, out_dir: str | Path, progress: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Write `{train,val,eval}/{images,masks}/*.png`, `{train,val,eval}.jsonl`, `eval_annotations.json`, manifest.json.

    With more than one worker the caller's script needs the usual `if __name__ == "__main__":` (processes are spawned).

    Args:
        config: what to make.
        out_dir: new or empty folder; its parent is created.
        progress: show a bar on stderr.
        overwrite: replace a folder that holds an earlier generated set; any other non-empty folder is refused anyway.

    Returns:
        the manifest, as written.

    Raises:
        ForensicsError: unusable photographs or an `out_dir` that is not empty.
    """
    out_dir = Path(out_dir)
    _check_target(out_dir, overwrite)
    photos = find_photos(config.photos_dir, config.held_out_fraction)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_dir = out_dir.parent / f".{out_dir.name}.partial-{os.getpid()}"
    shutil.rmtree(partial_dir, ignore_errors=True)
    try:
        manifest = _write_set(config, photos, partial_dir, progress)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        partial_dir.rename(out_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    return manifest


def _check_target(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not overwrite:
        raise ForensicsError(f"output {str(out_dir)!r} is not empty; choose another folder or pass overwrite")
    if not (out_dir / "manifest.json").is_file():
        raise ForensicsError(
            f"output {str(out_dir)!r} holds no manifest.json, so it is not a generated set; it is not"
            " overwritten, choose another folder"
        )


def _write_set(config: SynthConfig, photos: PhotoSet, root: Path, progress: bool) -> dict[str, Any]:
    records: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        (root / split / "images").mkdir(parents=True)
        (root / split / "masks").mkdir()
    tasks = [task for split in SPLITS for task in plan_tasks(config, split)]
    with _results(config, photos, root, tasks) as results:
        for task, record in zip(
            tasks, tqdm(results, total=len(tasks), desc="synth", unit="img", disable=not progress), strict=True
        ):
            records[task.split].append(record)
    hashes = {}
    for split in SPLITS:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records[split])
        (root / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        hashes[f"{split}.jsonl"] = hashlib.sha256(lines.encode()).hexdigest()
    annotations = [
        {"image_path": record["images"][0], "mask_path": record["masks"][0], "label": record["labels"][0]}
        for record in records["eval"]
    ]
    _write_json(root / "eval_annotations.json", annotations)
    manifest = _manifest(config, photos, records, hashes)
    _write_json(root / "manifest.json", manifest)
    return manifest


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def plan_tasks(config: SynthConfig, split: str) -> list[SampleTask]:
    """The samples of one split in order: exact counts of both classes and of each operation, in random places.

    With `config.paired` the training split's authentic and tampered images are two by two of the same picture, as far
    as there are as many of both; either may stand first, and the number of the first is the pair's.
    """
    count = {"train": config.num_train, "eval": config.num_eval, "val": config.num_val}[split]
    tampered = round(config.tampered_fraction * count)
    names = [name for name in OPERATIONS if config.operations.get(name, 0) > 0]
    weights = np.array([config.operations[name] for name in names])
    bounds = np.rint(np.cumsum(weights / weights.sum()) * tampered)
    which = np.searchsorted(bounds, np.arange(count), side="right")  # len(names) = authentic
    np.random.default_rng([config.seed, SPLITS.index(split)]).shuffle(which)
    pairs: dict[int, int] = {}
    if config.paired and split == "train":
        is_authentic = which == len(names)
        for couple in zip(np.flatnonzero(is_authentic), np.flatnonzero(~is_authentic), strict=False):
            pairs.update(dict.fromkeys(map(int, couple), int(min(couple))))
    return [SampleTask(split, i, (*names, None)[int(kind)], pairs.get(i)) for i, kind in enumerate(which)]


@contextmanager
def _results(
    config: SynthConfig, photos: PhotoSet, root: Path, tasks: list[SampleTask]
) -> Iterator[Iterator[dict[str, Any]]]:
    """Records of the tasks in their order, made in this process or in spawned ones."""
    make = partial(write_sample, config=config, photos=photos, root=root)
    workers = min(config.workers or os.cpu_count() or 1, max(1, len(tasks) // 16))
    threads = cv2.getNumThreads()
    if workers <= 1:
        cv2.setNumThreads(1)
        try:
            yield map(make, tasks)
        finally:
            cv2.setNumThreads(threads)
        return
    executor = ProcessPoolExecutor(workers, get_context("spawn"), cv2.setNumThreads, (1,))
    try:
        yield executor.map(make, tasks, chunksize=max(1, min(32, len(tasks) // (4 * workers))))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Sample:
    """One generated image in memory.

    Args:
        image: (H, W, 3) uint8 RGB, finished.
        mask: (H, W) bool of the finished image, None when authentic.
        group: scene of the host photograph.
        provenance: JSON values.
        host, edited, edited_mask: the picture before and after the operation and its mask, all before post-processing
            and on its canvas; for checks.
    """

    image: np.ndarray
    mask: np.ndarray | None
    group: str
    provenance: dict[str, Any]
    host: np.ndarray
    edited: np.ndarray
    edited_mask: np.ndarray | None


def make_sample(task: SampleTask, config: SynthConfig, photos: PhotoSet) -> Sample:
    """Make one image in memory.

    Size, degradations and host come from streams of their own, drawn before anything depends on the label.

    Raises:
        DataFormatError: the host is so flat that no operation shows in it.
    """
    seed = task.seed(config)
    streams = np.random.SeedSequence(seed).spawn(4)
    rng_plan, rng_host, rng_edit, _ = (np.random.default_rng(stream) for stream in streams)
    final_hw = config.sizes_hw[int(rng_plan.integers(len(config.sizes_hw)))]
    plan = draw_plan(rng_plan, config.degradations, config.no_degradation, config.two_degradations)
    size_hw = canvas_size(plan, final_hw)
    pool = photos.of(task.split)
    photo = _draw_host(pool, rng_host, config.grey_photo_weight)
    is_grey = photo.is_grey or bool(rng_host.random() < config.monochrome)
    host, camera = develop(photo, size_hw, rng_host, is_grey)
    provenance: dict[str, Any] = {
        "source": camera,
        "operation": None,
        "degradations": plan,
        "seed": [config.seed, task.split, seed[-1]],
    }
    if task.pair is not None:
        provenance["pair"] = f"{task.split}-{config.seed}-{task.pair:06d}"
    if task.operation is None:
        return Sample(apply_plan(host, plan, final_hw), None, photo.group, provenance, host, host, None)

    def draw_donor(rng: np.random.Generator) -> Donor:
        return develop(_draw_donor_photo(pool, photo, is_grey, rng), size_hw, rng, is_grey)

    try:
        result = tamper(host, task.operation, rng_edit, config.operation_settings, draw_donor)
    except NoVisibleEditError as error:
        raise DataFormatError(
            str(error), record=task.id, field="photo", found=photo.name, fix="remove photographs that are nearly flat"
        ) from error
    provenance["operation"] = {"name": task.operation, **result.parameters}
    image = apply_plan(result.image, plan, final_hw)
    mask = result.mask
    if mask.shape != tuple(final_hw):
        mask = cv2.resize(mask.astype(np.float32), final_hw[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
    return Sample(image, mask, photo.group, provenance, host, result.image, result.mask)


def _draw_host(pool: tuple[Photo, ...], rng: np.random.Generator, grey_weight: float) -> Photo:
    """One photograph; every scene counts once however many photographs it has, grey ones count `grey_weight`."""
    scenes = Counter(photo.group for photo in pool)
    p = np.array([(grey_weight if photo.is_grey else 1.0) / scenes[photo.group] for photo in pool])
    if p.sum() == 0:
        p = np.ones(len(pool))
    return pool[int(rng.choice(len(pool), p=p / p.sum()))]


def _draw_donor_photo(pool: tuple[Photo, ...], host: Photo, is_grey: bool, rng: np.random.Generator) -> Photo:
    """A photograph of another scene of the same split, coloured if the host is; the host itself when there is none."""
    others = [photo for photo in pool if photo.group != host.group and (is_grey or not photo.is_grey)]
    others = others or [host]
    return others[int(rng.integers(len(others)))]


def write_sample(task: SampleTask, config: SynthConfig, photos: PhotoSet, root: Path) -> dict[str, Any]:
    """Make one image, write its files under `root` and return its jsonl record (paths relative to `root`)."""
    sample = make_sample(task, config, photos)
    rng = np.random.default_rng([config.seed, SPLITS.index(task.split), task.index, 1])
    language = config.language if config.language != "both" else LANGUAGES[int(rng.integers(2))]
    operation, plan = sample.provenance["operation"], sample.provenance["degradations"]
    height, width = sample.image.shape[:2]
    image_path = f"{task.split}/images/{task.index:06d}.png"
    mask_path = f"{task.split}/masks/{task.index:06d}.png" if sample.mask is not None else f"{height}x{width}"
    _write_png(root / image_path, cv2.cvtColor(sample.image, cv2.COLOR_RGB2BGR))
    if sample.mask is not None:
        _write_png(root / mask_path, sample.mask.astype(np.uint8) * 255)
    return {
        "id": task.id,
        "group": sample.group,
        "images": [image_path],
        "labels": [int(task.operation is not None)],
        "masks": [mask_path],
        "polygons": [[] if sample.mask is None else mask_to_polygons(sample.mask, config.max_points)],
        "evidence": [evidence_text(sample.mask, operation, plan, language, rng)],
        "provenance": {**sample.provenance, "language": language},
    }


def _write_png(path: Path, array: np.ndarray) -> None:
    """Fast PNG without metadata; the same settings for every image, so the container says nothing."""
    if not cv2.imwrite(str(path), array, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OSError(f"cannot write {path}")


def _manifest(
    config: SynthConfig, photos: PhotoSet, records: dict[str, list[dict[str, Any]]], hashes: dict[str, str]
) -> dict[str, Any]:
    counts = {}
    for split in SPLITS:
        operations = [record["provenance"]["operation"] for record in records[split]]
        kinds = Counter(operation["name"] if operation else "authentic" for operation in operations)
        labels = Counter(record["labels"][0] for record in records[split])
        groups = Counter(record["group"] for record in records[split])
        counts[split] = {
            "images": len(records[split]),
            "authentic": labels[0],
            "tampered": labels[1],
            "operations": dict(sorted(kinds.items())),
            "groups": dict(sorted(groups.items())),
        }
    # Machine paths and the number of processes do not belong to the content: the same seed gives the same manifest.
    content = asdict(replace(config, photos_dir=None if config.photos_dir is None else Path(config.photos_dir).name))
    del content["workers"]
    listed = [{key: value for key, value in asdict(photo).items() if key != "path"} for photo in photos.photos]
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
    }
    return {
        "format_version": FORMAT_VERSION,
        "seed": config.seed,
        "counts": counts,
        "sha256": hashes,
        "photos": listed,
        "rejected_photos": list(photos.rejected),
        "config": content,
        "versions": versions,
    }
