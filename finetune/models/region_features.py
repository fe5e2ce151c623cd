"""What the vision tower saw inside a box, added to the tokens that name the box, so that the model can look there.

A box written in digits must be turned into a place by the language model; here its image tokens are pooled directly.
Idea: features of a region beside its mention, as in GPT4RoI (arXiv:2307.03601), Ferret (arXiv:2310.07704) and Osprey
(arXiv:2312.10032); ours is the plainest form, mean, maximum and one linear layer. Which tokens name which box is told
by the collator (`region_index`), nothing is searched here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MIN_COVER = 0.3
"""Cells that the maximum is taken over are covered by at least this part of what the most covered cell is."""


def box_weights(boxes_xyxy: Tensor, grid_hw: tuple[int, int], cell: int) -> Tensor:
    """Area of each grid cell inside each box, in cells: 1 where the cell lies wholly inside.

    Args:
        boxes_xyxy: (R, 4) in pixels of the processed image, half-open; what lies outside the grid counts nothing.
        grid_hw: rows h and columns w of the grid. cell: side of a cell in pixels.

    Returns:
        (R, h, w) float32 in [0, 1].
    """
    scaled = boxes_xyxy.float() / cell
    sides = []
    for low, high, count in ((scaled[:, 1], scaled[:, 3], grid_hw[0]), (scaled[:, 0], scaled[:, 2], grid_hw[1])):
        first = torch.arange(count, device=scaled.device, dtype=torch.float32)
        ends = torch.minimum(high[:, None], first + 1) - torch.maximum(low[:, None], first)
        sides.append(ends.clamp(min=0))  # (R, h) and (R, w)
    return sides[0][:, :, None] * sides[1][:, None, :]


def pool_regions(tokens: Tensor, boxes_xyxy: Tensor, grid_hw: tuple[int, int], cell: int) -> Tensor:
    """Mean and maximum of the image tokens inside each box.

    The mean weighs cells by how much of them is covered. The maximum of each channel keeps what fills few cells, such
    as a crack across a large box, and is taken over the cells that count (`MIN_COVER`).

    Args:
        tokens: (h * w, D) merged image tokens in raster order.
        boxes_xyxy: (R, 4) in pixels of the processed image; a box without area (padding) gives zeros.
        grid_hw: (h, w) of the tokens. cell: pixels of a token's side, patch size times merge size.

    Returns:
        (R, 2 D) float32.
    """
    weights = box_weights(boxes_xyxy, grid_hw, cell).flatten(1)  # (R, h * w)
    total, most = weights.sum(dim=1, keepdim=True), weights.amax(dim=1, keepdim=True)
    values = tokens.float()
    mean = weights @ values / total.clamp(min=1e-6)
    counts = (weights >= MIN_COVER * most) & (most > 0)
    peak = values[None].masked_fill(~counts[:, :, None], -torch.inf).amax(dim=1)  # (R, D)
    return torch.cat([mean, torch.where(most > 0, peak, 0.0)], dim=1)  # (R, 2 D)


class RegionProjection(nn.Module):
    """Pooled regions (R, 2 D) to what is added to an embedding (R, D).

    The output starts at zero, so that a trained model computes at first what it did without; gradients reach the output
    layer at once, and through it the tower.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width)
        self.out = nn.Linear(2 * width, width)

    def zero_output(self) -> None:
        """The state before training."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, 2 D) -> (R, D)."""
        projected: Tensor = self.out(self.norm(pooled.to(self.out.weight.dtype)))
        return projected


def spread(features: Tensor, region_index: Tensor) -> Tensor:
    """What each token gains: its region's features, 0 where it names none.

    Args:
        features: (B, R, D). region_index: (B, T) int64, 0 for no region, k for row k - 1 of its sample.

    Returns:
        (B, T, D).
    """
    padded = torch.cat([torch.zeros_like(features[:, :1]), features], dim=1)  # (B, R + 1, D)
    return padded.gather(1, region_index.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
