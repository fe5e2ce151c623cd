"""Loss functions: each returns `(sum, count)`, so that accumulation and several devices divide once, by one normaliser.

`sum` is a scalar tensor tied to the graph of every input, even when nothing is supervised (then it is exactly 0);
`count` is how many positions or images it sums over, known from the targets alone. Half precision is computed in
float32, float64 stays. Masks are per image at their own size: (h, w), 0 = authentic pixel, anything else = tampered.
No reduction over the batch and no weights here; those belong to `criterion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.losses.counting import (
    SumCount,
    contrast_anchor_count,
    full_precision,
    has_target,
    image_count,
    is_authentic,
    is_mixed,
    is_tampered,
    label_count,
    paired,
    require,
    text_count,
    zero_of,
)
from finetune.losses.distance import signed_distance
from finetune.special_tokens import IGNORE_INDEX

DICE_SMOOTH = 1e-5
"""Added to numerator and denominator of the soft Dice (monai's `smooth_nr = smooth_dr = 1e-5`)."""

_NORM_EPS = 1e-4
"""Shortest feature vector that is scaled to unit length; bounds the gradient of an all-zero feature."""


def text_cross_entropy(logits: Tensor, targets: Tensor) -> SumCount:
    """Next-token cross-entropy, summed over the supervised positions.

    Args:
        logits: (K, V) float; row i predicts `targets[i]` (already shifted).
        targets: (K,) int64 in [0, V) or -100 for a position that supervises nothing.

    Returns:
        Sum of -log p in nats, and the number of targets that are not -100.
    """
    require(logits.ndim == 2 and targets.shape == logits.shape[:1], "logits (K, V) and targets (K,)", logits, targets)
    total = F.cross_entropy(
        full_precision(logits), targets, ignore_index=IGNORE_INDEX, reduction="sum"
    )  # 0 where none is left
    return total, text_count(targets)


def focal_loss(
    cls_logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float | None = None, pos_weight: float = 1.0
) -> SumCount:
    """Binary focal loss `-alpha_t (1 - p_t)^gamma log p_t`, summed over the labelled images.

    Args:
        cls_logits: (N,) float, positive = tampered.
        labels: (N,) integer in {0, 1, -100}; -100 = unlabelled.
        gamma: focusing exponent >= 0; 0 gives plain binary cross-entropy.
        alpha: weight of the tampered class, 1 - alpha that of the real one; None weights both by 1.
        pos_weight: further factor > 0 on tampered images, as in `binary_cross_entropy_with_logits`.

    Returns:
        Sum over labelled rows, and their number (not weighted, so the loss grows with `pos_weight`).

    Source: Lin et al. 2017 (RetinaNet). Equals `monai.losses.FocalLoss(gamma=gamma, alpha=alpha, use_softmax=False)`.
    """
    require(cls_logits.ndim == 1 and labels.shape == cls_logits.shape, "cls_logits and labels (N,)", cls_logits, labels)
    labels = labels.to(cls_logits.device)
    is_labelled = labels != IGNORE_INDEX
    logits = full_precision(cls_logits)[is_labelled]  # (n,)
    targets = labels[is_labelled].to(logits.dtype)  # (n,)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    log_one_minus_pt = F.logsigmoid(-logits * (2 * targets - 1))  # log space: finite gradient for every gamma
    loss = (gamma * log_one_minus_pt).exp() * cross_entropy
    if alpha is not None:
        loss = (targets * alpha + (1 - targets) * (1 - alpha)) * loss
    loss = (targets * pos_weight + (1 - targets)) * loss
    return loss.sum(), label_count(labels)


def dice_loss(mask_logits: Sequence[Tensor], mask_targets: Sequence[Tensor | None]) -> SumCount:
    """Soft Dice loss `1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s)` per image, on tampered images only.

    On an authentic image the Dice loss is about 1 whatever is predicted, so it would only add noise there;
    `authentic_pixel_loss` takes those images.

    Args:
        mask_logits: per image (h, w) float.
        mask_targets: per image (h, w) integer or bool, or None for an image without pixel target.

    Returns:
        Sum over images with at least one tampered pixel, each in [0, 1], and the number of these images.

    Source: Milletari et al. 2016 without squares; equals `monai.losses.DiceLoss(sigmoid=True, smooth_nr=1e-5,
    smooth_dr=1e-5)` image by image.
    """
    total = zero_of(*mask_logits)
    for logits, target in paired(mask_logits, mask_targets, is_tampered):
        scores = full_precision(logits).sigmoid()  # (h, w)
        truth = target.to(scores)  # (h, w)
        overlap = (scores * truth).sum()
        total = total + 1 - (2 * overlap + DICE_SMOOTH) / (scores.sum() + truth.sum() + DICE_SMOOTH)
    return total, image_count(mask_targets, is_tampered)


def boundary_loss(mask_logits: Sequence[Tensor], mask_targets: Sequence[Tensor | None]) -> SumCount:
    """Boundary loss: mean over pixels of score x signed distance to the true border, over the image diagonal.

    Far-off false positives cost most and deep hits earn most. The value is negative for a good mask (down to minus the
    mean depth of the true region); the original grows with resolution, divided by the diagonal it does not.

    Args:
        mask_logits: per image (h, w) float.
        mask_targets: per image (h, w) integer or bool, or None.

    Returns:
        Sum over images with both tampered and authentic pixels, each in (-0.5, 1), and the number of these images.

    Source: Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation"; scale is ours.
    """
    total = zero_of(*mask_logits)
    for logits, target in paired(mask_logits, mask_targets, is_mixed):
        scores = full_precision(logits).sigmoid()  # (h, w)
        distance = signed_distance(target).to(scores)  # (h, w)
        diagonal = float(np.hypot(*target.shape))
        total = total + (scores * distance).mean() / diagonal
    return total, image_count(mask_targets, is_mixed)


def authentic_pixel_loss(mask_logits: Sequence[Tensor], mask_targets: Sequence[Tensor | None]) -> SumCount:
    """Mean over pixels of the cross-entropy against "authentic" (`-log(1 - p)`), on authentic images only.

    Args:
        mask_logits: per image (h, w) float; every gradient entry is positive, so descent lowers the map.
        mask_targets: per image (h, w) integer or bool, or None.

    Returns:
        Sum over images whose target is all zero, each >= 0, and the number of these images.
    """
    total = zero_of(*mask_logits)
    for logits, _ in paired(mask_logits, mask_targets, is_authentic):
        total = total + F.softplus(full_precision(logits)).mean()
    return total, image_count(mask_targets, is_authentic)


def mask_bce(mask_logits: Sequence[Tensor], mask_targets: Sequence[Tensor | None], pos_weight: float = 1.0) -> SumCount:
    """Binary cross-entropy per image, mean over its pixels, on every image with a pixel target.

    Args:
        mask_logits: per image (h, w) float.
        mask_targets: per image (h, w) integer or bool, or None.
        pos_weight: factor > 0 on the term of tampered pixels.

    Returns:
        Sum over images with a target, and their number.
    """
    total = zero_of(*mask_logits)
    for logits, target in paired(mask_logits, mask_targets, has_target):
        full = full_precision(logits)
        weight = full.new_tensor(pos_weight)
        total = total + F.binary_cross_entropy_with_logits(full, target.to(full), pos_weight=weight)
    return total, image_count(mask_targets, has_target)


def evidence_loss(mask_logits: Sequence[Tensor], labels: Tensor, share: float = 0.02) -> SumCount:
    """The verdict recomputed from the map alone: cross-entropy of the label against the map's strongest pixels.

    `z = mean of the ceil(share * h * w) largest logits`, loss `-log sigmoid(z)` for a tampered image and
    `-log sigmoid(-z)` for a real one. It ties the map to the verdict and needs no mask, so images with a label only
    train the map too. Only the chosen pixels get a gradient.

    Args:
        mask_logits: per image (h, w) float.
        labels: (M,) integer in {0, 1, -100}, one per map; -100 takes no part.
        share: of the pixels, in (0, 1].

    Returns:
        Sum over labelled maps, each >= 0, and their number.

    Source: top-k pooling of weakly supervised localisation (Durand et al. 2016, WILDCAT).
    """
    require(labels.ndim == 1 and len(labels) == len(mask_logits), "one label per map", *mask_logits, labels)
    total = zero_of(*mask_logits)
    for logits, label in zip(mask_logits, labels.tolist(), strict=True):
        if label != IGNORE_INDEX:
            strongest = full_precision(logits).flatten().topk(max(1, math.ceil(share * logits.numel()))).values  # (k,)
            total = total + F.softplus(strongest.mean() * (1 - 2 * label))
    return total, label_count(labels)


def sparsity_loss(mask_logits: Sequence[Tensor], mask_targets: Sequence[Tensor | None]) -> SumCount:
    """Mean score of the map, `mean(sigmoid(logit))`, on authentic images only: their map should be empty.

    An L1 norm of the map. Against `authentic_pixel_loss` its gradient p (1 - p) / (h w) fades where a pixel is surely
    alarmed, so it clears faint haze and leaves a few confident pixels to the other terms.

    Args:
        mask_logits: per image (h, w) float.
        mask_targets: per image (h, w) integer or bool, or None.

    Returns:
        Sum over images whose target is all zero, each in [0, 1], and the number of these images.
    """
    total = zero_of(*mask_logits)
    for logits, _ in paired(mask_logits, mask_targets, is_authentic):
        total = total + full_precision(logits).sigmoid().mean()
    return total, image_count(mask_targets, is_authentic)


def region_contrast(
    features: Sequence[Tensor],
    mask_targets: Sequence[Tensor | None],
    temperature: float = 0.1,
    max_anchors: int = 256,
) -> SumCount:
    """InfoNCE between the cells of one image: authentic cells pull together, tampered cells are their negatives.

    "Tampered" is relative to its own image, so each image is contrasted with itself only. The mask is averaged down to
    the feature grid: a cell above 0.5 is tampered, at exactly 0 authentic, in between it is dropped. An image whose
    grid keeps no tampered or fewer than two authentic cells adds 0 and still counts, so that the count follows from
    the targets alone. Formula: `_info_nce`.

    Args:
        features: per image (C, h, w) float; scaled to unit length per cell here.
        mask_targets: per image (H, W) integer or bool, of any size, or None.
        temperature: > 0, divides the cosine.
        max_anchors: most authentic, and most tampered, cells of one image; taken at even strides, without randomness.

    Returns:
        Sum over images of the mean loss per positive pair (>= 0), and the number of images with both kinds of pixel.

    Source: InfoNCE of van den Oord et al. 2018; image by image as in FOCAL, Wu et al. 2023.
    """
    total = zero_of(*features)
    for grid, target in zip(features, mask_targets, strict=True):
        if not is_mixed(target):
            continue
        assert target is not None
        tampered_share = _tampered_share(target, grid).flatten()
        cells = full_precision(grid).flatten(1).T  # (h w, C)
        authentic = _evenly(torch.nonzero(tampered_share == 0).flatten(), max_anchors)
        tampered = _evenly(torch.nonzero(tampered_share > 0.5).flatten(), max_anchors)
        if len(authentic) > 1 and len(tampered) > 0:
            total = total + _info_nce(cells[authentic], cells[tampered], temperature).mean()
    return total, image_count(mask_targets, is_mixed)


def operation_loss(
    operation_logits: Sequence[Tensor], operation_maps: Sequence[Tensor | None], authentic_weight: float = 0.3
) -> SumCount:
    """Cross-entropy of the kind of edit at every cell: mean over cells of `-w log p(kind)`, image by image.

    The map is averaged down to the grid: a cell of which at least half is tampered has the operation that covers most
    of it, every other one is authentic (class 0). Where an edit is too thin for any such cell, the cells it covers most
    have its operation.

    Args:
        operation_logits: per image (1 + K, h, w) float.
        operation_maps: per image (H, W) integer, of any size: 0 = authentic, 1 to K the operation of the pixel, -100
            one that is not known; or None, which takes no part.
        authentic_weight: w >= 0 of authentic cells; it is 1 for the others, 0 where the operation is not known.

    Returns:
        Sum over images of these means, each >= 0, and the number of images with a map.

    Raises:
        ValueError: an operation above K.
    """
    require(len(operation_maps) == len(operation_logits), "one target per map", *operation_logits)
    total = zero_of(*operation_logits)
    for logits, target in zip(operation_logits, operation_maps, strict=True):
        if target is None:
            continue
        cells = _operation_cells(target.to(logits.device), logits)[None]  # (1, h, w)
        if (highest := int(cells.max())) >= len(logits):
            raise ValueError(f"operation {highest}, but the head tells {len(logits) - 1} operations apart")
        losses = F.cross_entropy(full_precision(logits)[None], cells, ignore_index=IGNORE_INDEX, reduction="none")
        total = total + torch.where(cells == 0, authentic_weight * losses, losses).mean()
    return total, image_count(operation_maps, has_target)


def image_contrast(features: Tensor, labels: Tensor, temperature: float = 0.1) -> SumCount:
    """Supervised InfoNCE between the images of a batch: real images pull together, tampered ones are their negatives.

    The value depends on the batch's composition: it is 0 with count 0 unless the batch (of this device) holds at least
    two real and one tampered image, and more negatives make it larger. Compare it only at one batch size.

    Args:
        features: (N, D) float; scaled to unit length here.
        labels: (N,) integer in {0, 1, -100}; -100 takes no part.
        temperature: > 0, divides the cosine.

    Returns:
        Sum over anchors (real images) of the mean over their positives, and the number of anchors.

    Source: pairs of Khosla et al. 2020 restricted to real anchors, NT-Xent denominator. With tampered images labelled
    each as its own class, the mean equals `pytorch_metric_learning.losses.NTXentLoss(temperature)`.
    """
    require(features.ndim == 2 and labels.shape == features.shape[:1], "features (N, D), labels (N,)", features, labels)
    labels = labels.to(features.device)
    total, count = zero_of(features), contrast_anchor_count(labels)
    if count:
        vectors = full_precision(features)
        total = total + _info_nce(vectors[labels == 0], vectors[labels == 1], temperature).sum()
    return total, count


def _tampered_share(target: Tensor, grid: Tensor) -> Tensor:
    """Mask (H, W) -> (1, h, w): tampered share of each cell of a grid (..., h, w), on its device."""
    return F.adaptive_avg_pool2d((target.to(grid.device) != 0).float()[None], grid.shape[-2:])


def _operation_cells(operations: Tensor, grid: Tensor) -> Tensor:
    """Map (H, W) of operations -> (h, w) int64: the operation of each cell of a grid (..., h, w), 0 or -100."""
    pixels_of = torch.bincount(operations.flatten().int() - IGNORE_INDEX)  # a pass, where `unique` sorts
    found = pixels_of.nonzero().flatten() + IGNORE_INDEX
    found = found[found != 0]  # (E,)
    share = _tampered_share(operations, grid)[0]  # (h, w)
    if not len(found):
        return torch.zeros_like(share, dtype=torch.long)
    areas = torch.cat([_tampered_share(operations == one, grid) for one in found])  # (E, h, w)
    cells = found[areas.argmax(dim=0)].masked_fill(share < share.max().clamp(max=0.5), 0)
    for one, area in zip(found, areas, strict=True):  # beside a large edit, one too thin for any cell
        if not (cells == one).any():
            free = area * (cells == 0)
            cells[(free > 0) & (free == free.max())] = one
    return cells


def _info_nce(anchors: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Per anchor a, mean over p != a of `-log(e^{s_ap} / (e^{s_ap} + sum_n e^{s_an}))` with s = cosine / temperature.

    Each positive stands alone against the negatives (NT-Xent), so positives do not repel one another.

    Args:
        anchors: (A, C), A >= 2, all positives of each other.
        negatives: (B, C), B >= 1.

    Returns:
        (A,) losses >= 0.
    """
    anchors, negatives = F.normalize(anchors, dim=1, eps=_NORM_EPS), F.normalize(negatives, dim=1, eps=_NORM_EPS)
    positive = anchors @ anchors.T / temperature  # (A, A)
    negative = (anchors @ negatives.T / temperature).logsumexp(dim=1, keepdim=True)  # (A, 1)
    losses = F.softplus(negative - positive)  # (A, A): -log sigmoid(s_ap - log sum_n e^{s_an})
    others = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    return losses.masked_fill(~others, 0.0).sum(dim=1) / (len(anchors) - 1)


def _evenly(indices: Tensor, most: int) -> Tensor:
    """At most `most` of the indices, at even strides from the first one."""
    if len(indices) <= most:
        return indices
    return indices[torch.arange(most, device=indices.device) * len(indices) // most]
