"""The noise-residual expert: local camera-noise statistics of the pixels, as features beside the vision tower's.

Splices, clones and inpainting disturb the noise a camera and its JPEG left behind; patch embeddings trained on semantics
ignore it. Fixed high-pass filters (in the spirit of SRM, Fridrich & Kodovsky 2012) give residuals, their *log energy* per
cell is what learns well, and a few dilated convolutions compare cells with their surroundings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import NoiseResidualConfig
from finetune.models.features import by_shape


class NoiseResidualStream(nn.Module):
    """RGB images (3, H, W) in [0, 255] -> features (channels, H / stride, W / stride), float32."""

    def __init__(self, config: NoiseResidualConfig) -> None:
        super().__init__()
        self.stride = config.stride
        self.stem = nn.Conv2d(residual_channels(), config.channels, kernel_size=1)
        self.blocks = nn.ModuleList(DilatedBlock(config.channels, dilation) for dilation in config.dilations)

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """N images of any sizes (multiples of the stride) -> N feature maps."""
        return by_shape(images, lambda batch, _: self.forward_batch(batch).unbind())

    def forward_batch(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) RGB in [0, 255] -> (n, channels, H / stride, W / stride)."""
        with torch.no_grad():
            statistics = residual_statistics(images.float(), self.stride)  # (n, F, H/s, W/s)
        features = self.stem(statistics.to(self.stem.weight.dtype))
        for block in self.blocks:
            features = block(features)
        return features


class DilatedBlock(nn.Module):
    """Residual block: 3x3 dilated convolution, group norm over one image, GELU, 1x1 convolution."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, padding_mode="zeros")
        self.norm = nn.GroupNorm(8 if channels % 8 == 0 else 1, channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(self.norm(self.conv(x))))


def residual_channels() -> int:
    """Number of statistics `residual_statistics` gives per cell."""
    return 16


def residual_statistics(images: Tensor, stride: int) -> Tensor:
    """Per-cell noise statistics: log energies of high-pass residuals, colour means, log local variance.

    Args:
        images: (n, 3, H, W) RGB in [0, 255], H and W multiples of `stride`.

    Returns:
        (n, residual_channels(), H / stride, W / stride) float32, roughly in [-2, 2].
    """
    y = images.mean(dim=1, keepdim=True)  # (n, 1, H, W)
    red, blue = images[:, :1] - y, images[:, 2:] - y
    residuals = [filtered for plane in (y, red, blue) for filtered in high_pass(plane)]  # 12 of (n, 1, H, W)
    energy = F.avg_pool2d(torch.cat(residuals, dim=1).square(), stride)  # (n, 12, H/s, W/s)
    mean = F.avg_pool2d(images, stride)
    variance = (F.avg_pool2d(y.square(), stride) - F.avg_pool2d(y, stride).square()).clamp_min(0)
    return torch.cat([torch.log(energy + 0.05) / 4, mean / 128 - 1, torch.log(variance + 0.5) / 4], dim=1)


def high_pass(plane: Tensor) -> list[Tensor]:
    """Second-order differences along x and y, their mix (Laplacian of a Laplacian) and the 3x3 mean residual.

    Args:
        plane: (n, 1, H, W).

    Returns:
        Four residuals of the same shape; borders are replicated.
    """
    padded = F.pad(plane, (1, 1, 1, 1), mode="replicate")
    centre = padded[:, :, 1:-1, 1:-1]
    left, right = padded[:, :, 1:-1, :-2], padded[:, :, 1:-1, 2:]
    up, down = padded[:, :, :-2, 1:-1], padded[:, :, 2:, 1:-1]
    corners = padded[:, :, :-2, :-2] + padded[:, :, :-2, 2:] + padded[:, :, 2:, :-2] + padded[:, :, 2:, 2:]
    return [
        left + right - 2 * centre,
        up + down - 2 * centre,
        corners - 2 * (left + right + up + down) + 4 * centre,
        centre - F.avg_pool2d(padded, 3, stride=1),
    ]
