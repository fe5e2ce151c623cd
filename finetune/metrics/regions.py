"""Metrics of candidate regions: each region against its label, each image by whether any of its regions is abnormal.

Pure functions over scores; where a score comes from and how a threshold is chosen is the caller's. Undefined values are
None, never a filler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.metrics.classification import check_scores, image_metrics


@dataclass(frozen=True)
class ScoredImage:
    """The regions of one image.

    Args:
        scores: region id -> score in [0, 1] that it is abnormal.
        positive_region_ids: ids of the regions that are; each of them has a score.
        true_types: id -> type of the positive ones.
        pred_types: id -> type that the model names, where it names one.
    """

    scores: Mapping[str, float]
    positive_region_ids: Sequence[str]
    true_types: Mapping[str, str]
    pred_types: Mapping[str, str]

    def __post_init__(self) -> None:
        unknown = [name for name in self.positive_region_ids if name not in self.scores]
        if unknown:
            raise ValueError(f"positive regions without a score: {unknown}; scored are {list(self.scores)}")


def region_metrics(images: Sequence[ScoredImage], threshold: float = 0.5) -> dict[str, Any]:
    """Metrics of regions and of images at one threshold; a region is called abnormal when its score reaches it.

    Returns:
        `roi`: `binary_metrics` over all regions. `image`: the same over images with at least one region; an image is
        positive if any of its regions is, its score is the highest of its regions'. `types`: type -> `regions`,
        `recall` (called abnormal, whatever the type named) and `named` (share of these that name the right type, None
        without any). `confusion`: true type or `normal` -> what the region was called -> count; called abnormal
        without a type it counts under `abnormal`.

    Raises:
        ValueError: a score outside [0, 1].
    """
    scores, labels = all_regions(images)
    filled = [image for image in images if image.scores]
    best = [max(image.scores.values()) for image in filled]
    confusion = _confusion(images, threshold)
    return {
        "threshold": threshold,
        "roi": binary_metrics(scores, labels, threshold),
        "image": binary_metrics(best, [int(bool(image.positive_region_ids)) for image in filled], threshold),
        "types": {kind: _of_type(kind, row) for kind, row in confusion.items() if kind != "normal"},
        "confusion": confusion,
    }


def binary_metrics(scores: Sequence[float], labels: Sequence[int], threshold: float) -> dict[str, float | int | None]:
    """Precision, recall and F1 of class 1 at a threshold, and what needs none.

    Returns:
        `precision`: None where nothing is called positive. `recall`, `f1`: None without a positive. `auroc`,
        `average_precision`: None where a class is missing. `n`, `n_positive`; `all_positive_f1`: F1 of calling
        everything positive, the rule to be better than.

    Raises:
        ValueError: as `check_scores`.
    """
    values, truth = check_scores(list(scores), list(labels))
    is_called = values >= threshold
    hits, called, positive = int((is_called & (truth == 1)).sum()), int(is_called.sum()), int((truth == 1).sum())
    ranked = image_metrics(values, truth, threshold)
    return {
        "precision": hits / called if called else None,
        "recall": hits / positive if positive else None,
        "f1": ranked["f1"],
        "auroc": ranked["auroc"],
        "average_precision": ranked["average_precision"],
        "n": len(truth),
        "n_positive": positive,
        "all_positive_f1": 2 * positive / (positive + len(truth)) if positive else None,
    }


def sweep(images: Sequence[ScoredImage], thresholds: Sequence[float] | None = None) -> tuple[float, dict[float, float]]:
    """The threshold with the best region F1, and the F1 at each; the lowest of equally good ones.

    For the validation split; its choice is then fixed for test.

    Args:
        thresholds: default 0.40, 0.42, ..., 0.80.

    Raises:
        ValueError: no positive region, so that no F1 is defined.
    """
    steps = [round(0.4 + 0.02 * step, 2) for step in range(21)] if thresholds is None else list(thresholds)
    scores, labels = all_regions(images)
    if not any(labels):
        raise ValueError(f"no positive region among {len(labels)}; a threshold cannot be chosen")
    found = {step: float(binary_metrics(scores, labels, step)["f1"] or 0.0) for step in steps}
    return min(steps, key=lambda step: (-found[step], step)), found


def all_regions(images: Sequence[ScoredImage]) -> tuple[list[float], list[int]]:
    """Score and label, 0 or 1, of every region of all images."""
    scores = [score for image in images for score in image.scores.values()]
    return scores, [int(name in image.positive_region_ids) for image in images for name in image.scores]


def _confusion(images: Sequence[ScoredImage], threshold: float) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for image in images:
        positive = set(image.positive_region_ids)
        for name, score in image.scores.items():
            truth = image.true_types.get(name, "abnormal") if name in positive else "normal"
            called = image.pred_types.get(name, "abnormal") if score >= threshold else "normal"
            row = table.setdefault(truth, {})
            row[called] = row.get(called, 0) + 1
    return {truth: dict(sorted(row.items())) for truth, row in sorted(table.items())}


def _of_type(kind: str, row: Mapping[str, int]) -> dict[str, float | int | None]:
    num, called = sum(row.values()), sum(count for name, count in row.items() if name != "normal")
    return {"regions": num, "recall": called / num, "named": row.get(kind, 0) / called if called else None}
