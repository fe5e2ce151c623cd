"""The picture that goes with evidence in words: the image with its regions tinted, outlined and numbered alike."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.inference.visualization import UInt8, overlay_mask

_PLATE = (32, 36, 44)


def draw_overlay(
    picture: Image.Image,
    mask_scores: np.ndarray | None,
    boxes_xyxy: Sequence[tuple[int, int, int, int]],
    threshold: float,
    side: int,
) -> UInt8:
    """The image with its marked pixels tinted, outlined and the regions numbered as in the words: (h, w, 3) uint8.

    Args:
        boxes_xyxy: of the regions in the order of their numbers, in pixels of the original image.
        side: longer side of the result at most; lines are drawn at that size, so that they are never thin.
    """
    scale = min(1.0, side / max(picture.size))
    size_wh = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = np.asarray(picture if scale == 1 else picture.resize(size_wh, Image.Resampling.LANCZOS))
    if mask_scores is None:
        return small.copy()
    scores = np.asarray(mask_scores, dtype=np.float32)
    if scale < 1:
        scores = cv2.resize(scores, size_wh, interpolation=cv2.INTER_AREA)
    shown = overlay_mask(small, scores, threshold=threshold)
    return number_regions(shown, [(round(x * scale), round(y * scale)) for x, y, _, _ in boxes_xyxy])


def number_regions(image_rgb: UInt8, corners_xy: Sequence[tuple[int, int]]) -> UInt8:
    """Write 1, 2, ... on small dark plates at the upper left corners of regions, kept inside the image.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    picture = Image.fromarray(image_rgb)
    draw = ImageDraw.Draw(picture)
    size = max(11, round(max(picture.size) / 45))
    font = ImageFont.load_default(size)
    for number, (x, y) in enumerate(corners_xy, start=1):
        width, height = round(draw.textlength(str(number), font=font)) + size // 2, round(1.3 * size)
        left = min(max(0, x), max(0, picture.width - width))
        top = min(max(0, y), max(0, picture.height - height))
        draw.rectangle((left, top, left + width, top + height), fill=_PLATE)
        draw.text((left + size // 4, top + height / 2), str(number), fill="white", font=font, anchor="lm")
    return np.asarray(picture)
