"""Fixed maps of small patches that occur twice in a picture to the last bit.

A sensor's noise never repeats itself: in a picture that was not compressed, two textured patches of equal levels are
one patch and its copy. Content-aware fill, cloning by whole pixels and some inpainting leave many, an untouched camera
picture none; zero-tolerance block matching, the oldest search for copies (Fridrich, Soukal, Lukas 2003). Compression,
noise and resampling of the finished picture remove the trace, and a coarse compression makes equal patches of its own;
`self_similarity` is the search that tolerates both. No parameters, no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.models.box_means import block_mean
from finetune.models.forensic_statistics import STRIDE

SIDE = 4
"""Of the patches, in pixels. Of 3x3 levels of grey some agree by chance in half of the authentic pictures."""
MOST_COPIES = 5
"""A patch that occurs more often belongs to a pattern, or to what compression made of a smooth place."""
REPEAT_CHANNELS = 2
_LEAST_VARIANCE = 0.64
"""Of a patch's levels, averaged over R, G and B: flat and clipped places repeat themselves in every picture."""
_BASE = -7046029254386353131
"""Odd factor of the polynomial hash (2^64 over the golden ratio); all arithmetic is modulo 2^64."""
_BUCKET_BITS = 18


@torch.no_grad()
def exact_repeats(images: Tensor) -> Tensor:
    """Where patches of equal levels stand elsewhere in the same picture.

    Args:
        images: (n, 3, H, W) RGB in [0, 255], rounded to whole levels; H and W multiples of 4.

    Returns:
        (n, REPEAT_CHANNELS, H/4, W/4) float32 in [0, 1] on the device of `images`: the share of a cell's pixels that
        lie in a textured patch that occurs 2 to `MOST_COPIES` times, then the share of those in a patch that occurs
        more often.
    """
    levels = images.round().long()
    counts = torch.stack([_occurrences(keys) for keys in _patch_keys(levels)])[:, None]
    counts = counts * (_variance(levels) > _LEAST_VARIANCE)
    seldom, often = (counts > 1) & (counts <= MOST_COPIES), counts > MOST_COPIES
    return block_mean(_covered(torch.cat([seldom, often], dim=1)), STRIDE)


def _patch_keys(levels: Tensor) -> Tensor:
    """(n, 3, H, W) int64 -> (n, H-3, W-3) int64: a hash of the patch whose upper left corner is there."""
    colour = reduce(lambda key, value: key * _BASE + value, levels.unbind(dim=1))
    rows = _windows(colour, dim=2, fold=_fold(3))
    return _windows(rows, dim=1, fold=_fold(3 * SIDE))


def _fold(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of the hash over values that are themselves hashes of `power` levels."""
    factor = pow(_BASE, power, 2**64)
    signed = factor - 2**64 if factor >= 2**63 else factor
    return lambda key, value: key * signed + value


def _occurrences(keys: Tensor) -> Tensor:
    """How often each value of (h, w) stands in it. Most stand alone in their bucket; only the others are sorted."""
    flat = keys.flatten()
    buckets = (flat >> (64 - _BUCKET_BITS)) & (2**_BUCKET_BITS - 1)
    shared = torch.bincount(buckets, minlength=2**_BUCKET_BITS)[buckets] > 1
    _, place, counts = torch.unique(flat[shared], return_inverse=True, return_counts=True)
    return torch.ones_like(flat).masked_scatter_(shared, counts[place]).view(keys.shape)


def _variance(levels: Tensor) -> Tensor:
    """Of each patch, averaged over the colours: (n, 3, H, W) -> (n, 1, H-3, W-3).

    Sums and squares are whole numbers below 2^24, exact in float32.
    """
    values = levels.float()
    mean = _patch_sums(values) / SIDE**2
    squares = _patch_sums(values.square().sum(dim=1, keepdim=True)) / SIDE**2
    return (squares - mean.square().sum(dim=1, keepdim=True)) / values.shape[1]


def _patch_sums(maps: Tensor) -> Tensor:
    return _windows(_windows(maps, dim=3, fold=torch.add), dim=2, fold=torch.add)


def _covered(corners: Tensor) -> Tensor:
    """(n, C, H-3, W-3) upper left corners of patches -> (n, C, H, W) float32, 1 at the patches' pixels, else 0."""
    padded = F.pad(corners.float(), (SIDE - 1,) * 4)
    return _windows(_windows(padded, dim=3, fold=torch.maximum), dim=2, fold=torch.maximum)


def _windows(maps: Tensor, dim: int, fold: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Folds `SIDE` neighbours along one dimension, which becomes shorter by 3."""
    return reduce(fold, [maps.narrow(dim, i, maps.shape[dim] - SIDE + 1) for i in range(SIDE)])
