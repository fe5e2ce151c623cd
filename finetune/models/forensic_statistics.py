"""Fixed statistics of the pixels that tampering disturbs: high-pass energies and the spectrum of 8x8 blocks.

Two families, without parameters and without gradient:
- log energies of high-pass residuals per 4x4 cell, luma and chroma (in the spirit of SRM, Fridrich & Kodovsky 2012):
  noise level, sharpness, resampling;
- log magnitudes of 8x8 DCT coefficients. On JPEG's own grid they hold the compression history: a picture that was once
  a JPEG has coefficients at 0 that an edit refills (the idea of CAT-Net's DCT stream, Kwon et al. 2021).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.models.box_means import block_mean

STRIDE = 4
"""Pixels per cell of the finest map."""
BLOCK = 8
"""Side of a DCT block: JPEG's."""
MARGIN = 2 * BLOCK
"""Maps are padded to whole 16 px: a block of JPEG's chroma at 4:2:0, and the coarsest level of the stream."""


class Statistics(NamedTuple):
    """Maps of n images, padded at right and bottom to multiples of 16 px (H', W'), float32, mostly in [-2, 3].

    cells: (n, CELL_CHANNELS, H'/4, W'/4). blocks: (n, BLOCK_CHANNELS, H'/8, W'/8).
    chroma: (n, CHROMA_CHANNELS, H'/16, W'/16).
    """

    cells: Tensor
    blocks: Tensor
    chroma: Tensor


LUMA_FILTERS, CHROMA_FILTERS, HALF_FILTERS = 14, 5, 4
CELL_CHANNELS = LUMA_FILTERS + 2 * CHROMA_FILTERS + HALF_FILTERS + 4 + BLOCK**2
BLOCK_CHANNELS = 4 * BLOCK**2
CHROMA_CHANNELS = 2 * BLOCK**2


@torch.no_grad()
def forensic_statistics(images: Tensor) -> Statistics:
    """Statistics of RGB images (n, 3, H, W) in [0, 255], H and W multiples of 4; float32 under autocast too."""
    with torch.autocast(images.device.type, enabled=False):
        images = pad_to(images.float(), MARGIN)
        luma, chroma = luma_chroma(images)
        spectrum = block_spectrum(luma)  # (n, 64, H/4, W/4)
        cells = torch.cat([residual_energies(luma, chroma), colour_statistics(images, luma), spectrum], dim=1)
        return Statistics(cells, F.pixel_unshuffle(spectrum, BLOCK // STRIDE), chroma_spectrum(chroma))


def pad_to(maps: Tensor, multiple: int) -> Tensor:
    """(n, C, H, W) with right and bottom edges repeated up to the next multiple."""
    height, width = maps.shape[-2:]
    return F.pad(maps, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def luma_chroma(images: Tensor) -> tuple[Tensor, Tensor]:
    """RGB (n, 3, H, W) -> JPEG's Y (n, 1, H, W) in [-128, 127] and Cb, Cr (n, 2, H, W) around 0 (ITU-R BT.601)."""
    red, green, blue = images.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma - 128, torch.cat([(blue - luma) * 0.564, (red - luma) * 0.713], dim=1)


def residual_energies(luma: Tensor, chroma: Tensor) -> Tensor:
    """Log mean squares of high-pass residuals per 4x4 cell: luma, Cb, Cr, luma at half size.

    Args:
        luma: (n, 1, H, W). chroma: (n, 2, H, W).

    Returns:
        (n, 14 + 2 * 5 + 4, H/4, W/4).
    """
    n, _, height, width = luma.shape
    device = luma.device
    luma_bank, chroma_bank = phased_bank(STRIDE, 1, None, device), phased_bank(STRIDE, 2, _CHROMA_SET, device)
    half_bank = phased_bank(STRIDE // 2, 1, _HALF_SET, device)
    fine = F.conv2d(_frame(luma), luma_bank, stride=STRIDE)  # (n, 14 * 16, H/4, W/4)
    colour = F.conv2d(_frame(chroma), chroma_bank.repeat(2, 1, 1, 1), stride=STRIDE, groups=2)  # (n, 2 * 5 * 4, ...)
    half = F.conv2d(_frame(block_mean(luma, 2)), half_bank, stride=STRIDE // 2)  # (n, 4 * 4, ...)
    size = height // STRIDE, width // STRIDE
    groups = [(fine, LUMA_FILTERS), (colour, 2 * CHROMA_FILTERS), (half, HALF_FILTERS)]
    energies = [residual.view(n, filters, -1, *size).square().mean(dim=2) for residual, filters in groups]
    return torch.log(torch.cat(energies, dim=1) + 0.02) / 3


def colour_statistics(images: Tensor, luma: Tensor) -> Tensor:
    """Mean RGB and log variance of the luma per 4x4 cell, (n, 4, H/4, W/4): what noise levels depend on."""
    moments = block_mean(torch.cat([images, luma, luma.square()], dim=1), STRIDE)
    variance = (moments[:, 4:] - moments[:, 3:4].square()).clamp_min(0)
    return torch.cat([moments[:, :3] / 128 - 1, torch.log(variance + 0.3) / 4], dim=1)


def block_spectrum(luma: Tensor) -> Tensor:
    """Log magnitudes of the 8x8 DCT at every fourth pixel, (n, 64, H/4, W/4); even cells lie on JPEG's grid."""
    padded = F.pad(luma, (0, BLOCK - STRIDE, 0, BLOCK - STRIDE), mode="replicate")
    return torch.log(F.conv2d(padded, dct_bank(luma.device), stride=STRIDE).abs() + 0.3) / 2


def chroma_spectrum(chroma: Tensor) -> Tensor:
    """Log magnitudes of the 8x8 DCT of the chroma at half size (4:2:0), on JPEG's grid, (n, 2 * 64, H/16, W/16)."""
    half = block_mean(chroma, 2)
    coefficients = F.conv2d(half, dct_bank(chroma.device).repeat(2, 1, 1, 1), stride=BLOCK, groups=2)
    return torch.log(coefficients.abs() + 0.15) / 2


def _frame(plane: Tensor) -> Tensor:
    """Two repeated pixels on every side: a 5x5 filter then has one value per pixel."""
    return F.pad(plane, (2, 2, 2, 2), mode="replicate")


_BINOMIALS = ((0, 0, -1, 1, 0), (0, 1, -2, 1, 0), (0, 1, -3, 3, -1), (1, -4, 6, -4, 1))
_SQUARE_3 = ((-1, 2, -1), (2, -4, 2), (-1, 2, -1))
_SQUARE_5 = ((-1, 2, -2, 2, -1), (2, -6, 8, -6, 2), (-2, 8, -12, 8, -2), (2, -6, 8, -6, 2), (-1, 2, -2, 2, -1))
_CHROMA_SET = (4, 2, 3, 10, 12)
_HALF_SET = (2, 3, 10, 12)


def high_pass_filters() -> Tensor:
    """(14, 5, 5) zero-sum filters of unit norm.

    In order: first differences (along x, y), second differences (x, y and both diagonals), third and fourth differences
    (x, y), SRM's 3x3 and 5x5 squares, centre minus 3x3 mean, 3x3 minus 5x5 mean.
    """
    lines = [torch.tensor(line, dtype=torch.float32) for line in _BINOMIALS]
    rows = []
    for line in lines:
        row = torch.zeros(5, 5)
        row[2] = line
        rows.append([row, row.T])
    rows[1] += [torch.diag(lines[1]), torch.diag(lines[1]).flip(1)]
    small, large = torch.zeros(5, 5), torch.tensor(_SQUARE_5, dtype=torch.float32)
    small[1:4, 1:4] = torch.tensor(_SQUARE_3, dtype=torch.float32)
    mean3, mean5, centre = torch.zeros(5, 5), torch.full((5, 5), 1 / 25), torch.zeros(5, 5)
    mean3[1:4, 1:4], centre[2, 2] = 1 / 9, 1.0
    bank = torch.stack([*(f for group in rows for f in group), small, large, centre - mean3, mean3 - mean5])
    return bank / bank.flatten(1).norm(dim=1)[:, None, None]


@lru_cache(maxsize=16)
def phased_bank(stride: int, step: int, chosen: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """The filters at the phases of a cell, so that one strided convolution gives all residuals of a cell as channels.

    Twice as fast as a full-size convolution followed by pooling, with the same result.

    Args:
        stride: side of the cell. step: every how many pixels a residual is taken. chosen: which filters, None for all.

    Returns:
        (filters * (stride / step)^2, 1, stride + 4, stride + 4).
    """
    filters = high_pass_filters()
    filters = filters if chosen is None else filters[list(chosen)]
    phases = range(0, stride, step)
    bank = torch.zeros(len(filters), len(phases), len(phases), stride + 4, stride + 4)
    for i, top in enumerate(phases):
        for j, left in enumerate(phases):
            bank[:, i, j, top : top + 5, left : left + 5] = filters
    return bank.view(-1, 1, stride + 4, stride + 4).to(device)


@lru_cache(maxsize=4)
def dct_bank(device: torch.device) -> Tensor:
    """The 64 orthonormal 8x8 DCT-II basis images, (64, 1, 8, 8)."""
    points = torch.arange(BLOCK, dtype=torch.float64)
    waves = torch.cos(math.pi * (2 * points + 1) * points[:, None] / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    waves[0] /= math.sqrt(2)
    return torch.einsum("ay,bx->abyx", waves, waves).reshape(BLOCK**2, 1, BLOCK, BLOCK).float().to(device)
