"""Means over windows and blocks of a map, as sums of shifted views.

Several times as fast on a CPU as `torch.nn.functional.avg_pool2d`, which is not vectorised over channels-first maps,
and the same to rounding.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def window_mean(maps: Tensor, side: int) -> Tensor:
    """Mean over side x side cells around every cell, those outside of the map being 0.

    Args:
        maps: (n, C, h, w) floating point. side: odd.

    Returns:
        same shape: `avg_pool2d(maps, side, 1, side // 2)`.
    """
    return _window_sum(maps, side) / side**2


def local_mean(maps: Tensor, side: int) -> Tensor:
    """Mean over side x side cells, `side` odd, at the border over those inside; (n, C, h, w) -> same shape.

    Whole numbers give exact sums, so that the mean of a constant is that constant everywhere.
    """
    return _window_sum(maps, side) / _window_sum(torch.ones_like(maps[:1, :1]), side)


def _window_sum(maps: Tensor, side: int) -> Tensor:
    height, width = maps.shape[-2:]
    reach = side // 2
    padded = F.pad(maps, (reach, reach, reach, reach))
    rows = reduce(torch.add, [padded[..., i : i + height, :] for i in range(side)])
    return reduce(torch.add, [rows[..., i : i + width] for i in range(side)])


def block_mean(maps: Tensor, side: int) -> Tensor:
    """(n, C, h, w), h and w multiples of `side` -> (n, C, h/side, w/side): `avg_pool2d(maps, side)`."""
    rows = reduce(torch.add, [maps[..., i::side, :] for i in range(side)])
    return reduce(torch.add, [rows[..., i::side] for i in range(side)]) / side**2
