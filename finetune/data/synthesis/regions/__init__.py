"""Shapes of tampered regions: drawn outlines, object-like segments of the picture, lines of text; feathered edges.

Only binary shapes and their soft edges; what happens inside them belongs to `operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from finetune.data.synthesis.regions.outlines import (
    DoesNotFitError,
    draw_outline,
    draw_share,
    fill_outline,
    has_size,
    soft_edge,
)
from finetune.data.synthesis.regions.segments import cluster_region, segment_region
from finetune.data.synthesis.regions.text import text_region

__all__ = ["FOUND_SHAPES", "SHAPES", "DoesNotFitError", "draw_region", "soft_edge"]

FoundShape = Callable[
    [np.ndarray, np.random.Generator, tuple[float, float], str], tuple[np.ndarray, dict[str, Any]] | None
]
FOUND_SHAPES: dict[str, FoundShape] = {
    "segment": cluster_region,
    "superpixels": segment_region,
    "felzenszwalb": segment_region,
    "text": text_region,
}
"""Shapes looked for in the picture: (image, generator, area range, shape) → region and parameters, None where there is
no such thing of that size."""
SHAPES = ("blob", "polygon", "ellipse", *FOUND_SHAPES)
MAX_TRIES = 12


def draw_region(
    image: np.ndarray, rng: np.random.Generator, area_range: tuple[float, float], weights: Mapping[str, float]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw one region of a wanted size.

    Args:
        image: (H, W, 3) uint8 RGB; gives the size and, for `FOUND_SHAPES`, the shape.
        rng: the sample's own generator.
        area_range: least and largest share of the image, in (0, 1); the share is drawn log-uniformly.
        weights: relative weight of each name of `SHAPES`. A found shape that the picture does not hold in that size is
            drawn again among the others, so `text` falls on pictures with text alone; a `blob` where nothing is left.

    Returns:
        (H, W) bool, one connected piece, and its parameters.

    Raises:
        DoesNotFitError: no shape of that size after `MAX_TRIES` tries.
    """
    left = {name: float(weights.get(name, 0.0)) for name in SHAPES}
    shape = _draw_name(left, rng)
    while shape in FOUND_SHAPES:
        found = FOUND_SHAPES[shape](image, rng, area_range, shape)
        if found is not None:
            return found[0], {"shape": shape, **found[1]}
        left[shape] = 0.0
        shape = _draw_name(left, rng)
    size_hw = image.shape[:2]
    for _ in range(MAX_TRIES):
        share = draw_share(area_range, rng)
        region = fill_outline(draw_outline(shape, rng), size_hw, share, rng)
        if has_size(region, area_range):
            return region, {"shape": shape}
    raise DoesNotFitError(f"no {shape} of {area_range} of an image of {size_hw} after {MAX_TRIES} tries")


def _draw_name(weights: Mapping[str, float], rng: np.random.Generator) -> str:
    p = np.array(list(weights.values()))
    return "blob" if p.sum() <= 0 else list(weights)[int(rng.choice(len(p), p=p / p.sum()))]
