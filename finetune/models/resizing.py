"""Bilinear resizing of feature maps: on a CPU, where a gradient is wanted, as two matrix products.

torch's bilinear kernels for channels-first maps on a CPU are not vectorised; with their backward pass they cost three
to four times as much as the products with the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_bilinear(maps: Tensor, size_hw: Sequence[int]) -> Tensor:
    """As `F.interpolate(maps, size_hw, mode="bilinear", align_corners=False)`, differentiable.

    Args:
        maps: (n, C, h, w) floating point.

    Returns:
        (n, C, H, W) of the same type.
    """
    height, width = size_hw
    with_products = maps.requires_grad and maps.device.type == "cpu" and maps.dtype in (torch.float32, torch.float64)
    if not with_products:
        return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    down, right = (_weights(*pair, maps.dtype) for pair in ((maps.shape[2], height), (maps.shape[3], width)))
    with torch.autocast("cpu", enabled=False):
        return down @ (maps @ right.T)


@lru_cache(maxsize=64)
def _weights(have: int, want: int, dtype: torch.dtype) -> Tensor:
    """(want, have): which part every value has in every value of the resized line."""
    lines = torch.eye(have, dtype=dtype)[None]
    return F.interpolate(lines, size=want, mode="linear", align_corners=False)[0].T.contiguous()
