"""Pixel metrics of a tampering map, image by image: tampered images get overlap metrics, authentic ones false alarms.

What a perfect empty prediction on an authentic image scores (0, 1, NaN) differs between libraries, so the two kinds of
image are never averaged together. Plain F1 at a threshold, best-threshold F1 and permuted F1 carry separate names.
A pixel is called tampered when score >= threshold. A missing prediction counts as an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Pair: TypeAlias = tuple[np.ndarray | None, np.ndarray]
"""(H, W) float scores in [0, 1] or None for a missing prediction, and the (H, W) true mask (non-zero = tampered)."""


def pixel_metrics(scores: np.ndarray | None, mask: np.ndarray, threshold: float = 0.5) -> dict[str, float | None]:
    """Overlap metrics of one tampered image.

    Args:
        scores: (H, W) float in [0, 1], or None.
        mask: (H, W), non-zero = tampered; at least one pixel is.
        threshold: for `f1`, `iou` and `dice`.

    Returns:
        `f1`, `iou` at the threshold; `dice`: of binary masks, hence the same number as `f1` under its other name;
        `auc`: pixel AUROC, ties count half (0.5 for a missing prediction), None when no pixel is authentic;
        `f1_best_threshold`: see `best_f1`.

    Raises:
        ValueError: for shapes that differ, scores outside [0, 1] or NaN, or a mask without a tampered pixel.
    """
    values, truth = _check(scores, mask)
    if not truth.any():
        raise ValueError("overlap metrics need a tampered pixel; authentic images go to authentic_metrics")
    called = values >= threshold
    hits, union = int((called & truth).sum()), int((called | truth).sum())
    f1 = 2 * hits / (union + hits)  # union + hits = called + true pixels
    caught, alarmed, thresholds = _cumulative_counts(values, truth)
    return {
        "f1": f1,
        "iou": hits / union,
        "dice": f1,
        "auc": _area_under_roc(caught, alarmed),
        "f1_best_threshold": _best_f1(caught, alarmed, thresholds),
    }


def best_f1(scores: np.ndarray | None, mask: np.ndarray) -> float:
    """Largest F1 over all thresholds t > 0, exact: every distinct score is tried, no grid.

    0 itself is no threshold, so that an all-zero map is an empty prediction (F1 0), not one that marks every pixel.
    An optimistic figure: the threshold is chosen with the true mask in hand.

    Args:
        scores: (H, W) float in [0, 1], or None.
        mask: (H, W), non-zero = tampered; at least one pixel is.
    """
    return _best_f1(*_cumulative_counts(*_check(scores, mask)))


def permuted_f1(scores: np.ndarray | None, mask: np.ndarray, threshold: float = 0.5) -> float:
    """The larger F1 of the thresholded map and of its inverse, as papers report that cannot tell which side is forged.

    Args:
        scores: (H, W) float in [0, 1], or None (an empty map, whose inverse marks every pixel).
        mask: (H, W), non-zero = tampered; at least one pixel is.
        threshold: a pixel is called tampered when score >= threshold.

    Source: Huh et al. 2018; Guillaro et al. 2023 (TruFor) report it apart from plain F1.
    """
    values, truth = _check(scores, mask)
    called = values >= threshold
    return max(_f1(called, truth), _f1(~called, truth))


def localization_metrics(pairs: Sequence[Pair], threshold: float = 0.5) -> dict[str, float | int | None]:
    """Mean of `pixel_metrics` over the tampered images; authentic ones (all-zero mask) are left out.

    Args:
        pairs: per image (scores or None, mask); sizes may differ between images.
        threshold: see `pixel_metrics`.

    Returns:
        `f1`, `iou`, `dice`, `auc`, `f1_best_threshold`, each None without a tampered image, and `n`, their number.
        `auc` is averaged over the images that also have an authentic pixel (None when none has).
    """
    rows = [pixel_metrics(scores, mask, threshold) for scores, mask in pairs if np.any(mask)]
    names = ("f1", "iou", "dice", "auc", "f1_best_threshold")
    result: dict[str, float | int | None] = {name: _mean([row[name] for row in rows]) for name in names}
    return {**result, "n": len(rows)}


def authentic_metrics(
    pairs: Sequence[Pair], threshold: float = 0.5, min_area: float = 0.0
) -> dict[str, float | int | None]:
    """False alarms on authentic images; tampered ones are left out.

    Args:
        pairs: per image (scores or None, mask).
        threshold: a pixel is called tampered when score >= threshold.
        min_area: share of the image in [0, 1) that must be exceeded for a false alarm; 0 = a single pixel is one.

    Returns:
        `false_alarm_rate`: share of authentic images whose called area exceeds `min_area`;
        `false_positive_area`: called share of the image's pixels, averaged over authentic images (each weighs the same,
        whatever its size); both None without an authentic image; `n`: their number.
    """
    areas = []
    for scores, mask in pairs:
        if not np.any(mask):
            values, _ = _check(scores, mask)
            areas.append(float((values >= threshold).mean()))
    return {
        "false_alarm_rate": _mean([float(area > min_area) for area in areas]),
        "false_positive_area": _mean(areas),
        "n": len(areas),
    }


def _check(scores: np.ndarray | None, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (zeros where missing) and boolean mask, both (H, W)."""
    truth = np.asarray(mask) != 0
    values = np.zeros(truth.shape, dtype=np.float32) if scores is None else np.asarray(scores)
    if truth.ndim != 2 or values.shape != truth.shape or not truth.size:
        raise ValueError(f"scores and mask are one (H, W), found {values.shape} and {truth.shape}; resize scores first")
    if not (values.min() >= 0 and values.max() <= 1):  # NaN fails
        raise ValueError("pixel scores lie in [0, 1]; found NaN or a value outside")
    return values, truth


def _f1(called: np.ndarray, truth: np.ndarray) -> float:
    denominator = int(called.sum()) + int(truth.sum())
    return 2 * int((called & truth).sum()) / denominator if denominator else 0.0


def _cumulative_counts(values: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and false positives at every distinct score taken as threshold, (T,) each, and these scores, descending."""
    order = np.argsort(values, axis=None)[::-1]
    ordered, hits = values.ravel()[order], truth.ravel()[order]
    last_of_tie = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), ordered.size - 1)  # (T,)
    caught = np.cumsum(hits)[last_of_tie]
    return caught, last_of_tie + 1 - caught, ordered[last_of_tie]


def _area_under_roc(caught: np.ndarray, alarmed: np.ndarray) -> float | None:
    """Trapezoids between distinct scores, sklearn's `roc_auc_score`."""
    if not caught[-1] or not alarmed[-1]:
        return None
    true_rate, false_rate = np.append(0, caught / caught[-1]), np.append(0, alarmed / alarmed[-1])
    return float(np.trapezoid(true_rate, false_rate))


def _best_f1(caught: np.ndarray, alarmed: np.ndarray, thresholds: np.ndarray) -> float:
    f1 = 2 * caught / (caught + alarmed + caught[-1])  # (T,); caught[-1] = all true pixels
    return float(f1[thresholds > 0].max(initial=0.0))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
