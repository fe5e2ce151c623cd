"""Bilinear resizing of feature maps: on a CPU as two matrix products.

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
    if maps.device.type != "cpu" or maps.dtype not in (torch.float32, torch.float64):
        return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    down, right = (_weights(*pair, maps.dtype) for pair in ((maps.shape[2], height), (maps.shape[3], width)))
    with torch.autocast("cpu", enabled=False):
        return down @ (maps @ right.T)


@lru_cache(maxsize=64)
def _weights(have: int, want: int, dtype: torch.dtype) -> Tensor:
    """(want, have): which part every value has in every value of the resized line."""
    with torch.inference_mode(False):  # kept, and then needed by steps that have a backward pass
        lines = torch.eye(have, dtype=dtype)[None]
        return F.interpolate(lines, size=want, mode="linear", align_corners=False)[0].T.contiguous()
