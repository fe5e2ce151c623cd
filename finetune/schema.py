"""Typed records that every layer shares: what a sample is before it becomes tensors, and what a prediction is.

Frames: polygons are in pixels of the *original* image (after EXIF rotation), x to the right, y down, pixel centres at
half-integers; sizes are (height, width). No torch here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

RESULT_WORDS = {"real": 0, "fake": 1}
"""What may stand in an answer's `result`, and the label it means."""
Role = Literal["system", "user", "assistant"]
Polygon = tuple[tuple[float, float], ...]
"""One closed region as ((x, y), ...) in pixels of the original image; the last point is not repeated."""


@dataclass(frozen=True)
class ImageInput:
    """Where an image's bytes are: exactly one of `path` (resolved, openable as it stands) and `data` (encoded file)."""

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError("an ImageInput takes exactly one of path and data")


@dataclass(frozen=True)
class ImageTarget:
    """What is known about one image; every field may be missing.

    Args:
        label: 0 real, 1 tampered, None unknown.
        mask_path: file of the image's own size; `finetune.data.masks.binarize_mask` says which pixels are tampered.
        mask_size_hw: the `HxW` that stands in place of a mask path for an authentic image (an all-zero mask).
        polygons: tampered regions; an alternative to `mask_path`.
        evidence: free text for the answer's `evidence` field.
    """

    label: int | None = None
    mask_path: str | None = None
    mask_size_hw: tuple[int, int] | None = None
    polygons: tuple[Polygon, ...] | None = None
    evidence: str | None = None

    @property
    def has_mask(self) -> bool:
        """Whether a pixel target can be made. An image labelled real has an all-zero mask without any file."""
        return bool(self.mask_path or self.mask_size_hw or self.polygons is not None or self.label == 0)


@dataclass(frozen=True)
class Turn:
    """One message; `content` holds `<image>` where an image stands and forensic tokens where the user put them."""

    role: Role
    content: str


@dataclass(frozen=True)
class Record:
    """One sample of any data set.

    Args:
        id: unique name used in every message about this sample.
        images: the images in the order of their `<image>` placeholders.
        targets: one `ImageTarget` per image.
        turns: the conversation; empty when the answer is to be rendered from a template and the targets.
        group: samples of one group never fall on both sides of a split (source photo, directory, scene).
        source: `file:line` the record was read from, for error messages.
        provenance: how the image was made, when it was generated.
    """

    id: str
    images: tuple[ImageInput, ...]
    targets: tuple[ImageTarget, ...]
    turns: tuple[Turn, ...] = ()
    group: str = ""
    source: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.targets):
            raise ValueError(f"record {self.id!r}: {len(self.images)} images but {len(self.targets)} targets")

    @property
    def label(self) -> int | None:
        """1 if any image is labelled tampered, 0 if all labelled ones are real, None if none is labelled."""
        labels = [target.label for target in self.targets if target.label is not None]
        return max(labels) if labels else None


def operation_family(name: str) -> str:
    """`retouch` of the operation `retouch.grain`: what stands before the first dot."""
    return name.split(".")[0]


def is_kind_of(name: str, operation: str) -> bool:
    """Whether a name is that operation or a kind of it: `retouch` and `retouch.grain` are of `retouch`."""
    return name == operation or name.startswith(f"{operation}.")


VerdictSource = Literal["head", "text", "nothing"]


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image; made without any target.

    Args:
        id: the record's id (`id#k` for the k-th of several images).
        image_path: path the image was read from, "" for embedded bytes.
        label: verdict, 0 real or 1 tampered: `score` against the threshold; 0 where there is none.
        score: probability in [0, 1] that the image is tampered; 0.5 where there is no verdict.
        mask_scores: (H, W) float32 in [0, 1] at the image's own size, or None when no mask head ran.
        polygons: regions of `mask_scores` above the mask threshold.
        text: generated answer without forensic tokens, "" when no text was asked for.
        parse_ok: whether `text` is the JSON the template asks for.
        text_label: verdict written in `text`, None where it could not be read.
        text_polygons: regions written in `text`, in pixels of the original image, None where it could not be read.
        size_hw: (H, W) of the image after EXIF rotation.
        raw_score: the head's own probability where `score` was calibrated, else None.
        operations: how it was tampered, if it was: share of each of the model's `heads.operations`, 1 in all; None
            without such a head.
        verdict_from: what `label` and `score` come from: the cls head; without one the word written in `text` (a score
            of 0 or 1); or nothing, where that cannot be read either.
    """

    id: str
    image_path: str
    label: int
    score: float
    mask_scores: np.ndarray | None
    polygons: tuple[Polygon, ...]
    text: str
    parse_ok: bool
    size_hw: tuple[int, int]
    text_label: int | None = None
    text_polygons: tuple[Polygon, ...] | None = None
    raw_score: float | None = None
    operations: dict[str, float] | None = None
    verdict_from: VerdictSource = "head"

    @property
    def is_judged(self) -> bool:
        """Whether there is a verdict at all."""
        return self.verdict_from != "nothing"

    @property
    def operation(self) -> str:
        """The likeliest way it was tampered, if it was; "" where the model cannot tell.

        Kinds of one operation (`retouch.grain`, `retouch.tone`) are added up first: the likeliest kind of the likeliest
        operation.
        """
        if not self.operations:
            return ""
        families: defaultdict[str, float] = defaultdict(float)
        for name, share in self.operations.items():
            families[operation_family(name)] += share
        return max(self.operations.items(), key=lambda entry: (families[operation_family(entry[0])], entry[1]))[0]

    @property
    def own_score(self) -> float:
        """The head's own probability, whether `score` was calibrated or not."""
        return self.score if self.raw_score is None else self.raw_score
