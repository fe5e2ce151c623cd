"""Regions that are another region of the same picture, turned, resized or mirrored: keypoints find them, correlation of
the pixels says how far they reach. OpenCV and numpy, one picture at a time.

The method of Amerini et al. (2011): SIFT, the nearest other keypoint against the second nearest, matches that agree on
one affine map. Mirrored copies are found with mirrored descriptors, which are the same numbers in another order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

REGION_CHANNELS = 4
MAX_KEYPOINTS, MAX_COPIES = 500, 4
LEAST_MATCHES = 3
"""Matches at different places that must agree on one map."""
_MAX_DISTANCE, _MAX_RATIO = 0.35, 0.85**2
_SCALES, _MAX_ANGLE = (0.55, 1.8), 50.0
_WINDOW = 13
"""Side of the window of the correlation, in pixels."""
_MIRROR = np.array(
    [((3 - row) * 4 + column) * 8 + (8 - bin_) % 8 for row in range(4) for column in range(4) for bin_ in range(8)]
)
"""Descriptor of the mirrored patch: 4 x 4 places and 8 directions, in the keypoint's own frame."""


class Copy(NamedTuple):
    """One affine map of the picture to itself, (2, 3) from pixel (x, y) to pixel, and how many matches agree on it."""

    matrix: np.ndarray
    matches: int


def copied_regions(grey: np.ndarray) -> np.ndarray:
    """Maps of copied regions; source and copy light up alike.

    Args:
        grey: (H, W) uint8.

    Returns:
        (REGION_CHANNELS, H, W) float32, zeros where nothing was found: correlation with the other place, less where few
        matches agree; half the log of the number of matches; half the log ratio of the high-pass energy to that of the
        other place, which differs in sign between source and copy; correlation of the high-pass residuals.
    """
    maps = np.zeros((REGION_CHANNELS, *grey.shape), np.float32)
    copies = find_copies(grey)
    if not copies:
        return maps
    levels = grey.astype(np.float32)
    residual = levels - _box(levels, 5)
    energy = np.log(_box(residual * residual, 9) + 0.5)
    for copy in copies:
        for matrix in (copy.matrix, cv2.invertAffineTransform(copy.matrix)):
            _compare(maps, levels, residual, energy, matrix, copy.matches)
    return maps


def _compare(
    maps: np.ndarray, levels: np.ndarray, residual: np.ndarray, energy: np.ndarray, matrix: np.ndarray, matches: int
) -> None:
    """Write one map's values into `maps` where it correlates better than what stands there."""
    height, width = levels.shape
    y, x = _grid(height, width)
    to_x, to_y = (row[0] * x + row[1] * y + row[2] for row in matrix.astype(np.float32))
    is_other = (to_x >= 0) & (to_y >= 0) & (to_x <= width - 1) & (to_y <= height - 1)
    is_other &= (to_x - x) ** 2 + (to_y - y) ** 2 > 15**2
    other, other_residual, other_energy = (
        cv2.remap(plane, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for plane in (levels, residual, energy)
    )
    trust = min(1.0, 0.4 + 0.15 * matches)
    score = np.where(is_other, trust * correlation(levels, other, floor=4), 0).astype(np.float32)
    is_better = score > maps[0]
    values = (
        score,
        np.full_like(score, np.log(matches) / 2),
        (energy - other_energy) * np.clip(score, 0, 1) / 2,
        _box(residual * other_residual, _WINDOW)
        / np.sqrt((_box(residual**2, _WINDOW) + 1) * (_box(other_residual**2, _WINDOW) + 1)),
    )
    for channel, value in zip(maps, values, strict=True):
        np.copyto(channel, value, where=is_better)


def correlation(first: np.ndarray, second: np.ndarray, floor: float) -> np.ndarray:
    """Normalised correlation of two (H, W) float32 planes in a window around each pixel; `floor` is added to both
    variances, so that flat places correlate with nothing."""
    mean_1, mean_2 = _box(first, _WINDOW), _box(second, _WINDOW)
    variance_1 = np.maximum(_box(first * first, _WINDOW) - mean_1 * mean_1, 0) + floor
    variance_2 = np.maximum(_box(second * second, _WINDOW) - mean_2 * mean_2, 0) + floor
    return (_box(first * second, _WINDOW) - mean_1 * mean_2) / np.sqrt(variance_1 * variance_2)


def _box(plane: np.ndarray, side: int) -> np.ndarray:
    return cv2.boxFilter(plane, -1, (side, side), borderType=cv2.BORDER_REFLECT)


@lru_cache(maxsize=8)
def _grid(height: int, width: int) -> np.ndarray:
    return np.mgrid[:height, :width].astype(np.float32)


@lru_cache(maxsize=1)
def _detector() -> cv2.SIFT:
    return cv2.SIFT_create(nfeatures=MAX_KEYPOINTS, contrastThreshold=0.01, edgeThreshold=15, sigma=1.2)


def find_copies(grey: np.ndarray) -> list[Copy]:
    """Maps of the picture (H, W) uint8 to itself that several keypoints agree on, best first, at most `MAX_COPIES`."""
    keypoints, descriptors = _detector().detectAndCompute(grey, None)
    if len(keypoints) < 2 * LEAST_MATCHES:
        return []
    points = np.array([(*point.pt, point.size, point.angle) for point in keypoints], np.float32)
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-6))  # RootSIFT
    copies = _agreeing(points, points, points[:, 0], 2 - 2 * descriptors @ descriptors.T, least_shift=20)
    right = grey.shape[1] - 1
    mirrored = points.copy()
    mirrored[:, 0], mirrored[:, 3] = right - points[:, 0], (180 - points[:, 3]) % 360
    distances = 2 - 2 * descriptors @ descriptors[:, _MIRROR].T
    back = np.array([[-1, 0, right], [0, 1, 0]], np.float64)
    for copy in _agreeing(points, mirrored, points[:, 0], distances, least_shift=12):
        copies.append(Copy(back @ np.vstack([copy.matrix, [0, 0, 1]]), copy.matches))
    return sorted(copies, key=lambda copy: -copy.matches)[:MAX_COPIES]


def _agreeing(
    points: np.ndarray, others: np.ndarray, true_x: np.ndarray, distances: np.ndarray, least_shift: int
) -> list[Copy]:
    """Groups of matches on one map each. `points`, `others` are rows (x, y, size, angle); `true_x` of `others` in the
    picture; `distances` (n, n) of the descriptors, changed in place."""
    y = points[:, 1]
    distances[(points[:, None, 0] - true_x) ** 2 + (y[:, None] - y) ** 2 < least_shift**2] = 9
    best = distances.argmin(axis=1)
    nearest = distances[np.arange(len(best)), best]
    is_elsewhere = (others[:, 0] - others[best, 0][:, None]) ** 2 + (
        others[:, 1] - others[best, 1][:, None]
    ) ** 2 > 8**2
    second = np.where(is_elsewhere, distances, 9).min(axis=1)
    scale = others[best, 2] / points[:, 2]
    turn = (others[best, 3] - points[:, 3] + 180) % 360 - 180
    is_match = (nearest < _MAX_DISTANCE) & (nearest < _MAX_RATIO * second) & (np.abs(turn) < _MAX_ANGLE)
    index = np.flatnonzero(is_match & (scale > _SCALES[0]) & (scale < _SCALES[1]))
    if len(index) < LEAST_MATCHES:
        return []
    source, target = points[index, :2].astype(np.float64), others[best[index], :2].astype(np.float64)
    radians = np.deg2rad(turn[index])
    cos, sin = scale[index] * np.cos(radians), scale[index] * np.sin(radians)
    linear = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)  # (k, 2, 2), of each match alone
    steps = source[None] - source[:, None]  # (k, k, 2)
    errors = target[:, None] + np.einsum("kij,knj->kni", linear, steps) - target[None]
    agrees = np.hypot(*errors.transpose(2, 0, 1)) < 3 + 0.08 * np.hypot(*steps.transpose(2, 0, 1))
    copies, is_free = [], np.ones(len(index), bool)
    for _ in range(MAX_COPIES):
        counts = (agrees & is_free).sum(axis=1)
        leader = int(counts.argmax())
        if counts[leader] < LEAST_MATCHES:
            break
        group = np.flatnonzero(agrees[leader] & is_free)
        is_free[group] = False
        copies += _fit(source[group], target[group], linear[leader])
    return copies


def _fit(source: np.ndarray, target: np.ndarray, linear: np.ndarray, ridge: float = 200.0) -> list[Copy]:
    """Affine least squares on (k, 2) points, drawn towards the linear part `linear` (what few or collinear points leave
    open), twice without points more than 2 px off. Empty when too few different places remain."""
    kept = np.ones(len(source), bool)
    for _ in range(3):
        middle, aim = source[kept].mean(axis=0), target[kept].mean(axis=0)
        a, b = source[kept] - middle, target[kept] - aim
        matrix = (b.T @ a + ridge * linear) @ np.linalg.inv(a.T @ a + ridge * np.eye(2))
        origin = aim - matrix @ middle
        kept = np.hypot(*(source @ matrix.T + origin - target).T) < 2
        places = len(np.unique(np.rint(source[kept]), axis=0))
        if places < LEAST_MATCHES:
            return []
    return [Copy(np.column_stack([matrix, origin]), places)]
