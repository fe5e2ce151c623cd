"""Evaluation during training: loss terms, and head metrics per class that no reference answer can leak into."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from finetune.data.collator import MODEL_KEYS
from finetune.errors import TrainingDivergedError
from finetune.losses.criterion import Criterion
from finetune.metrics.calibration import Calibration, calibrate
from finetune.metrics.classification import image_metrics
from finetune.metrics.localization import pixel_metrics
from finetune.special_tokens import IGNORE_INDEX

METRICS = (
    "loss", "score", "auroc", "accuracy", "balanced_accuracy", "recall_real", "recall_fake", "f1", "pixel_f1",
    "pixel_iou", "false_positive_area",
)  # fmt: skip
"""What an evaluation can give, besides `loss_<term>`; a metric without the images it needs is left out."""


class EvaluationState:
    """Sums and per-image results of one evaluation on one rank."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.logits: list[float] = []
        self.scores: list[float] = []
        self.labels: list[int] = []
        self.groups: list[str] = []
        self.pixel_f1: list[float] = []
        self.pixel_iou: list[float] = []
        self.false_positive_area: list[float] = []

    def add(self, other: EvaluationState) -> None:
        """Take in the results of another batch or rank."""
        for name in other.counts:
            self.sums[name] += other.sums[name]
            self.counts[name] += other.counts[name]
        for name in ("logits", "scores", "labels", "groups", "pixel_f1", "pixel_iou", "false_positive_area"):
            getattr(self, name).extend(getattr(other, name))

    def metrics(self, weights: dict[str, float]) -> dict[str, float]:
        """Flat numbers for the log; `score` is what the best checkpoint is chosen by.

        score: mean of image AUROC and pixel F1 at 0.5 where they exist, else minus the loss.
        """
        terms = {name: self.sums[name] / count for name, count in self.counts.items() if count}
        result = {f"loss_{name}": value for name, value in terms.items()}
        result["loss"] = sum(weights.get(name, 0.0) * value for name, value in terms.items())
        if self.labels:
            image = image_metrics(np.array(self.scores), np.array(self.labels))
            for name in ("auroc", "accuracy", "balanced_accuracy", "recall_real", "recall_fake", "f1"):
                if image.get(name) is not None:
                    result[name] = float(image[name])  # type: ignore[arg-type]
        if self.pixel_f1:
            result["pixel_f1"] = float(np.mean(self.pixel_f1))
            result["pixel_iou"] = float(np.mean(self.pixel_iou))
        if self.false_positive_area:
            result["false_positive_area"] = float(np.mean(self.false_positive_area))
        goals = [result[name] for name in ("auroc", "pixel_f1") if name in result]
        result["score"] = sum(goals) / len(goals) if goals else -result["loss"]
        return result

    def calibration(self) -> Calibration | None:
        """How these images' scores become probabilities; None without images of both classes, or with a logit that is
        not finite."""
        if set(self.labels) != {0, 1} or not np.isfinite(self.logits).all():
            return None
        return calibrate(self.logits, self.labels, groups=self.groups or None)


def forward(model: Any, batch: dict[str, Any]) -> Any:
    """The model's outputs for a collator's batch; no key-value cache, which nothing here would read."""
    keys = (*MODEL_KEYS, "vision_offsets", "tower_maps")  # of an attacked batch; of one with cached features
    return model(**{key: batch[key] for key in keys if key in batch}, use_cache=False)


@torch.no_grad()
def evaluate_losses(model: Any, criterion: Criterion, batch: dict[str, Any], state: EvaluationState) -> Any:
    """Teacher-forced loss terms of one batch; returns the outputs.

    Raises:
        TrainingDivergedError: a term is not finite; names the records.
    """
    outputs = forward(model, batch)
    for name, term in criterion(outputs, batch).items():
        value = float(term.sum)
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"in evaluation the loss term '{name}' is {value} on records {batch.get('record_ids')}; lower the "
                "learning rate, or check these records with forensics doctor"
            )
        state.sums[name] += value
        state.counts[name] += int(term.count)
    return outputs


def collect_heads(
    outputs: Any, batch: dict[str, Any], state: EvaluationState, groups: Sequence[str] | None = None
) -> None:
    """Per-image results of the heads.

    Args:
        outputs: of a batch whose head states cannot have read an answer.
        groups: of each image of the batch, what images of one origin share; None: not known of any.
    """
    if outputs.cls_logits is not None:
        logits = outputs.cls_logits.float()
        scores = logits.sigmoid().tolist()
        for logit, score, image in zip(logits.tolist(), scores, outputs.cls_image_index.tolist(), strict=True):
            label = int(batch["cls_labels"][image])
            if label != IGNORE_INDEX:
                state.logits.append(logit)
                state.scores.append(score)
                state.labels.append(label)
                if groups is not None:
                    state.groups.append(groups[image])
    if outputs.mask_logits is None:
        return
    for logits, image in zip(outputs.mask_logits, outputs.mask_image_index.tolist(), strict=True):
        target = batch["mask_targets"][image]
        if target is None:
            continue
        scores = logits.float().sigmoid().cpu().numpy()
        mask = target.cpu().numpy() > 0
        if mask.any():
            result = pixel_metrics(scores, mask)
            state.pixel_f1.append(float(result["f1"] or 0.0))
            state.pixel_iou.append(float(result["iou"] or 0.0))
        else:
            state.false_positive_area.append(float((scores >= 0.5).mean()))
