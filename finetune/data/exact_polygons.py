"""A mask as polygons that rasterise back to exactly that mask, at any number of points; for formats without mask files.

No simplification (`masks.polygons_from_mask` does that). Holes hang on their region by seams that run along the axes:
`rasterize_polygons` counts those exactly, and the time is linear in the contours' length.
"""

from __future__ import annotations

import numpy as np

from finetune.data.masks import _contour_regions
from finetune.schema import Polygon


def exact_polygons(mask: np.ndarray) -> tuple[Polygon, ...]:
    """One polygon per 8-connected region of an (H, W) mask, largest first; `()` for an empty mask."""
    regions = _contour_regions((np.asarray(mask) != 0).astype(np.uint8), mask.size + 1)
    return tuple(_with_holes(rings) for rings in regions)


def _with_holes(rings: list[np.ndarray]) -> Polygon:
    outer, *holes = [[(float(x), float(y)) for x, y in ring] for ring in rings]
    if not holes:
        return tuple(outer)
    anchor = outer[0]
    points = [*outer, anchor]
    for hole in holes:
        corner = (hole[0][0], anchor[1])
        points += [corner, *hole, hole[0], corner, anchor]
    return tuple(points[:-1])  # the schema leaves the closing point out
