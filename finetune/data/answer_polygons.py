"""Polygons as an answer writes them: whole numbers in the frame the model is taught, within a budget, and back again.

Frames count from the upper left corner of the image along pixel edges, x to the right, y down; the image's right edge
is its width (or 1000), not one less. `absolute` is Qwen2.5-VL's convention, `relative` Qwen2-VL's. Text is written in
chat.py and read in finetune.metrics.text; no tokenizer is known here, a budget in tokens is given a counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune.data.masks import polygons_from_mask
from finetune.schema import Polygon

Coordinates = Literal["absolute", "relative"]

RELATIVE_SCALE = 1000
"""Width and height of every image in `relative` coordinates."""

MIN_POINTS, MIN_TOKENS = 4, 64
"""What one image is given in any case: one box, which takes at most 8 coordinates of 5 digits with their separators."""


@dataclass(frozen=True)
class PolygonFrame:
    """Between pixels of the original image and the whole numbers of an answer.

    Args:
        coordinates: `absolute`: pixels of the processed (smart-resized) image, x in 0..width, y in 0..height;
            `relative`: thousandths of width and height, 0..1000, the same before and after resizing.
        original_hw: (H, W) of the upright original image.
        processed_hw: (H, W) the model sees.
    """

    coordinates: Coordinates
    original_hw: tuple[int, int]
    processed_hw: tuple[int, int]

    @property
    def extent_hw(self) -> tuple[int, int]:
        """The largest y and x that an answer can hold."""
        return self.processed_hw if self.coordinates == "absolute" else (RELATIVE_SCALE, RELATIVE_SCALE)

    def write(self, polygons: Iterable[Polygon]) -> tuple[Polygon, ...]:
        """Polygons of the original image as whole numbers of this frame.

        Each coordinate is scaled by extent / original size and rounded to the nearest whole number, a half to the even
        one; the error is at most half a unit. Points that fall together or onto a line with their neighbours are left
        out, since they change nothing. Regions that shrink to a line are left out too; where all do, the box of the
        largest remains, at least one unit wide and high.
        """
        scaled = scale_polygons(polygons, self.original_hw, self.extent_hw)
        tidy = [_without_idle_points([(round(x), round(y)) for x, y in polygon]) for polygon in scaled]
        kept = [points for points in tidy if len(points) >= 3]
        if scaled and not kept:
            kept = [self._smallest_box(scaled)]
        return tuple(tuple((float(x), float(y)) for x, y in points) for points in kept)

    def read(self, polygons: Iterable[Polygon]) -> tuple[Polygon, ...]:
        """Coordinates of an answer in pixels of the upright original image, unrounded; beyond the image as written."""
        return scale_polygons(polygons, self.extent_hw, self.original_hw)

    def _smallest_box(self, polygons: Sequence[Polygon]) -> list[tuple[int, int]]:
        spans = [np.ptp(np.asarray(polygon), axis=0).sum() for polygon in polygons]
        points = np.asarray(polygons[int(np.argmax(spans))])  # (P, 2) as x, y
        limit = np.array(self.extent_hw[::-1])
        low = np.clip(np.floor(points.min(axis=0)).astype(int), 0, limit - 1)
        high = np.clip(np.maximum(np.floor(points.max(axis=0)).astype(int), low + 1), 1, limit)
        (x0, y0), (x1, y1) = low.tolist(), high.tolist()
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


@dataclass(frozen=True)
class PolygonBudget:
    """How much the polygons of one image may take of an answer.

    Args:
        limit: points, or tokens where `count_tokens` is given; at least `MIN_POINTS` or `MIN_TOKENS`.
        count_tokens: tokens of the text of polygons that `PolygonFrame.write` returned.
    """

    limit: int
    count_tokens: Callable[[Sequence[Polygon]], int] | None = None

    def admits(self, polygons: Sequence[Polygon], frame: PolygonFrame) -> bool:
        """Whether polygons in pixels of the original image may be written as they stand."""
        if self.count_tokens is None:
            return sum(map(len, polygons)) <= self.limit
        return self.count_tokens(frame.write(polygons)) <= self.limit

    def trace(self, mask: np.ndarray, frame: PolygonFrame) -> tuple[Polygon, ...]:
        """The regions of a mask (H, W) in pixels of the original image, as finely as the budget allows.

        Under a budget in tokens the simplification is searched for the most points whose text fits; the number of
        regions is bounded so that each could be a box with the longest coordinates of the frame.
        """
        if self.count_tokens is None:
            return polygons_from_mask(mask, max_points=self.limit)
        height, width = frame.extent_hw
        corner = (float(width), float(height))
        box_tokens = self.count_tokens(((corner,) * 4,))
        return polygons_from_mask(
            mask,
            max_points=max(self.limit // 2, MIN_POINTS),  # a coordinate takes a token or more
            max_rings=max(self.limit // box_tokens, 1),
            fits=lambda polygons: self.admits(polygons, frame),
        )


def scale_polygons(
    polygons: Iterable[Polygon], from_hw: tuple[int, int], to_hw: tuple[int, int]
) -> tuple[Polygon, ...]:
    """Polygons of an image of size `from_hw` in the frame of its resized copy; unrounded."""
    y_scale, x_scale = to_hw[0] / from_hw[0], to_hw[1] / from_hw[1]
    return tuple(tuple((x * x_scale, y * y_scale) for x, y in polygon) for polygon in polygons)


def _without_idle_points(ring: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A closed ring without points on the line between their neighbours; fewer than three are left of a flat one."""
    kept: list[tuple[int, int]] = []
    for point in ring:
        while len(kept) > 1 and _is_flat(kept[-2], kept[-1], point):
            kept.pop()
        if not kept or kept[-1] != point:
            kept.append(point)
    while len(kept) > 2 and (_is_flat(kept[-2], kept[-1], kept[0]) or _is_flat(kept[-1], kept[0], kept[1])):
        del kept[-1 if _is_flat(kept[-2], kept[-1], kept[0]) else 0]
    return kept


def _is_flat(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    return (b[0] - a[0]) * (c[1] - b[1]) == (b[1] - a[1]) * (c[0] - b[0])
