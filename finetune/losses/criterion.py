"""Weighted sum of the loss terms: which output and which target each term reads, and one division at the end.

Knows field names, not formulas (`functional.py`) and not how often a step is accumulated (the trainer passes the
normalisers). A new loss is a pure function, one `TERMS` entry and a weight in `LossConfig` that defaults to 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.config import LossConfig
from finetune.losses import counting, functional
from finetune.special_tokens import IGNORE_INDEX

logger = logging.getLogger(__name__)


class Term(NamedTuple):
    """One loss term of one batch: differentiable `sum` over `count` positions or images, and its configured weight."""

    sum: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    weight: float


@dataclass(frozen=True)
class TermFunction:
    """How one term reads model output and batch.

    Args:
        output: field of the model's outputs that it needs; the term is left out where that is None.
        compute: (config, outputs, batch) -> (sum, count).
        count: batch -> count, from targets alone; equal to the count of `compute`.
    """

    output: str
    compute: Callable[[LossConfig, Any, Mapping[str, Any]], counting.SumCount]
    count: Callable[[Mapping[str, Any]], int]


def _text_targets(batch: Mapping[str, Any]) -> Tensor:
    targets = batch.get("text_targets")
    return torch.zeros(0, dtype=torch.long) if targets is None else targets


def _labels(batch: Mapping[str, Any]) -> Tensor:
    """Label of each row of `cls_logits`, (N,)."""
    return _looked_up(batch, "cls_image_index", "cls_labels")


def _map_labels(batch: Mapping[str, Any]) -> Tensor:
    """Label of the image of each map of `mask_logits`, (M,)."""
    return _looked_up(batch, "mask_image_index", "cls_labels")


def _looked_up(batch: Mapping[str, Any], index_key: str, labels_key: str) -> Tensor:
    """Labels (images,) at an index (M,) -> (M,); -100 where the batch has no labels, empty where it has no index."""
    index, labels = batch.get(index_key), batch.get(labels_key)
    if index is None:
        return torch.zeros(0, dtype=torch.long)
    return torch.full_like(index, IGNORE_INDEX) if labels is None else labels[index.to(labels.device)]


def _masks(batch: Mapping[str, Any], key: str = "mask_targets") -> list[Tensor | None]:
    """Pixel target of the image of each map of `mask_logits`."""
    index, masks = batch.get("mask_image_index"), batch.get(key)
    if index is None:
        return []
    return [None if masks is None else masks[i] for i in index.tolist()]


def _operations(batch: Mapping[str, Any]) -> list[Tensor | None]:
    """Operation at each pixel, of the image of each map of `operation_logits`."""
    return _masks(batch, "operation_maps")


TERMS: dict[str, TermFunction] = {
    "text": TermFunction(
        "logits",
        lambda config, out, batch: functional.text_cross_entropy(
            out.logits, _text_targets(batch).to(out.logits.device)
        ),
        lambda batch: counting.text_count(_text_targets(batch)),
    ),
    "focal": TermFunction(
        "cls_logits",
        lambda config, out, batch: functional.focal_loss(
            out.cls_logits, _labels(batch), config.focal_gamma, config.focal_alpha, config.cls_pos_weight
        ),
        lambda batch: counting.label_count(_labels(batch)),
    ),
    "dice": TermFunction(
        "mask_logits",
        lambda config, out, batch: functional.dice_loss(out.mask_logits, _masks(batch)),
        lambda batch: counting.image_count(_masks(batch), counting.is_tampered),
    ),
    "boundary": TermFunction(
        "mask_logits",
        lambda config, out, batch: functional.boundary_loss(out.mask_logits, _masks(batch)),
        lambda batch: counting.image_count(_masks(batch), counting.is_mixed),
    ),
    "authentic": TermFunction(
        "mask_logits",
        lambda config, out, batch: functional.authentic_pixel_loss(out.mask_logits, _masks(batch)),
        lambda batch: counting.image_count(_masks(batch), counting.is_authentic),
    ),
    "bce": TermFunction(
        "mask_logits",
        lambda config, out, batch: functional.mask_bce(out.mask_logits, _masks(batch), config.bce_pos_weight),
        lambda batch: counting.image_count(_masks(batch), counting.has_target),
    ),
    "evidence": TermFunction(
        "mask_logits",
        lambda config, out, batch: functional.evidence_loss(out.mask_logits, _map_labels(batch), config.evidence_share),
        lambda batch: counting.label_count(_map_labels(batch)),
    ),
    "sparsity": TermFunction(
        "mask_logits",
        lambda config, out, batch: functional.sparsity_loss(out.mask_logits, _masks(batch)),
        lambda batch: counting.image_count(_masks(batch), counting.is_authentic),
    ),
    "contrast_region": TermFunction(
        "mask_features",
        lambda config, out, batch: functional.region_contrast(out.mask_features, _masks(batch), config.temperature),
        lambda batch: counting.image_count(_masks(batch), counting.is_mixed),
    ),
    "operation": TermFunction(
        "operation_logits",
        lambda config, out, batch: functional.operation_loss(
            out.operation_logits, _operations(batch), config.operation_authentic_weight
        ),
        lambda batch: counting.image_count(_operations(batch), counting.has_target),
    ),
    "contrast_image": TermFunction(
        "image_features",
        lambda config, out, batch: functional.image_contrast(out.image_features, _labels(batch), config.temperature),
        lambda batch: counting.contrast_anchor_count(_labels(batch)),
    ),
}


class Criterion:
    """Every configured loss term of a batch, each as (sum, count, weight).

    Model outputs (attributes; None or absent where a head is off):
        logits (K, V): row i predicts `text_targets[i]`. cls_logits (N,), image_features (N, D): row i is of image
        `cls_image_index[i]`. mask_logits: list of (h, w); mask_features: list of (C, h', w'); operation_logits: list of
        (1 + K, h', w'); entry i is of image `mask_image_index[i]`.
    Batch (mapping; a missing key supervises nothing):
        text_targets (K,) int64 with -100; cls_labels (images,) in {0, 1, -100}; mask_targets: list (images) of
        (h, w) uint8 or None, each of its logits' shape; operation_maps: list (images) of (h, w) in {0, ..., K, -100} or
        None; cls_image_index (N,) and mask_image_index (M,) int64.

    Args:
        config: weights (a term of weight 0 is not computed) and parameters.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.weights = {name: weight for name in TERMS if (weight := float(getattr(config, name))) != 0}
        self._warned: set[str] = set()

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Term]:
        """The terms with a non-zero weight whose output is there, in the order of `TERMS`.

        Raises:
            ValueError: where outputs and targets disagree in length, shape or order of images.
        """
        self._check_index("cls_image_index", outputs, batch)
        self._check_index("mask_image_index", outputs, batch)
        terms = {}
        for name, weight in self.weights.items():
            term = TERMS[name]
            if getattr(outputs, term.output, None) is None:
                self._warn_once(name, batch)
            else:
                terms[name] = Term(*term.compute(self.config, outputs, batch), weight)
        return terms

    def counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """The count of every term with a non-zero weight, from targets alone; equal to the counts of `__call__`.

        Summed over accumulation steps and devices, these are the normalisers of `total`.
        """
        return {name: TERMS[name].count(batch) for name in self.weights}

    @staticmethod
    def _check_index(field: str, outputs: Any, batch: Mapping[str, Any]) -> None:
        ours, theirs = batch.get(field), getattr(outputs, field, None)
        if ours is not None and theirs is not None and ours.tolist() != theirs.tolist():
            raise ValueError(f"{field}: the batch says {ours.tolist()}, the model's outputs {theirs.tolist()}")

    def _warn_once(self, name: str, batch: Mapping[str, Any]) -> None:
        """Say that a term has a weight and targets but no output; silence would look like a loss of 0."""
        if name not in self._warned and TERMS[name].count(batch):
            self._warned.add(name)
            logger.warning(
                "loss term %r has weight %g and targets, but the model gives no %r: it is left out. "
                "Switch the head on or set loss.%s to 0.",
                name,
                self.weights[name],
                TERMS[name].output,
                name,
            )


def total(
    terms: Mapping[str, Term], normalizers: Mapping[str, int | float] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss `sum over terms of weight * sum / normaliser`, and each term's unweighted mean for the log.

    Args:
        terms: what `Criterion` returned; at least one.
        normalizers: divisor per term, e.g. its count over all accumulation steps and devices; None = its own count.
            A term whose divisor is 0 adds 0 and stays in the graph.

    Returns:
        Scalar loss, and per term the detached scalar `sum / normaliser` (no device synchronisation).

    Raises:
        ValueError: for no term at all.
        KeyError: for a term without its normaliser.
    """
    if not terms:
        raise ValueError("no loss term to add up: every weight is 0 or the model gave none of the outputs they need")
    parts, means = [], {}
    for name, term in terms.items():
        divisor = term.count if normalizers is None else normalizers[name]
        mean = term.sum / divisor if divisor else term.sum * 0
        parts.append(term.weight * mean)
        means[name] = mean.detach()
    loss = parts[0]
    for part in parts[1:]:
        loss = loss + part
    return loss, means
