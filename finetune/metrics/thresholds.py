"""What another threshold would give: tables over thresholds and the ROC and PR curves, for images and for pixels.

A row says what holds at its threshold; picking the best row on the images that are then reported is optimistic, and the
tables leave that choice to their reader. An image or pixel is called tampered when score >= threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from finetune.metrics.classification import check_scores

STEPS = tuple(round(0.05 * k, 2) for k in range(1, 20))
"""0.05, 0.10, ... 0.95: the rows of a table."""


def image_table(
    scores: ArrayLike, labels: ArrayLike, thresholds: Sequence[float] = STEPS
) -> list[dict[str, float | None]]:
    """Detection at each threshold.

    Args:
        scores: (N,) float in [0, 1]. labels: (N,) in {0, 1}, 1 = tampered.

    Returns:
        Per threshold `threshold`, `accuracy`, `balanced_accuracy`, `precision`, `recall`, `f1`, `false_alarm_rate`.
        None where undefined: precision where nothing is called, what needs a class that is missing.
    """
    values, truth = check_scores(scores, labels)
    num_fake, num_real = int((truth == 1).sum()), int((truth == 0).sum())
    rows: list[dict[str, float | None]] = []
    for threshold in thresholds:
        called = values >= threshold
        hits, alarms = int((called & (truth == 1)).sum()), int((called & (truth == 0)).sum())
        recall = hits / num_fake if num_fake else None
        alarm_rate = alarms / num_real if num_real else None
        both = recall is not None and alarm_rate is not None
        rows.append(
            {
                "threshold": float(threshold),
                "accuracy": (hits + num_real - alarms) / len(truth) if len(truth) else None,
                "balanced_accuracy": (recall + 1 - alarm_rate) / 2 if both else None,  # type: ignore[operator]
                "precision": hits / (hits + alarms) if hits + alarms else None,
                "recall": recall,
                "f1": 2 * hits / (num_fake + hits + alarms) if num_fake else None,
                "false_alarm_rate": alarm_rate,
            }
        )
    return rows


@dataclass
class PixelTable:
    """Localisation at each threshold, gathered image by image in constant memory.

    Args:
        thresholds: ascending, of float32 scores (compared as float32, as everywhere).
    """

    thresholds: Sequence[float] = STEPS
    _f1: list[np.ndarray] = field(default_factory=list)
    _iou: list[np.ndarray] = field(default_factory=list)
    _alarm: list[np.ndarray] = field(default_factory=list)

    def add(self, scores: np.ndarray | None, mask: np.ndarray) -> None:
        """Take in one image: (H, W) scores in [0, 1], or None for no prediction, and its true mask."""
        truth = np.asarray(mask) != 0
        if scores is None:
            scores = np.full(truth.shape, -1, np.float32)
        steps = np.asarray(self.thresholds, dtype=scores.dtype)
        level = np.searchsorted(steps, scores.ravel(), side="right")  # thresholds that each pixel reaches, (H*W,)
        called = _reach(level, len(steps))  # (T,) pixels called at each threshold
        if not truth.any():
            self._alarm.append(called / truth.size)
            return
        hits = _reach(level[truth.ravel()], len(steps))
        total = int(truth.sum())
        self._f1.append(2 * hits / (called + total))
        self._iou.append(hits / (called + total - hits))

    def rows(self) -> list[dict[str, float | None]]:
        """Per threshold `threshold`, `f1` and `iou` averaged over tampered images, `false_alarm_rate` and
        `false_positive_area` over authentic ones; None where there are none."""
        return [
            {
                "threshold": float(threshold),
                "f1": _mean([image[k] for image in self._f1]),
                "iou": _mean([image[k] for image in self._iou]),
                "false_alarm_rate": _mean([float(image[k] > 0) for image in self._alarm]),
                "false_positive_area": _mean([image[k] for image in self._alarm]),
            }
            for k, threshold in enumerate(self.thresholds)
        ]


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> list[tuple[float, float, float]]:
    """(threshold, false-alarm rate, detection rate) at every distinct score, from (inf, 0, 0) to the lowest score.

    [] where a class is missing.
    """
    found = _counts(scores, labels)
    if found is None:
        return []
    thresholds, hits, alarms, num_fake, num_real = found
    rest = zip(thresholds.tolist(), (alarms / num_real).tolist(), (hits / num_fake).tolist(), strict=True)
    return [(float("inf"), 0.0, 0.0), *rest]


def precision_recall_curve(scores: ArrayLike, labels: ArrayLike) -> list[tuple[float, float, float]]:
    """(threshold, recall, precision) at every distinct score, the highest first; [] where a class is missing."""
    found = _counts(scores, labels)
    if found is None:
        return []
    thresholds, hits, alarms, num_fake, _ = found
    return list(zip(thresholds.tolist(), (hits / num_fake).tolist(), (hits / (hits + alarms)).tolist(), strict=True))


def _counts(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int] | None:
    """Distinct scores, descending, with the hits and false alarms at each taken as threshold."""
    values, truth = check_scores(scores, labels)
    num_fake = int((truth == 1).sum())
    if not 0 < num_fake < len(truth):
        return None
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], np.cumsum(truth[order] == 1)
    last_of_tie = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    hits = hits[last_of_tie]
    return ordered[last_of_tie], hits, last_of_tie + 1 - hits, num_fake, len(truth) - num_fake


def _reach(level: np.ndarray, count: int) -> np.ndarray:
    """Of each of `count` thresholds, how many pixels reach it: (T,)."""
    counted = np.bincount(level, minlength=count + 1)
    return np.cumsum(counted[::-1])[::-1][1:]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
