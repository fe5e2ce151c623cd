"""Content-aware fill: a hole is filled with patches of the same picture so that every patch of the result looks like a
patch of the known part (Wexler et al. 2007), coarse to fine, patches found by a PatchMatch search (Barnes et al. 2009)
that treats all pixels at once. Numpy and OpenCV only.

Levels of the pyramid are 8 bit and distances are sums of squared whole numbers below 2^24, so every comparison is exact
in float32: the result depends on the generator alone, not on threads or the order of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from finetune.data.synthesis.degradations import to_uint8
from finetune.data.synthesis.regions import DoesNotFitError

RADIUS = 2
"""Patches are 5 x 5 pixels on every level: as wide as 40 pixels on the coarsest of four levels."""
COARSEST_SIDE = 24
"""The shorter side is halved while it stays at or above this."""
MAX_PAIRS = 1_000_000
"""Levels with at most so many pairs of a wanted and a source patch are searched completely."""
SMOOTH = 6
"""Levels: where the patches over a pixel agree this well they are averaged, so that no seam shows in a smooth place;
elsewhere averaging would blur, and the pixel of the best patch is copied."""
_STEPS = RADIUS - np.indices((2 * RADIUS + 1,) * 2).reshape(2, -1)
"""(2, 25) rows and columns from the centre of each patch over a pixel to that pixel."""
_NEAREST_FIRST = np.argsort((_STEPS**2).sum(axis=0), kind="stable")
"""Order in which ties are broken: the pixel's own patch first."""


@dataclass
class _Level:
    """One level of the pyramid.

    Args:
        image: (h, w, C) uint8, the hole filled with the current estimate.
        hole: (h, w) bool, what is to be filled.
        wanted_yx: (2, M) int64, centres of the patches that overlap the hole.
        is_source: (h, w) bool, centres of the patches without a pixel of the hole, wholly inside the picture.
        confidence: (h, w) float32, larger near the known part, from where structure grows inwards.
        matches: (2, h, w) int64, row and column of the source patch found for each wanted patch, elsewhere -1.
    """

    image: np.ndarray
    hole: np.ndarray
    wanted_yx: np.ndarray
    is_source: np.ndarray
    confidence: np.ndarray
    matches: np.ndarray


def patch_fill(image: np.ndarray, hole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fill a hole with content from the rest of the picture.

    Args:
        image: (H, W, 3) uint8; values inside the hole are never looked at.
        hole: (H, W) bool.
        rng: of the random search.

    Returns:
        (H, W, 3) uint8, equal to `image` outside the hole.

    Raises:
        DoesNotFitError: the hole leaves too little of the picture to copy from.
    """
    is_grey = bool((image[..., :1] == image).all())
    known = _pyramid(image[..., :1] if is_grey else image, hole)
    level: _Level | None = None
    for index in reversed(range(len(known))):
        level, is_first = _next_level(*known[index], level, rng), level is None
        for step in range(5 if is_first else 2 if index else 1):
            costs = _search(level, rng, is_complete=is_first, is_thorough=index > 0 and step == 0)
            _fill(level, costs, is_last=index == 0)
    assert level is not None
    return np.where(hole[..., None], level.image, image)


def _pyramid(image: np.ndarray, hole: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Levels (image, hole) from fine to coarse; a coarse pixel averages the known pixels below it."""
    levels = [(image, hole)]
    while min(hole.shape) >= 2 * COARSEST_SIDE:
        size = ((hole.shape[1] + 1) // 2, (hole.shape[0] + 1) // 2)
        weight = (~hole).astype(np.float32)[..., None]
        share = cv2.resize(weight, size, interpolation=cv2.INTER_AREA)[..., None]
        total = cv2.resize(image * weight, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)
        image, hole = to_uint8(total / np.maximum(share, 1e-3)), share[..., 0] < 0.5
        levels.append((image, hole))
    return levels


def _next_level(image: np.ndarray, hole: np.ndarray, coarse: _Level | None, rng: np.random.Generator) -> _Level:
    """A level whose matches are those of the next coarser one, enlarged, and what they give; the coarsest is smooth."""
    height, width = hole.shape
    if coarse is None:
        smooth = cv2.inpaint(image, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA).reshape(image.shape)
        image = np.where(hole[..., None], smooth, image)
    touched = cv2.dilate(hole.astype(np.uint8), np.ones((2 * RADIUS + 1,) * 2, np.uint8)).astype(bool)
    is_source = ~touched
    is_source[:RADIUS] = is_source[-RADIUS:] = is_source[:, :RADIUS] = is_source[:, -RADIUS:] = False
    if is_source.sum() < 16:
        raise DoesNotFitError("the hole leaves too little to copy from")
    depth = cv2.distanceTransform(np.pad(hole, 1, mode="edge").astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    confidence = np.float32(1.3) ** -np.minimum(depth, 40)
    wanted = np.stack(np.nonzero(touched))
    matches = np.full((2, height, width), -1, dtype=np.int64)
    level = _Level(image, hole, wanted, is_source, confidence, matches)
    if coarse is not None:
        matches[:, wanted[0], wanted[1]] = _enlarged_matches(level, coarse.matches, rng)
        # Copied at this level's own resolution: an enlarged coarse estimate is blurred and would find blurred patches.
        rows, columns = np.nonzero(hole)
        level.image = image.copy()
        level.image[rows, columns] = image[matches[0, rows, columns], matches[1, rows, columns]]
    return level


def _enlarged_matches(level: _Level, coarse: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(2, M) matches of a level from the (2, h/2, w/2) ones of the coarser level; drawn where those do not fit."""
    rows, columns = level.wanted_yx
    height, width = level.hole.shape
    above = coarse[:, np.minimum(rows // 2, coarse.shape[1] - 1), np.minimum(columns // 2, coarse.shape[2] - 1)]
    found = np.clip(2 * above + level.wanted_yx % 2, 0, np.array([[height - 1], [width - 1]]))
    is_bad = (above[0] < 0) | ~level.is_source[found[0], found[1]]
    sources = np.stack(np.nonzero(level.is_source))
    found[:, is_bad] = sources[:, rng.integers(sources.shape[1], size=int(is_bad.sum()))]
    return found


def _search(level: _Level, rng: np.random.Generator, is_complete: bool, is_thorough: bool) -> np.ndarray:
    """Improve the matches and return their (M,) costs, sums of squared differences.

    A level that is small enough is searched completely. Otherwise a patch tries what its neighbours found, moved along,
    and with `is_thorough` also places drawn around its own match within ever smaller reach.
    """
    rows, columns = level.wanted_yx
    windows = _windows(level.image)
    wanted = _patches(windows, level.wanted_yx)
    sources = np.stack(np.nonzero(level.is_source))
    if is_complete or wanted.shape[0] * sources.shape[1] <= MAX_PAIRS:
        return _search_all(level, windows, wanted, sources)
    height, width = level.hole.shape
    best = level.matches[:, rows, columns]  # (2, M)
    costs = _costs(windows, wanted, best)

    def consider(candidate: np.ndarray) -> None:
        y, x = candidate
        fits = (y >= 0) & (y < height) & (x >= 0) & (x < width) & ((y != best[0]) | (x != best[1]))
        fits[fits] = level.is_source[y[fits], x[fits]]
        index = np.flatnonzero(fits)
        new = _costs(windows, wanted[index], candidate[:, index])
        better = index[new < costs[index]]
        costs[better] = new[new < costs[index]]
        best[:, better] = candidate[:, better]

    for jump in (2, 1) if is_thorough else (1,):
        for dy, dx in ((jump, 0), (-jump, 0), (0, jump), (0, -jump)):
            near = level.matches[:, np.clip(rows + dy, 0, height - 1), np.clip(columns + dx, 0, width - 1)]
            consider(np.where(near[:1] >= 0, near - np.array([[dy], [dx]]), -1))
            level.matches[:, rows, columns] = best
    reach = max(height, width) // 2 if is_thorough else 0
    while reach >= 2:
        consider(best + rng.integers(-reach, reach + 1, size=best.shape))
        reach //= 4
    level.matches[:, rows, columns] = best
    return costs


def _windows(image: np.ndarray) -> np.ndarray:
    """(h, w, 5, 5 C) view: the patch around every pixel, mirrored at the border."""
    padded = cv2.copyMakeBorder(image, *[RADIUS] * 4, cv2.BORDER_REFLECT_101).reshape(image.shape[0] + 2 * RADIUS, -1)
    side, channels = 2 * RADIUS + 1, image.shape[2]
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side * channels))[:, ::channels]


def _patches(windows: np.ndarray, at_yx: np.ndarray) -> np.ndarray:
    """(M, 25 C) float32 of whole numbers: the patches around the (2, M) given pixels."""
    return windows[at_yx[0], at_yx[1]].reshape(at_yx.shape[1], -1).astype(np.float32)


def _costs(windows: np.ndarray, wanted: np.ndarray, at_yx: np.ndarray) -> np.ndarray:
    difference = _patches(windows, at_yx)
    difference -= wanted
    return np.einsum("ij,ij->i", difference, difference)


def _search_all(level: _Level, windows: np.ndarray, wanted: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Best of all source patches for each wanted one; writes the matches, returns their (M,) costs."""
    pool = _patches(windows, sources)
    distance = np.einsum("ij,ij->i", pool, pool) - 2 * (wanted @ pool.T)  # (M, N), without the constant |wanted|^2
    chosen = distance.argmin(axis=1)
    level.matches[:, level.wanted_yx[0], level.wanted_yx[1]] = sources[:, chosen]
    return distance[np.arange(len(chosen)), chosen] + np.einsum("ij,ij->i", wanted, wanted)


def _fill(level: _Level, costs: np.ndarray, is_last: bool) -> None:
    """Give every pixel of the hole the value that the most trusted of the patches over it has there: cheap patches near
    the known part are trusted more. Copying instead of averaging is what keeps texture and grain."""
    rows, columns = np.nonzero(level.hole)
    trust = np.zeros((level.hole.shape[0] + 2 * RADIUS, level.hole.shape[1] + 2 * RADIUS), dtype=np.float32)
    inner = trust[RADIUS:-RADIUS, RADIUS:-RADIUS]
    inner[level.wanted_yx[0], level.wanted_yx[1]] = 1 / (costs + max(float(np.percentile(costs, 75)), 1.0))
    inner *= level.confidence
    side = 2 * RADIUS + 1
    around = np.lib.stride_tricks.sliding_window_view(trust, (side, side))[rows, columns].reshape(-1, side * side)
    step = _STEPS[:, _NEAREST_FIRST[around[:, _NEAREST_FIRST].argmax(axis=1)]]  # (2, N), from the patch to the pixel
    source = level.matches[:, rows - step[0], columns - step[1]] + step
    chosen = level.image[source[0], source[1]]
    if is_last:
        mean = _mean_proposal(level, rows, columns)
        agrees = np.abs(mean - chosen).max(axis=1, keepdims=True) < SMOOTH
        chosen = np.where(agrees, to_uint8(mean), chosen)
    level.image[rows, columns] = chosen


def _mean_proposal(level: _Level, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(N, C) float32 mean of what the 3 x 3 nearest patches propose for each of N pixels."""
    height, width = level.hole.shape
    total = np.zeros((len(rows), level.image.shape[2]), dtype=np.float32)
    for dy, dx in ((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        y, x = np.clip(rows - dy, 0, height - 1), np.clip(columns - dx, 0, width - 1)
        source = level.matches[:, y, x] + np.stack([rows - y, columns - x])
        total += level.image[source[0], source[1]]
    return total / 9
