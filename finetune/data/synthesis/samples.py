"""One generated image: which host, size, post-processing and operation its task means, made in memory.

Every sample has its own generator seeded by (seed, split, index), so it depends on nothing made before it. No files are
written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from finetune.data.synthesis.camera import develop
from finetune.data.synthesis.config import SynthConfig
from finetune.data.synthesis.degradations import apply_plan, canvas_size, draw_plan
from finetune.data.synthesis.image_files import draw_container
from finetune.data.synthesis.operations import OPERATIONS, Donor, NoVisibleEditError, tamper
from finetune.data.synthesis.photos import SPLITS, Photo, PhotoSet
from finetune.errors import DataFormatError

LARGEST_TOTAL_SHARE = 0.45
"""Of the picture that all edits together may alter; a further one that would exceed it is left out."""
LARGEST_HIDDEN_SHARE = 0.3
"""Of an earlier edit's area that a further one may cover: what is said of the earlier one stays true."""


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
        """Of host, size, degradations, container and edit."""
        return [config.seed, SPLITS.index(self.split), self.index if self.pair is None else self.pair]


@dataclass(frozen=True)
class AppliedEdit:
    """One edit of a picture: its operation as JSON values, its mask (H, W) bool on the finished image, and the one on
    the canvas before post-processing."""

    operation: dict[str, Any]
    mask: np.ndarray
    canvas_mask: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One generated image in memory.

    Args:
        image: (H, W, 3) uint8 RGB, finished.
        photo: the host photograph.
        provenance: JSON values.
        host, edited: the picture before and after all edits, before post-processing and on its canvas; for checks.
        edits: in their order; none when authentic.
    """

    image: np.ndarray
    photo: Photo
    provenance: dict[str, Any]
    host: np.ndarray
    edited: np.ndarray
    edits: tuple[AppliedEdit, ...] = ()

    @property
    def mask(self) -> np.ndarray | None:
        """(H, W) bool of the finished image: what any edit altered; None when authentic."""
        return np.logical_or.reduce([edit.mask for edit in self.edits]) if self.edits else None

    @property
    def edited_mask(self) -> np.ndarray | None:
        """The same on the canvas before post-processing."""
        return np.logical_or.reduce([edit.canvas_mask for edit in self.edits]) if self.edits else None


def plan_tasks(config: SynthConfig, split: str) -> list[SampleTask]:
    """The samples of one split in order: exact counts of both classes and of each planned operation, in random places.

    With `config.paired` the training split's authentic and tampered images are two by two of the same picture, as far
    as there are as many of both; either may stand first, and the number of the first is the pair's.
    """
    count = {"train": config.num_train, "eval": config.num_eval, "val": config.num_val}[split]
    tampered = round(config.tampered_fraction * count)
    names = _operations(config)
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


def _operations(config: SynthConfig) -> list[str]:
    """Those with a weight, in the order of `OPERATIONS`."""
    return [name for name in OPERATIONS if config.operations.get(name, 0) > 0]


def make_sample(task: SampleTask, config: SynthConfig, photos: PhotoSet) -> Sample:
    """Make one image in memory.

    Size, degradations, container and host come from streams of their own, drawn before anything depends on the label.
    An operation of which nothing would show on its host (a copy of clear sky on clear sky) gives way to the first other
    one of the configuration that does; another host would make tampered pictures a selection of the authentic ones.

    Raises:
        DataFormatError: the host is so flat that no operation shows in it.
    """
    seed = task.seed(config)
    streams = np.random.SeedSequence(seed).spawn(5)
    rng_plan, rng_host, rng_edit, rng_file, rng_further = (np.random.default_rng(stream) for stream in streams)
    final_hw = config.sizes_hw[int(rng_plan.integers(len(config.sizes_hw)))]
    plan = draw_plan(rng_plan, config.degradations, config.no_degradation, config.two_degradations)
    size_hw = canvas_size(plan, final_hw)
    pool = photos.of(task.split)
    photo = _draw_host(pool, rng_host, config.grey_photo_weight)
    is_grey = photo.is_grey or bool(rng_host.random() < config.monochrome)
    variation = config.scene_variation if task.split == "train" else 0.0
    host, camera = develop(photo, size_hw, rng_host, is_grey, pool, variation)
    provenance: dict[str, Any] = {
        "source": camera,
        "operation": None,
        "degradations": plan,
        "container": draw_container(config.image_format, config.image_quality, rng_file),
        "size_hw": list(final_hw),
        "seed": [config.seed, task.split, seed[-1]],
    }
    if task.pair is not None:
        provenance["pair"] = f"{task.split}-{config.seed}-{task.pair:06d}"

    def finish(image: np.ndarray) -> np.ndarray:
        return apply_plan(image, plan, final_hw)

    if task.operation is None:
        return Sample(finish(host), photo, provenance, host, host)

    def draw_donor(rng: np.random.Generator) -> Donor:
        return develop(_draw_donor_photo(pool, photo, is_grey, rng), size_hw, rng, is_grey, pool, variation)

    refusals: list[str] = []
    for name in (task.operation, *(name for name in _operations(config) if name != task.operation)):
        try:
            result = tamper(host, name, rng_edit, config.operation_settings, draw_donor, finish)
            break
        except NoVisibleEditError as error:
            refusals.append(str(error))
    else:
        raise DataFormatError(
            "; ".join(refusals),
            record=task.id,
            field="photo",
            found=photo.name,
            fix="remove photographs that are nearly flat",
        )
    planned = {"instead_of": task.operation} if name != task.operation else {}
    provenance["operation"] = {"name": name, **planned, **result.parameters}
    edits = [AppliedEdit(provenance["operation"], result.finished_mask, result.mask)]
    if task.split == "train" and rng_further.random() < config.further_edits:
        for name in _draw_further(config, rng_further):
            try:
                more = tamper(result.image, name, rng_further, config.operation_settings, draw_donor, finish)
            except NoVisibleEditError:
                continue  # there is one edit already
            if not _goes_with(more.mask, [edit.canvas_mask for edit in edits]):
                continue
            result = more
            edits.append(AppliedEdit({"name": name, **more.parameters}, more.finished_mask, more.mask))
    return Sample(result.finished, photo, provenance, host, result.image, tuple(edits))


def _goes_with(mask: np.ndarray, earlier: Sequence[np.ndarray]) -> bool:
    """Whether a further edit leaves enough of the picture, and of each edit before it, as it was."""
    hidden = max(float((mask & one).sum() / one.sum()) for one in earlier)
    return bool(np.logical_or.reduce([mask, *earlier]).mean() <= LARGEST_TOTAL_SHARE and hidden <= LARGEST_HIDDEN_SHARE)


def _draw_further(config: SynthConfig, rng: np.random.Generator) -> list[str]:
    """One or two operations, by their weights."""
    names = _operations(config)
    weights = np.array([config.operations[name] for name in names])
    return [names[int(rng.choice(len(names), p=weights / weights.sum()))] for _ in range(1 + int(rng.random() < 0.4))]


def _draw_host(pool: Sequence[Photo], rng: np.random.Generator, grey_weight: float) -> Photo:
    """One photograph; every scene counts once however many photographs it has, grey ones count `grey_weight`."""
    return pool[int(rng.choice(len(pool), p=_host_chances(tuple((p.group, p.is_grey) for p in pool), grey_weight)))]


@lru_cache(maxsize=4)
def _host_chances(pool: tuple[tuple[str, bool], ...], grey_weight: float) -> np.ndarray:
    scenes = Counter(group for group, _ in pool)
    p = np.array([(grey_weight if is_grey else 1.0) / scenes[group] for group, is_grey in pool])
    if p.sum() == 0:
        p = np.ones(len(pool))
    return p / p.sum()


def _draw_donor_photo(pool: Sequence[Photo], host: Photo, is_grey: bool, rng: np.random.Generator) -> Photo:
    """A photograph of another scene of the same split, coloured if the host is; the host itself when there is none."""
    others = [photo for photo in pool if photo.group != host.group and (is_grey or not photo.is_grey)]
    others = others or [host]
    return others[int(rng.integers(len(others)))]
