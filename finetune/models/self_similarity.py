"""Fixed maps of where a picture repeats itself: what copies within one picture leave, whatever the picture shows.

Two searches, without parameters and without gradient:
- small whitened patches against all others of the same picture, as content-aware fill copies them by whole pixels. One
  match means nothing; that neighbours agree on their offset does (Fridrich et al. 2003; Cozzolino et al. 2015);
- keypoints against keypoints for pieces turned, resized or mirrored (`copied_regions`).
Which of two equal places is the copy cannot be told here; the noise statistics know.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.models.copied_regions import REGION_CHANNELS, copied_regions
from finetune.models.forensic_statistics import STRIDE, luma_chroma

SEARCH_VERSION = 1
"""To be raised when any map changes for the same picture: stored ones (`train.search_cache`) are then made anew."""
PATCH_CHANNELS = 4
SIMILARITY_CHANNELS = PATCH_CHANNELS + REGION_CHANNELS + 1
MAX_PIXELS = 256 * 256
"""Larger pictures are shrunk to this area: the search among patches grows with the square of it."""
SPACING = 8
"""Pixels from one patch that is looked for to the next."""
_HALF_PATCH, _PATCH = 6, 8
_LEAST_SHIFT = 8
"""Pixels at half size: nearer patches resemble each other in every picture."""


@torch.no_grad()
def self_similarity(image: Tensor) -> Tensor:
    """Where one picture repeats itself.

    Args:
        image: (3, H, W) RGB in [0, 255], sides of at least 32.

    Returns:
        (SIMILARITY_CHANNELS, H/4, W/4) float32 on the device of `image`: correlation of a patch with its best match,
        the same at half size, how many of 8 and of 24 neighbours have the same offset (quarters and eighths), then the
        maps of `copied_regions`, then ones: a picture that was not searched is all zeros.
    """
    size = image.shape[-2] // STRIDE, image.shape[-1] // STRIDE
    with torch.autocast(image.device.type, enabled=False):
        luma = luma_chroma(_shrunk(image.float()[None]))[0] + 128  # (1, 1, h, w)
        patches = F.interpolate(_spread(matching_patches(luma), luma.shape[-2:])[None], size=size)[0]
        grey = luma[0, 0].round().clamp(0, 255).byte().cpu().numpy()
        regions = torch.from_numpy(copied_regions(np.ascontiguousarray(grey))).to(image.device)
        regions = F.interpolate(regions[None], size=size, mode="area")[0]
        return torch.cat([patches, regions, torch.ones_like(regions[:1])])


def _spread(maps: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Maps of one value per `SPACING` pixels -> one per `STRIDE` pixels, the last ones repeated to the border."""
    times = SPACING // STRIDE
    maps = maps.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    missing = [max(0, size // STRIDE - have) for size, have in zip(size_hw, maps.shape[1:], strict=True)]
    maps = F.pad(maps[None], (0, missing[1], 0, missing[0]), mode="replicate")[0]
    return maps[:, : size_hw[0] // STRIDE, : size_hw[1] // STRIDE]


def _shrunk(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    if height * width <= MAX_PIXELS:
        return image
    scale = (MAX_PIXELS / (height * width)) ** 0.5
    size = (max(32, int(height * scale)), max(32, int(width * scale)))
    return F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)


def matching_patches(luma: Tensor) -> Tensor:
    """Best match of every eighth pixel's patch elsewhere in the picture.

    All pairs are compared at half size; the matches of a patch and of its neighbours, one pixel around each, are then
    compared at full size.

    Args:
        luma: (1, 1, H, W) levels.

    Returns:
        (PATCH_CHANNELS, H/8, W/8), the first four maps of `self_similarity`.
    """
    coarse, coarse_score = _all_pairs(whitened(F.avg_pool2d(luma, 2)))
    _, rows, columns = coarse.shape
    around = F.pad(coarse[None].float(), (1, 1, 1, 1), mode="replicate")[0]
    near = [around[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    steps = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], device=luma.device)
    candidates = 2 * torch.stack(near).long()[:, None] + steps[None, :, :, None, None]  # (9, 9, 2, rows, columns)
    offsets, score = _best_candidate(whitened(luma), candidates.reshape(81, 2, -1), rows, columns)
    near_agree, far_agree = agreement(offsets.view(2, rows, columns))
    return torch.stack([score.view(rows, columns), coarse_score, near_agree / 4, far_agree / 8])


def agreement(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the 8 nearest and of the 24 nearest places have the same offset to one pixel.

    Args:
        offsets: (2, h, w) whole numbers.

    Returns:
        two (h, w) float32 counts.
    """
    _, h, w = offsets.shape
    around = F.pad(offsets[None].float(), (2, 2, 2, 2), value=1e6)[0]
    near, far = (torch.zeros(h, w, device=offsets.device) for _ in range(2))
    for i in range(5):
        for j in range(5):
            if (i, j) == (2, 2):
                continue
            same = ((around[:, i : i + h, j : j + w] - offsets).abs().amax(dim=0) <= 1).float()
            far = far + same
            if 1 <= i <= 3 and 1 <= j <= 3:
                near = near + same
    return near, far


def whitened(luma: Tensor) -> Tensor:
    """High-pass residual divided by its local standard deviation, (1, 1, H, W): texture weighs as much as edges."""
    residual = luma - F.avg_pool2d(F.pad(luma, (2, 2, 2, 2), mode="replicate"), 5, 1)
    energy = F.avg_pool2d(F.pad(residual.square(), (3, 3, 3, 3), mode="replicate"), 7, 1)
    return residual / (energy + 1).sqrt()


def _all_pairs(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (2, rows, columns) to the best of all patches that are not near, and the correlations."""
    windows = plane[0, 0].unfold(0, _HALF_PATCH, 1).unfold(1, _HALF_PATCH, 1)
    height, width = windows.shape[:2]
    patches = windows.reshape(height * width, _HALF_PATCH**2)
    patches = patches - patches.mean(dim=1, keepdim=True)
    patches = patches / (patches.norm(dim=1, keepdim=True) + 0.3 * _HALF_PATCH)
    step = SPACING // 2
    rows, columns = -(-height // step), -(-width // step)
    y, x = torch.arange(rows, device=plane.device) * step, torch.arange(columns, device=plane.device) * step
    wanted = (y[:, None] * width + x).flatten()
    correlation = patches[wanted] @ patches.T  # (rows * columns, height * width)
    correlation.view(-1)[_too_near(height, width, plane.device)] = -1
    score, found = _row_maxima(correlation)
    shift = torch.stack([found // width - wanted // width, found % width - wanted % width])
    return shift.view(2, rows, columns), score.view(rows, columns)


def _row_maxima(values: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """`values.max(dim=1)` of (rows, columns), the first of equals; blocks are compared first, in vector code, which
    torch's search for the place of a maximum is not."""
    whole = values.shape[1] // block * block
    blocks = values[:, :whole].view(len(values), whole // block, block).amax(dim=2)
    blocks = (
        torch.cat([blocks, values[:, whole:].amax(dim=1, keepdim=True)], dim=1) if whole < values.shape[1] else blocks
    )
    first = blocks.max(dim=1).indices * block
    place = first[:, None] + torch.arange(block, device=values.device)
    inside = place < values.shape[1]
    near = values.gather(1, place.clamp(max=values.shape[1] - 1)).masked_fill(~inside, -torch.inf)
    score, within = near.max(dim=1)
    return score, first + within


@lru_cache(maxsize=8)
def _too_near(height: int, width: int, device: torch.device) -> Tensor:
    """Flat indices into the (wanted, all) correlations of patches that are too near to each other."""
    step = SPACING // 2
    y, x = torch.arange(0, height, step), torch.arange(0, width, step)
    reach = torch.arange(-_LEAST_SHIFT, _LEAST_SHIFT + 1)
    at_y, at_x = y[:, None] + reach, x[:, None] + reach  # (rows, 17), (columns, 17)
    flat = at_y[:, None, :, None] * width + at_x[None, :, None, :]  # (rows, columns, 17, 17)
    inside = ((at_y >= 0) & (at_y < height))[:, None, :, None] & ((at_x >= 0) & (at_x < width))[None, :, None, :]
    place = torch.arange(len(y) * len(x)).view(len(y), len(x), 1, 1) * (height * width)
    return (flat + place)[inside].to(device)


def _best_candidate(plane: Tensor, candidates: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of (81, 2, n) candidate offsets the (2, n) of best correlation at full size, and the correlations (n,)."""
    windows = plane[0, 0].unfold(0, _PATCH, 1).unfold(1, _PATCH, 1)  # (height, width, 8, 8), a view
    height, width = windows.shape[:2]
    patches = windows.reshape(height * width, _PATCH**2)
    y = (torch.arange(rows, device=plane.device) * SPACING).clamp(max=height - 1).repeat_interleave(columns)
    x = (torch.arange(columns, device=plane.device) * SPACING).clamp(max=width - 1).repeat(rows)
    to_y, to_x = candidates[:, 0] + y, candidates[:, 1] + x  # (81, n)
    inside = (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
    index = to_y.clamp(0, height - 1) * width + to_x.clamp(0, width - 1)
    wanted = patches[y * width + x]
    wanted = wanted - wanted.mean(dim=1, keepdim=True)  # then the means of the others do not matter
    power = _PATCH**2 * (F.avg_pool2d(plane.square(), _PATCH, 1) - F.avg_pool2d(plane, _PATCH, 1).square())
    norm = power.clamp_min(0).sqrt().flatten() + 0.5 * _PATCH  # of the patches without their means, and a floor
    products = torch.bmm(patches[index.t()], wanted[..., None])[..., 0].t()  # (81, n)
    correlation = products / (norm[index] * norm[y * width + x])
    score, best = correlation.masked_fill(~inside, -1).max(dim=0)
    return candidates.gather(0, best.expand(1, 2, -1))[0], score
