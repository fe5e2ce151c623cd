"""Fixed maps of what the content of a picture does not explain: noise and compression, freed of texture and brightness.

How much high-frequency energy a place has depends on what is there: edges, texture, brightness (a camera's noise
variance grows with the signal, Foi et al. 2008). Within one picture that dependence is the same everywhere, so it is
fitted to the picture itself, and the remainder tells where another camera, a retouch or a second compression worked.
Judging a picture by itself instead of by others follows Splicebuster (Cozzolino, Poggi, Verdoliva 2015). No parameters,
no gradient, so nothing here is learnt from the photographs one happens to train on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.models.box_means import block_mean, local_mean
from finetune.models.forensic_statistics import BLOCK, CELL_CHANNELS

_ENERGIES = CELL_CHANNELS - 4 - BLOCK**2  # the first channels of the cells; then mean RGB, log variance, the spectrum
_BANDS = ((3, 4), (5, 6), (7, 8), (9, 14))
"""Bands of the 8x8 DCT that are explained, by the sum of their two frequencies, from low to high."""
_EXPLAINED = _ENERGIES + len(_BANDS)
_DISTANCES = ((0, 5), (1, 3), (1, 5))
"""Outlier maps: which of the two regressions, and the side of the window of its means, in squares of 2x2 cells."""
RESIDUAL_CHANNELS = 2 * _EXPLAINED + len(_DISTANCES)
_PENALTY = 1e-3
"""Of the ridge regressions, against a mean square of 1 of every explaining variable."""
_LIMIT = 4.0
_ROUNDS = 4
"""Rounds of the robust fit of mean and covariance."""


@torch.no_grad()
def content_residuals(cells: Tensor) -> Tensor:
    """What regressions on content leave of the log energies of every cell, and how far each place is from the rest.

    Two ridge regressions per picture. The first explains by colour, the cell's own variance and lowest frequencies and
    their local means: what is left is the shape of the spectrum. The second explains by colour and by how much the
    means of neighbouring cells vary, in which noise hardly shows: what is left is the level of the noise. The maps of
    outliers are robust Mahalanobis distances of these residuals.

    Args:
        cells: (n, CELL_CHANNELS, h, w) of `forensic_statistics`, h and w multiples of 4.

    Returns:
        (n, RESIDUAL_CHANNELS, h, w) float32 on the device of `cells`: the residuals of both, in standard deviations of
        the picture, within [-4, 4]; then `outlier_distance` of local means of them, one value per 2x2 cells.
    """
    with torch.autocast(cells.device.type, enabled=False):
        cells = cells.float()
        targets = _targets(cells)
        residuals = [
            robust_residuals(targets, content) for content in (_spectral_content(cells), _smooth_content(cells))
        ]
        halves = [block_mean(maps, 2) for maps in residuals]
        distances = [outlier_distance(local_mean(halves[which], side)) for which, side in _DISTANCES]
        distances = [F.interpolate(maps, scale_factor=2) for maps in distances]
        return torch.cat([*residuals, *distances], dim=1)


def robust_residuals(targets: Tensor, content: Tensor) -> Tensor:
    """Residuals of a ridge regression per picture, fitted twice: the second time, squares of 4x4 cells that did not
    follow the first fit count less, so that a large tampered region does not explain itself.

    Args:
        targets: (n, T, h, w). content: (n, V, h, w), any units; h and w multiples of 4.

    Returns:
        (n, T, h, w), in standard deviations of the picture's residuals, within [-4, 4].
    """
    constant = torch.ones_like(content[:, :1])
    fit = _RidgeRegression(torch.cat([F.instance_norm(content), constant], dim=1), targets)
    misfit = block_mean(fit.residuals(constant), 4).square().mean(dim=1, keepdim=True)
    weights = 1 / (1 + misfit / misfit.mean(dim=(2, 3), keepdim=True).clamp_min(1e-12))
    return fit.residuals(F.interpolate(weights, scale_factor=4)).clamp_(-_LIMIT, _LIMIT)


def outlier_distance(maps: Tensor) -> Tensor:
    """How far every place is from the majority of its picture.

    Mean and covariance are fitted in rounds in which a place of squared distance d, the picture's median being 1,
    counts 1 / (1 + d^2).

    Args:
        maps: (n, C, h, w).

    Returns:
        (n, 1, h, w): half the log of the squared Mahalanobis distance over its median, within [-3.5, 3.5].
    """
    n, channels, height, width = maps.shape
    points = maps.flatten(2).to(_sum_dtype(maps.device))  # (n, C, h * w)
    weights = torch.ones_like(points[:, :1])
    eye = torch.eye(channels, device=maps.device, dtype=points.dtype)
    for _ in range(_ROUNDS):
        total = weights.sum(dim=2, keepdim=True)
        centred = points - (weights * points).sum(dim=2, keepdim=True) / total
        covariance = (weights * centred) @ centred.transpose(1, 2) / total
        ridge = 1e-2 * covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] + 1e-5
        factor = torch.linalg.cholesky(covariance + ridge * eye)
        squared = torch.linalg.solve_triangular(factor, centred, upper=False).square().sum(dim=1, keepdim=True)
        squared = squared / squared.median(dim=2, keepdim=True).values.clamp_min(1e-6)
        weights = 1 / (1 + squared.square())
    return squared.clamp(1e-3, 1e3).log().view(n, 1, height, width).to(maps.dtype) / 2


def _targets(cells: Tensor) -> Tensor:
    bands = [_band(cells, low, high) for low, high in _BANDS]
    return torch.cat([cells[:, :_ENERGIES], *bands], dim=1)


def _spectral_content(cells: Tensor) -> Tensor:
    """(n, 12, h, w): explaining variables that hold the cell's own lowest frequencies."""
    colour, variance = cells[:, _ENERGIES : _ENERGIES + 3], cells[:, _ENERGIES + 3 : _ENERGIES + 4]
    brightness = colour.mean(dim=1, keepdim=True)
    texture = torch.cat([variance, _band(cells, 1, 1), _band(cells, 2, 2)], dim=1)
    products = [brightness.square(), variance.square(), brightness * variance]
    return torch.cat([colour, texture, local_mean(texture, 5), *products], dim=1)


def _smooth_content(cells: Tensor) -> Tensor:
    """(n, 9, h, w): explaining variables from means over whole cells, in which noise hardly shows."""
    colour = cells[:, _ENERGIES : _ENERGIES + 3]
    brightness = colour.mean(dim=1, keepdim=True)
    near, wide = _variation(brightness, 3), _variation(brightness, 7)
    products = [brightness.square(), near.square(), brightness * near, brightness * wide]
    return torch.cat([colour, near, wide, *products], dim=1)


def _variation(brightness: Tensor, side: int) -> Tensor:
    """Log variance of the brightness of side x side cells, in levels of 0..255."""
    levels = 128 * brightness
    variance = local_mean(levels.square(), side) - local_mean(levels, side).square()
    return torch.log(variance.clamp_min(0) + 0.5) / 4


def _band(cells: Tensor, low: int, high: int) -> Tensor:
    """(n, 1, h, w): mean log magnitude of the DCT frequencies (u, v) with low <= u + v <= high."""
    steps = torch.arange(BLOCK, device=cells.device)
    order = (steps[:, None] + steps).flatten()
    return cells[:, -(BLOCK**2) :][:, (order >= low) & (order <= high)].mean(dim=1, keepdim=True)


class _RidgeRegression:
    """Regressions of every target on the same variables, per picture.

    Args:
        variables: (n, V, h, w), the last one constant, which is not penalised. targets: (n, T, h, w).
    """

    def __init__(self, variables: Tensor, targets: Tensor) -> None:
        self.shape = targets.shape
        self.known, self.wanted = variables.flatten(2), targets.flatten(2)
        exact = _sum_dtype(targets.device)
        self.exact_known, self.exact_wanted = self.known.to(exact), self.wanted.to(exact).transpose(1, 2)

    def residuals(self, weights: Tensor) -> Tensor:
        """Of a fit in which cells have weights (n, 1, h, w), divided by their root mean square; (n, T, h, w)."""
        weighted = self.exact_known * weights.flatten(2)
        gram = weighted @ self.exact_known.transpose(1, 2)
        penalised = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
        penalised[-1, -1] = 0
        gram = gram + _PENALTY * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * penalised
        coefficients = torch.linalg.solve(gram, weighted @ self.exact_wanted).transpose(1, 2)  # (n, T, V)
        if gram.device.type == "cpu":  # no TF32 there, and half the memory to move
            left = torch.baddbmm(self.wanted, coefficients.to(self.wanted.dtype), self.known, alpha=-1)
        else:
            left = (self.exact_wanted.transpose(1, 2) - coefficients @ self.exact_known).to(self.wanted.dtype)
        spread = torch.linalg.vector_norm(left, dim=2, keepdim=True) / left.shape[2] ** 0.5
        return left.div_(spread + 1e-3).view(self.shape)


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums over a picture: double where devices have it, since TF32 products are too coarse to be factored."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
