"""Small pictures of the examples an audit names: the image with its tampered region tinted, a mask that does not fit.

What cannot be opened gives no picture; the finding itself says why.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from finetune.data.images import decode, load_image
from finetune.data.masks import load_mask
from finetune.errors import DataFormatError
from finetune.markup import data_uri
from finetune.schema import ImageInput, Record

SIDE = 200
MAX_IMAGES = 4
_TINT = np.array([255, 64, 48], np.float32)
_QUALITY = 80


class Thumbnail(NamedTuple):
    """A picture for the page: its data URI ("" where it cannot be opened), what it is, and its label."""

    uri: str
    kind: str  # "image" or "mask"
    label: int | None


def thumbnails(record: Record, image: int | None) -> list[Thumbnail]:
    """Of one image of a record, or of its first few where none is meant."""
    places = range(len(record.images))[:MAX_IMAGES] if image is None else [image]
    shown = []
    for place in places:
        target = record.targets[place]
        try:
            rgb = load_image(record.images[place])
        except DataFormatError:
            shown.append(Thumbnail("", "image", target.label))
            continue
        small = rgb.copy()
        small.thumbnail((SIDE, SIDE))
        try:
            mask = load_mask(target, (rgb.height, rgb.width))
        except DataFormatError:
            mask = None
            shown += _mask_file(target.mask_path)
        pixels = np.asarray(small)
        if mask is not None and mask.any():
            pixels = _tinted(pixels, mask)
        shown.insert(0, Thumbnail(data_uri(Image.fromarray(pixels), _QUALITY), "image", target.label))
    return shown


def _mask_file(path: str | None) -> list[Thumbnail]:
    """The mask as it is, where it does not fit its image."""
    if not path:
        return []
    try:
        mask = decode(ImageInput(path=path)).convert("RGB")
    except (DataFormatError, ValueError):
        return [Thumbnail("", "mask", None)]
    mask.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
    return [Thumbnail(data_uri(mask, _QUALITY), "mask", None)]


def _tinted(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 with the mask, of another size, half transparent over it and outlined."""
    height, width = pixels.shape[:2]
    area = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)  # (h, w)
    marked = area > min(0.5, float(area.max()) / 2)  # a speck stays to be seen
    edge = marked & ~cv2.erode(marked.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    alpha = np.where(edge, 1.0, np.where(marked, 0.4, 0.0))[..., None]  # (h, w, 1)
    return np.rint(pixels * (1 - alpha) + _TINT * alpha).astype(np.uint8)
