"""What a loss term counts, known from its targets alone, and what every term shares: precision, empty sums, pairs.

No formula is here; those are in `functional.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from finetune.special_tokens import IGNORE_INDEX

SumCount: TypeAlias = tuple[Tensor, int]
Kind: TypeAlias = Callable[[Tensor | None], bool]


def has_target(target: Tensor | None) -> bool:
    """Whether the image has a pixel target."""
    return target is not None


def is_tampered(target: Tensor | None) -> bool:
    """Whether the target has at least one tampered pixel."""
    return target is not None and bool(target.any())


def is_authentic(target: Tensor | None) -> bool:
    """Whether the target is there and all zero."""
    return target is not None and not is_tampered(target)


def is_mixed(target: Tensor | None) -> bool:
    """Whether the target has both tampered and authentic pixels."""
    return target is not None and is_tampered(target) and not bool(target.all())


def text_count(targets: Tensor) -> int:
    """Number of targets that are not -100."""
    return int((targets != IGNORE_INDEX).sum())


def label_count(labels: Tensor) -> int:
    """Number of images with a label in {0, 1}.

    Raises:
        ValueError: for any other value than 0, 1 and -100.
    """
    is_labelled = labels != IGNORE_INDEX
    if bool((is_labelled & (labels != 0) & (labels != 1)).any()):
        raise ValueError(f"image labels are 0, 1 or {IGNORE_INDEX}, found {sorted(set(labels.tolist()))}")
    return int(is_labelled.sum())


def image_count(mask_targets: Sequence[Tensor | None], kind: Kind) -> int:
    """Number of targets of one kind: `has_target`, `is_tampered`, `is_authentic` or `is_mixed`."""
    return sum(kind(target) for target in mask_targets)


def contrast_anchor_count(labels: Tensor) -> int:
    """Number of anchors of `image_contrast`: the real images, if there are two of them and a tampered one, else 0."""
    real = int((labels == 0).sum())
    return real if real > 1 and bool((labels == 1).any()) else 0


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def zero_of(*tensors: Tensor) -> Tensor:
    """Exactly 0, tied to the graph of every tensor; it adds up no element, so no inf or NaN can leak in."""
    total = torch.zeros(()) if not tensors else full_precision(tensors[0][:0]).sum()
    for tensor in tensors[1:]:
        total = total + full_precision(tensor[:0]).sum()
    return total


def paired(
    mask_logits: Sequence[Tensor], mask_targets: Sequence[Tensor | None], kind: Kind
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, 0/1 target on the logits' device) of the images whose target is of that kind; shapes checked."""
    require(len(mask_logits) == len(mask_targets), "one target per map", *mask_logits)
    for logits, target in zip(mask_logits, mask_targets, strict=True):
        if target is not None and kind(target):
            require(logits.shape == target.shape, "mask_logits and mask_targets of one (h, w)", logits, target)
            yield logits, (target != 0).to(logits.device)


def require(condition: bool, expected: str, *found: Tensor) -> None:
    """Raise a ValueError that shows the shapes found, unless the condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}, found shapes {[tuple(tensor.shape) for tensor in found]}")
