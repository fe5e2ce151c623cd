"""Test-time augmentation: heads also read mirrored and transposed copies of a picture; their logits are averaged.

A copy keeps the grid of JPEG's blocks, which begin at the left and upper edge: 8x8 pixels, and 16x16 where colour is
stored at half the size (4:2:0). Mirroring a picture whose side is no multiple of 16 would move its traces off that grid
(docs/experiments.md, round 13, has what that costs). So the remainder of the side is cut off before mirroring and
filled up behind it, and no map is read there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from finetune.config import TestTimeAugmentation

GRIDS = (16, 8)
"""Sides in pixels that JPEG's blocks of colour and of brightness may have; the second for sides below the first."""


class View(NamedTuple):
    """A copy of a picture: mirrored top to bottom, mirrored left to right, then transposed."""

    vertical: bool
    horizontal: bool
    transposed: bool

    def of(self, picture: Image.Image) -> Image.Image:
        """The copy of an RGB picture: of the same size, or with the sides exchanged."""
        if self == IDENTITY:
            return picture
        pixels = np.asarray(picture)
        padding = [(0, 0)] * pixels.ndim
        for axis in self._mirrored:
            rest = _rest(pixels.shape[axis])
            pixels = np.flip(pixels.take(range(pixels.shape[axis] - rest), axis), axis)
            padding[axis] = (0, rest)
        pixels = np.pad(pixels, padding, mode="symmetric")
        return Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1) if self.transposed else pixels))

    def back(self, scores: np.ndarray) -> np.ndarray:
        """A map of the copy as a map of what it shows of the picture.

        Args:
            scores: (H, W) or, of a transposed copy, (W, H), in the copy's pixels.

        Returns:
            (h, w), the picture's upper left part, where h and w are at most 15 less than H and W.
        """
        found = scores.T if self.transposed else scores
        for axis in self._mirrored:
            shown = found.shape[axis] - _rest(found.shape[axis])
            found = np.flip(found.take(range(shown), axis), axis)
        return found

    @property
    def _mirrored(self) -> list[int]:
        return [axis for axis, is_mirrored in enumerate((self.vertical, self.horizontal)) if is_mirrored]


IDENTITY = View(False, False, False)

VIEWS: dict[TestTimeAugmentation, tuple[View, ...]] = {
    "none": (IDENTITY,),
    "hflip": (IDENTITY, View(False, True, False)),
    "flips": tuple(View(v, h, False) for v in (False, True) for h in (False, True)),
    "dihedral": tuple(View(v, h, t) for t in (False, True) for v in (False, True) for h in (False, True)),
}
"""Copies whose logits are averaged, the picture itself first: 1, 2, 4 and 8."""


class MeanMap:
    """Running mean of a picture's maps, each taken where its copy shows the picture; the first shows all of it."""

    def __init__(self, first: np.ndarray) -> None:
        self._sum = np.array(first, dtype=np.float32)
        self._count = np.ones_like(self._sum)

    def add(self, part: np.ndarray) -> None:
        """Take another map: (h, w) float32, the upper left part of the picture."""
        height, width = part.shape
        self._sum[:height, :width] += part
        self._count[:height, :width] += 1

    @property
    def mean(self) -> np.ndarray:
        """(H, W) float32."""
        return self._sum / self._count


def _rest(side: int) -> int:
    """Pixels behind the last whole block; none where there is no whole block."""
    return next((side % grid for grid in GRIDS if side >= grid), 0)
