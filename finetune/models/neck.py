"""The fusion neck of `heads.source: vision`: maps of several tower blocks become one map per image and one state.

The map takes the place of the tower's patches in the mask heads, the pooled state that of the `<cls>` token. No text is
read; which blocks are fused is `heads.vision_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import HeadsConfig
from finetune.models.features import by_shape
from finetune.models.noise_residual import ResidualBlock

NUM_POOLED = 3
"""Vectors of `FusionNeck.pool`: by learned attention, the mean, the maximum."""


class FusionNeck(nn.Module):
    """x = sum_b Linear_b(norm_b(map_b)) [+ Linear(norm(stream, averaged over each patch))]; x + 1x1(GELU(3x3(norm x))).

    Args:
        vision_hidden_size: channels C of a tower block's output.
        stream_channels: channels S of the noise-residual stream, 0 without it. What the stream sees reaches the image
            score through the neck, also where there is no mask head.
    """

    def __init__(self, config: HeadsConfig, vision_hidden_size: int, stream_channels: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(vision_hidden_size) for _ in config.vision_layers)
        self.projs = nn.ModuleList(nn.Linear(vision_hidden_size, d) for _ in config.vision_layers)
        self.stream_norm = nn.LayerNorm(stream_channels) if stream_channels else None
        self.stream_proj = nn.Linear(stream_channels, d) if stream_channels else None
        self.refine = ResidualBlock(d)
        self.attention = nn.Linear(d, 1)

    def forward(self, maps: Sequence[Sequence[Tensor]], stream: Sequence[Tensor] | None) -> tuple[list[Tensor], Tensor]:
        """Fuse the maps of N images of any sizes.

        Args:
            maps: for each configured block N maps (C, h, w) in raster order, any dtype.
            stream: N maps (S, H, W) of the noise-residual stream, or None without it.

        Returns:
            N maps (d, h, w), and the pooled states (N, NUM_POOLED, d), both in the neck's dtype.
        """
        count = len(maps[0])
        summed = [
            self._sum([block[i] for block in maps], stream[i] if stream is not None else None) for i in range(count)
        ]
        fused = by_shape(summed, lambda batch, _: self.refine(batch).unbind())
        return fused, torch.stack([self.pool(x) for x in fused])

    def _sum(self, maps: Sequence[Tensor], stream: Tensor | None) -> Tensor:
        """Maps (C, h, w) of one image, one of each block -> (d, h, w)."""
        total = torch.zeros((), device=maps[0].device)
        for norm, proj, patches in zip(self.norms, self.projs, maps, strict=True):
            total = total + proj(norm(patches.permute(1, 2, 0).to(proj.weight.dtype)))  # (h, w, d)
        if self.stream_proj is not None and self.stream_norm is not None:
            assert stream is not None
            cells = F.adaptive_avg_pool2d(stream, maps[0].shape[-2:]).permute(1, 2, 0)  # (h, w, S)
            total = total + self.stream_proj(self.stream_norm(cells.to(self.stream_proj.weight.dtype)))
        return total.permute(2, 0, 1)

    def pool(self, x: Tensor) -> Tensor:
        """(d, h, w) -> (NUM_POOLED, d)."""
        cells = x.flatten(1).t()  # (h*w, d)
        weights = self.attention(cells).softmax(dim=0)  # (h*w, 1)
        return torch.stack([(weights * cells).sum(dim=0), cells.mean(dim=0), cells.amax(dim=0)])
