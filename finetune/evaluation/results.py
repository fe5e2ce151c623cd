"""Per-image results gathered while a model predicts, and the metrics made of them; memory is flat in the pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.metrics.bootstrap import Interval, bootstrap_auroc, bootstrap_mean
from finetune.metrics.classification import image_metrics
from finetune.metrics.localization import authentic_metrics, pixel_metrics
from finetune.metrics.text import verdict_metrics
from finetune.schema import Prediction

PIXEL_METRICS = ("f1", "iou", "dice", "auc", "f1_best_threshold")


@dataclass
class EvaluationResults:
    """Results of the images seen so far.

    Args:
        mask_threshold: score from which a pixel counts as tampered.
        with_text: whether answers were asked for; an empty answer then counts as one that cannot be read.
    """

    mask_threshold: float = 0.5
    with_text: bool = True
    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pixels: list[dict[str, float | None]] = field(default_factory=list)
    authentic: list[dict[str, Any]] = field(default_factory=list)
    text_labels: list[int | None] = field(default_factory=list)
    head_labels: list[int] = field(default_factory=list)
    true_labels: list[int | None] = field(default_factory=list)

    def add(self, prediction: Prediction, label: int | None, mask: np.ndarray | None) -> float | None:
        """Take in one image; returns its pixel F1 if it is tampered and has a mask."""
        if label is not None:
            self.scores.append(prediction.score)
            self.labels.append(label)
        if self.with_text:
            self.text_labels.append(prediction.text_label)
            self.head_labels.append(prediction.label)
            self.true_labels.append(label)
        return self.add_mask(prediction.mask_scores, mask)

    def add_mask(self, mask_scores: np.ndarray | None, mask: np.ndarray | None) -> float | None:
        """Take in one pixel map against its target; None targets are passed over."""
        if mask is None:
            return None
        if not mask.any():
            self.authentic.append(dict(authentic_metrics([(mask_scores, mask)], self.mask_threshold)))
            return None
        result = pixel_metrics(mask_scores, mask, self.mask_threshold)
        self.pixels.append(dict(result))
        return result["f1"]

    def score_set(self) -> tuple[list[int], list[float]]:
        """Labels and image scores, for the report's curves."""
        return self.labels, self.scores

    def metrics(self, threshold: float) -> dict[str, Any]:
        """The sections `image`, `localization`, `authentic`, `text` and `intervals` of metrics.json.

        `intervals` holds 95 % percentile bootstrap intervals over images as [low, high].
        """
        image = image_metrics(np.array(self.scores), np.array(self.labels), threshold) if self.labels else {}
        return {
            "image": dict(image),
            "localization": self.localization(),
            "authentic": self.false_alarms(),
            "text": self._text(),
            "intervals": self.intervals(),
        }

    def localization(self) -> dict[str, Any]:
        """Pixel metrics averaged over tampered images."""
        return {name: _mean([row[name] for row in self.pixels]) for name in PIXEL_METRICS} | {"n": len(self.pixels)}

    def false_alarms(self) -> dict[str, Any]:
        """What is marked on authentic images, averaged over them."""
        return {
            "false_alarm_rate": _mean([row["false_alarm_rate"] for row in self.authentic]),
            "false_positive_area": _mean([row["false_positive_area"] for row in self.authentic]),
            "n": len(self.authentic),
        }

    def intervals(self, prefix: str = "") -> dict[str, list[float | None]]:
        """Bootstrap intervals of the figures that are compared: image AUROC, pixel F1 and IoU."""
        found: dict[str, list[float | None]] = {}
        if len(set(self.labels)) == 2:
            found[f"{prefix}image.auroc"] = _bounds(bootstrap_auroc(np.array(self.scores), np.array(self.labels)))
        for name in ("f1", "iou"):
            values = [float(row[name] or 0.0) for row in self.pixels]
            if values:
                found[f"{prefix}localization.{name}"] = _bounds(bootstrap_mean(np.array(values)))
        return found

    def _text(self) -> dict[str, Any]:
        if not self.text_labels:
            return {"parse_rate": None, "label_agreement": None}
        return dict(verdict_metrics(self.text_labels, self.head_labels, self.true_labels))


def _mean(values: list[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _bounds(interval: Interval) -> list[float | None]:
    return [interval.low, interval.high]
