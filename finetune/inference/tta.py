"""Test-time augmentation: heads also read mirrored and transposed copies of a picture; their logits are averaged.

A copy keeps the picture's 8x8 grid. Traces of JPEG are read on blocks that begin at the left and upper edge; mirroring
a picture whose side is no multiple of 8 would move them off that grid (docs/experiments.md, round 13, has what that
costs). So the remainder of the side is cut off before mirroring and filled up behind it, and no map is read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from finetune.config import TestTimeAugmentation

GRID = 8
"""Side of a JPEG block in pixels."""


class View(NamedTuple):
    """A copy of a picture: mirrored top to bottom, mirrored left to right, then transposed."""

    vertical: bool
    horizontal: bool
    transposed: bool

    def of(self, picture: Image.Image) -> Image.Image:
        """The copy: of the same size, or with the sides exchanged."""
        if self == IDENTITY:
            return picture
        pixels = np.asarray(picture)
        axes = [axis for axis, is_mirrored in enumerate((self.vertical, self.horizontal)) if is_mirrored]
        padding = [(0, 0)] * pixels.ndim
        for axis in axes:
            rest = _rest(pixels.shape[axis])
            pixels = np.flip(pixels.take(range(pixels.shape[axis] - rest), axis), axis)
            padding[axis] = (0, rest)
        pixels = np.pad(pixels, padding, mode="symmetric")
        return Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1) if self.transposed else pixels))

    def back(self, scores: np.ndarray) -> np.ndarray:
        """A map of the copy as a map of the picture.

        Args:
            scores: (H, W) or, of a transposed copy, (W, H) float32, in the copy's pixels.

        Returns:
            (H, W) float32; NaN where the copy does not show the picture (at most 7 rows and columns at the end).
        """
        found = scores.T if self.transposed else scores
        for axis, is_mirrored in enumerate((self.vertical, self.horizontal)):
            if not is_mirrored:
                continue
            rest = _rest(found.shape[axis])
            found = np.flip(found.take(range(found.shape[axis] - rest), axis), axis)
            found = np.pad(found, [(0, rest if axis == k else 0) for k in range(2)], constant_values=np.nan)
        return found


IDENTITY = View(False, False, False)

VIEWS: dict[TestTimeAugmentation, tuple[View, ...]] = {
    "none": (IDENTITY,),
    "hflip": (IDENTITY, View(False, True, False)),
    "flips": tuple(View(v, h, False) for v in (False, True) for h in (False, True)),
    "dihedral": tuple(View(v, h, t) for t in (False, True) for v in (False, True) for h in (False, True)),
}
"""Copies whose logits are averaged, the picture itself first: 1, 2, 4 and 8."""


def mean_map(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of (H, W) float32 maps where they are numbers; the first has no NaN."""
    if len(maps) == 1:
        return maps[0]
    return np.asarray(np.nanmean(np.stack(maps), axis=0), dtype=np.float32)


def _rest(side: int) -> int:
    """Pixels behind the last whole block; none where there is no whole block."""
    return side % GRID if side >= GRID else 0
