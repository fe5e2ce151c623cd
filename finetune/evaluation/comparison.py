"""The classical baselines on the evaluated images, with thresholds fitted on other images where some are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.config import SourceConfig
from finetune.data.dataset import read_sources, spread
from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.evaluation.baselines import Thresholds, fit_baselines, run_baselines
from finetune.evaluation.results import EvaluationResults
from finetune.metrics.classification import image_metrics
from finetune.schema import Record

NUM_FIT_IMAGES = 200


def fitted_thresholds(fit_data: str | None) -> dict[str, Thresholds] | None:
    """Thresholds of every baseline, fitted on evenly spread images of a data file; None without one.

    Raises:
        DataFormatError: the file, or an image or mask of these, cannot be used.
    """
    if fit_data is None:
        return None
    images, masks, labels = _labelled(spread(read_sources([SourceConfig(fit_data)], "train"), NUM_FIT_IMAGES))
    return fit_baselines(images, masks, labels)


def compare_baselines(
    records: Sequence[Record], thresholds: Mapping[str, Thresholds] | None
) -> tuple[dict[str, Any], dict[str, tuple[list[int], list[float]]], dict[str, Any]]:
    """Metrics, score sets and bootstrap intervals of every baseline.

    Args:
        thresholds: see `fitted_thresholds`; without them those that are documented.
    """
    gathered: dict[str, EvaluationResults] = {}
    for record in records:
        images, masks, labels = _labelled([record])
        if not images:
            continue
        for name, scores in run_baselines(images, masks, labels, thresholds).items():
            results = gathered.setdefault(name, EvaluationResults())
            results.scores += [float(score) for score in scores.image_scores]
            results.labels += labels
            for pixel_map, mask in zip(scores.mask_scores, masks, strict=True):
                results.add_mask(pixel_map, mask)
    metrics: dict[str, Any] = {}
    score_sets: dict[str, tuple[list[int], list[float]]] = {}
    intervals: dict[str, Any] = {}
    for name, results in gathered.items():
        metrics[name] = {
            "image": dict(image_metrics(np.array(results.scores), np.array(results.labels))),
            "localization": results.localization(),
            "authentic": results.false_alarms(),
        }
        score_sets[name] = results.score_set()
        intervals |= results.intervals(prefix=f"baselines.{name}.")
    return metrics, score_sets, intervals


def _labelled(records: Sequence[Record]) -> tuple[list[np.ndarray], list[np.ndarray | None], list[int]]:
    images, masks, labels = [], [], []
    for record in records:
        for image, target in zip(record.images, record.targets, strict=True):
            if target.label is None:
                continue
            picture = np.asarray(load_image(image, record.id, record.source))
            images.append(picture)
            masks.append(load_mask(target, picture.shape[:2], record.id, record.source))
            labels.append(target.label)
    return images, masks, labels
