"""Records about candidate regions, mirrored and turned for training: image and boxes change, ids and answer do not.

A list of coordinates can be learned by heart; a mirrored one cannot. Which way a draw is shown follows from seed and
position, so that resumed runs see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from finetune.data.regions.text import REGIONS, BoxXyxy, record_regions
from finetune.schema import Record

Kind = Literal["none", "horizontal", "all"]
_WAYS: dict[Kind, int] = {"none": 1, "horizontal": 2, "all": 8}
"""How many ways an image may be shown in: bit 0 left and right, 1 top and bottom, 2 rows and columns exchanged."""


def mirrored(
    record: Record, images: Sequence[Image.Image], kind: Kind, draw: tuple[int, int]
) -> tuple[Record, list[Image.Image]]:
    """A record and its decoded image as one draw shows them, each way equally often.

    Left as they are: records without candidates, and those with pixel targets, which would not follow.

    Args:
        images: upright, the record's.
        draw: seed and position of the draw.

    Raises:
        DataFormatError: damaged candidates.
    """
    has_pixels = any(target.has_mask or target.polygons for target in record.targets)
    if kind == "none" or has_pixels or record_regions(record) is None:
        return record, list(images)
    way = int(np.random.default_rng(draw).integers(_WAYS[kind]))
    (image,) = images
    regions: list[dict[str, Any]] = [
        {**entry, "box_xyxy": list(mirrored_box(entry["box_xyxy"], (image.height, image.width), way))}
        for entry in record.provenance[REGIONS]
    ]
    shown = replace(record, provenance={**record.provenance, REGIONS: regions})
    return shown, [_turned(image, way)]


def mirrored_box(box: Sequence[float], size_hw: tuple[int, int], way: int) -> BoxXyxy:
    """A half-open box in pixels of the mirrored image.

    Args:
        size_hw: of the image before.
        way: 0 to 7, see `_WAYS`.
    """
    x1, y1, x2, y2 = box
    height, width = size_hw
    if way & 1:
        x1, x2 = width - x2, width - x1
    if way & 2:
        y1, y2 = height - y2, height - y1
    return (y1, x1, y2, x2) if way & 4 else (x1, y1, x2, y2)


def _turned(image: Image.Image, way: int) -> Image.Image:
    steps = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE)
    for bit, step in enumerate(steps):
        if way & (1 << bit):
            image = image.transpose(step)
    return image
