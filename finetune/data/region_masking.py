"""Progressive region masking: cells of tampered and authentic areas are hidden, more and more over training.

Hidden cells of a tampered area leave the pixel target, and so the polygons of an answer made from it. The same share of
cells is hidden inside and outside a tampered area and in authentic images, so that what is hidden tells nothing. Part
of every tampered area stays visible (`keep_tampered`): no label changes. Which cells, follows from seed and draw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from finetune.config import RegionMaskingConfig
from finetune.schema import Record

MASKED = 128
"""Grey level of `fill: grey`."""


class Draw(int):
    """The index of a record, with its place among all the draws of a run: int(draw) is the index, `position` from 0."""

    position: int

    def __new__(cls, index: int, position: int = 0) -> Draw:
        """A record's index that knows when it is drawn."""
        draw = super().__new__(cls, index)
        draw.position = position
        return draw

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        """For worker processes."""
        return Draw, (int(self), self.position)


@dataclass
class RegionMasking:
    """What is hidden at which draw of a run.

    config: the schedule and the kind of cells. seed: decides, with a draw's position, which cells.
    total_draws: of the whole run; progress is position / total_draws.
    """

    config: RegionMaskingConfig
    seed: int
    total_draws: int

    def share(self, progress: float) -> float:
        """Share of the cells that is hidden at a progress in [0, 1]."""
        config = self.config
        span = max(config.finish - config.begin, 1e-9)
        done = min(max((progress - config.begin) / span, 0.0), 1.0)
        if config.shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        elif config.shape == "steps":
            done = math.floor(done * 4 + 1e-9) / 4
        return config.start_share + (config.end_share - config.start_share) * done

    def apply(
        self, draw: Draw, number: int, image: Image.Image, mask: np.ndarray, processed_hw: tuple[int, int]
    ) -> tuple[Image.Image, np.ndarray]:
        """One image of a draw with cells hidden, and its pixel target without them.

        Args:
            number: of the image in its record.
            image: RGB, upright. mask: (H, W) uint8 of 0/1 at its size.
            processed_hw: size the model sees it at, which the cells are a grid on.

        Returns:
            New image and mask, or those given where this draw hides nothing.
        """
        share = self.share(draw.position / max(self.total_draws, 1))
        rng = np.random.default_rng(_seed(self.seed, draw.position, number))
        is_spared = np.random.default_rng(_seed(self.seed, draw.position)).random() >= self.config.probability
        if is_spared or share <= 0:
            return image, mask
        grid = _cells(image.height, image.width, processed_hw, self.config.cell)  # (H, W)
        hidden = self._choose(grid, mask, share, rng)  # (H, W)
        if not hidden.any():
            return image, mask
        pixels = np.asarray(image.convert("RGB")).copy()
        pixels[hidden] = self._fill(pixels, hidden, rng)
        return Image.fromarray(pixels), np.where(hidden, 0, mask).astype(np.uint8)

    def _choose(self, grid: np.ndarray, mask: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
        """(H, W) bool of hidden pixels: `share` of the cells with tampered pixels, and of those without."""
        num_cells = int(grid.max()) + 1
        inside = np.bincount(grid.ravel(), weights=mask.ravel(), minlength=num_cells)  # tampered pixels of each cell
        chosen = np.zeros(num_cells, bool)
        left = float(inside.sum())
        least = left * self.config.keep_tampered
        for cells in (np.flatnonzero(inside > 0), np.flatnonzero(inside == 0)):
            wanted = int(share * len(cells) + rng.random())  # rounded at random, so small areas get their share too
            for cell in rng.permutation(cells):
                if wanted == 0:
                    break
                if inside[cell] and left - inside[cell] < max(least, 1.0):
                    continue  # enough of the area must stay
                chosen[cell], left, wanted = True, left - inside[cell], wanted - 1
        return chosen[grid]

    def _fill(self, pixels: np.ndarray, hidden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.config.fill == "grey":
            return np.full(3, MASKED, np.uint8)
        if self.config.fill == "noise":
            return rng.integers(0, 256, (int(hidden.sum()), 3), dtype=np.uint8)
        return pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)


def mask_regions(
    masking: RegionMasking,
    draw: Draw,
    record: Record,
    images: Sequence[Image.Image],
    masks: Sequence[np.ndarray | None],
    processed: Sequence[tuple[int, int]],
) -> tuple[Record, list[Image.Image], list[np.ndarray | None]]:
    """A record's images, pixel targets and polygons as this draw shows them.

    Left as they are: images without a pixel target, whose tampered area might be hidden unseen, and records with a
    conversation of their own, whose answers could not follow.
    """
    if record.turns:
        return record, list(images), list(masks)
    shown, left, targets = [], [], []
    for number, (image, mask, target) in enumerate(zip(images, masks, record.targets, strict=True)):
        new_image, new_mask = image, mask
        if mask is not None:
            new_image, new_mask = masking.apply(draw, number, image, mask, processed[number])
        shown.append(new_image)
        left.append(new_mask)
        is_changed = target.label == 1 and new_mask is not mask
        targets.append(replace(target, polygons=None) if is_changed else target)  # traced from what is left
    return replace(record, targets=tuple(targets)), shown, left


def _cells(height: int, width: int, processed_hw: tuple[int, int], cell: int) -> np.ndarray:
    """(H, W) number of the cell each pixel of the original image is in."""
    counts = [max(1, round(side / cell)) for side in processed_hw]
    rows = np.minimum(np.arange(height) * counts[0] // height, counts[0] - 1)
    columns = np.minimum(np.arange(width) * counts[1] // width, counts[1] - 1)
    return rows[:, None] * counts[1] + columns[None, :]


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little")
