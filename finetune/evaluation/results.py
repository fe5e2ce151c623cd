"""Per-image results gathered while a model predicts, and the metrics made of them; memory is flat in the pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from finetune.data.masks import rasterize_polygons
from finetune.metrics.bootstrap import Interval, bootstrap_auroc, bootstrap_mean
from finetune.metrics.classification import image_metrics
from finetune.metrics.localization import authentic_metrics, pixel_metrics
from finetune.metrics.text import verdict_metrics
from finetune.schema import Prediction, is_kind_of

NO_MASK_HEAD = "no mask head"
PIXEL_METRICS = ("f1", "iou", "dice", "auc", "f1_best_threshold")


class Origin(NamedTuple):
    """Where an image comes from: its record's group and the operation it was tampered with, "" where unknown."""

    group: str = ""
    operation: str = ""


UNKNOWN = Origin()


@dataclass
class EvaluationResults:
    """Results of the images seen so far.

    Args:
        mask_threshold: score from which a pixel counts as tampered.
        with_text: whether answers were asked for; an empty answer then counts as one that cannot be read.
        with_masks: whether the model has a mask head; without one (stage A) it takes no part in pixel metrics, instead
            of counting as one that marks nothing, and `absent` in their sections says so.
    """

    mask_threshold: float = 0.5
    with_text: bool = True
    with_masks: bool = True
    scores: list[float] = field(default_factory=list)
    raw_scores: list[float | None] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    judged: list[bool] = field(default_factory=list)
    pixels: list[dict[str, float | None]] = field(default_factory=list)
    authentic: list[dict[str, Any]] = field(default_factory=list)
    text_labels: list[int | None] = field(default_factory=list)
    head_labels: list[int | None] = field(default_factory=list)
    true_labels: list[int | None] = field(default_factory=list)
    written_ious: list[float] = field(default_factory=list)
    distinct_texts: set[str] = field(default_factory=set)
    origins: list[Origin] = field(default_factory=list)
    told_operations: list[str] = field(default_factory=list)
    pixel_origins: list[Origin] = field(default_factory=list)

    def add(
        self, prediction: Prediction, label: int | None, mask: np.ndarray | None, origin: Origin = UNKNOWN
    ) -> float | None:
        """Take in one image; returns its pixel F1 if it is tampered and has a mask. Without a label it counts among the
        answers alone, so that every other number is of the same images, the baselines' too."""
        if label is not None:
            self.scores.append(prediction.score)
            self.raw_scores.append(prediction.raw_score)
            self.labels.append(label)
            self.judged.append(prediction.is_judged)
            self.origins.append(origin)
            self.told_operations.append(prediction.operation)
        if self.with_text:
            self.text_labels.append(prediction.text_label)
            self.head_labels.append(prediction.label if prediction.verdict_from == "head" else None)
            self.true_labels.append(label)
            self.distinct_texts.add(prediction.text)
            if label is not None and mask is not None and mask.any():
                written = rasterize_polygons(prediction.text_polygons or (), mask.shape).astype(np.float32)
                self.written_ious.append(pixel_metrics(written, mask)["iou"] or 0.0)
        return None if label is None else self.add_mask(prediction.mask_scores, mask, origin)

    def add_mask(
        self, mask_scores: np.ndarray | None, mask: np.ndarray | None, origin: Origin = UNKNOWN
    ) -> float | None:
        """Take in one pixel map against its target; None targets are passed over."""
        if mask is None or not self.with_masks:
            return None
        if not mask.any():
            self.authentic.append(dict(authentic_metrics([(mask_scores, mask)], self.mask_threshold)))
            return None
        result = pixel_metrics(mask_scores, mask, self.mask_threshold)
        self.pixels.append(dict(result))
        self.pixel_origins.append(origin)
        return result["f1"]

    def score_set(self) -> tuple[list[int], list[float]]:
        """Labels and image scores, for the report's curves."""
        return self.labels, self.scores

    def metrics(self, threshold: float) -> dict[str, Any]:
        """The sections of metrics.json that come from the images.

        `intervals` holds 95 % percentile bootstrap intervals over images as [low, high]; `intervals_over_groups` draws
        whole groups (photographs, scenes), and is there where at least two groups have more than one image each.
        """
        own = self.uncalibrated(threshold)
        return {
            "image": self.image(threshold),
            **({"image_uncalibrated": own} if own else {}),
            "localization": self.localization(),
            "authentic": self.false_alarms(),
            "text": self._text(),
            "operations": self.operations(threshold),
            "intervals": self.intervals(),
            "intervals_over_groups": self.intervals(over_groups=True) if self._has_groups() else {},
        }

    def image(self, threshold: float) -> dict[str, Any]:
        """Image metrics of the verdicts; `n_without_verdict` where some image has none, see `image_metrics`."""
        if not self.labels:
            return {}
        found: dict[str, Any] = dict(image_metrics(self.scores, self.labels, threshold, self.judged))
        if not all(self.judged):
            found["n_without_verdict"] = self.judged.count(False)
        return found

    def uncalibrated(self, threshold: float) -> dict[str, Any]:
        """Image metrics of the heads' own scores; {} where scores were not calibrated."""
        raw = [score for score in self.raw_scores if score is not None]
        if not raw or len(raw) < len(self.labels):
            return {}
        found = image_metrics(np.array(raw), np.array(self.labels), threshold)
        return {name: found[name] for name in ("auroc", "average_precision", "ece", "accuracy", "balanced_accuracy")}

    def localization(self) -> dict[str, Any]:
        """Pixel metrics averaged over tampered images."""
        means = {name: _mean([row[name] for row in self.pixels]) for name in PIXEL_METRICS}
        return {**means, "n": len(self.pixels), **self._absent()}

    def false_alarms(self) -> dict[str, Any]:
        """What is marked on authentic images, averaged over them."""
        return {
            "false_alarm_rate": _mean([row["false_alarm_rate"] for row in self.authentic]),
            "false_positive_area": _mean([row["false_positive_area"] for row in self.authentic]),
            "n": len(self.authentic),
            **self._absent(),
        }

    def _absent(self) -> dict[str, str]:
        """Why a section of pixel metrics is empty, where the model is the reason."""
        return {} if self.with_masks else {"absent": NO_MASK_HEAD}

    def operations(self, threshold: float = 0.5) -> dict[str, dict[str, Any]]:
        """Of each tampering operation that is known: `n`, image AUROC against all authentic images, pixel F1 at
        `mask_threshold`, and `recall`, the share of its images called tampered.

        With `heads.operations` also `recognized`: the share whose likeliest operation is this one; kinds of one
        operation (`retouch.grain`) count as it, and every tampered image counts, found or not.
        """
        names = sorted({origin.operation for origin in (*self.origins, *self.pixel_origins)} - {""})
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            chosen = [
                (score, label, judged)
                for score, label, judged, origin in zip(
                    self.scores, self.labels, self.judged, self.origins, strict=True
                )
                if label == 0 or origin.operation == name
            ]
            scores, labels, judged = zip(*chosen, strict=True) if chosen else ((), (), ())
            image = image_metrics(scores, labels, threshold, judged)
            pixels = [
                row["f1"]
                for row, origin in zip(self.pixels, self.pixel_origins, strict=True)
                if origin.operation == name
            ]
            found[name] = {
                "n": image["n_fake"],
                "auroc": image["auroc"],
                "recall": image["recall_fake"],
                "f1": _mean(pixels),
            }
            told = [
                is_kind_of(said, name)
                for said, label, origin in zip(self.told_operations, self.labels, self.origins, strict=True)
                if label == 1 and origin.operation == name and said
            ]
            if told:
                found[name]["recognized"] = sum(told) / len(told)
        return found

    def intervals(self, prefix: str = "", over_groups: bool = False) -> dict[str, list[float | None]]:
        """Bootstrap intervals of the figures that are compared: image AUROC, pixel F1 and IoU."""
        found: dict[str, list[float | None]] = {}
        if len(set(self.labels)) == 2:
            groups = _group_names(self.origins) if over_groups else None
            interval = bootstrap_auroc(np.array(self.scores), np.array(self.labels), groups=groups)
            found[f"{prefix}image.auroc"] = _bounds(interval)
        for name in ("f1", "iou"):
            values = [float(row[name] or 0.0) for row in self.pixels]
            if values:
                groups = _group_names(self.pixel_origins) if over_groups else None
                found[f"{prefix}localization.{name}"] = _bounds(bootstrap_mean(np.array(values), groups=groups))
        return found

    def _has_groups(self) -> bool:
        sizes = Counter(origin.group for origin in self.origins if origin.group)
        return sum(size > 1 for size in sizes.values()) > 1

    def _text(self) -> dict[str, Any]:
        if not self.text_labels:
            return {"parse_rate": None, "label_agreement": None}
        return {
            **verdict_metrics(self.text_labels, self.head_labels, self.true_labels),
            "polygon_iou": _mean(self.written_ious),
            "n_distinct": len(self.distinct_texts),
        }


def _group_names(origins: Sequence[Origin]) -> list[str]:
    """A name per image; one without a group is a group of its own."""
    return [origin.group or f"#{number}" for number, origin in enumerate(origins)]


def _mean(values: list[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _bounds(interval: Interval) -> list[float | None]:
    return [interval.low, interval.high]
