"""The frame in which the model sees an image: `data.image_short_side` before Qwen2.5-VL's smart resize, and
`data.image_padding` behind it.

Both are kept on the image processor, so they are saved with a model and every user of the processor sees the same
frame. Pixels are resampled once, straight to the size after both resizes. Padding lies below and to the right of the
image and begins at a border of the tower's patches: coordinates mean the same with and without it.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from finetune.config import ImagePadding
from finetune.torchvision_compat import ensure_torchvision

SHORT_SIDE, PADDING = "image_short_side", "image_padding"
"""Attributes of the image processor, and keys of its file in a saved folder."""


def set_frame(image_processor: Any, short_side: int | None = None, padding: ImagePadding = "none") -> None:
    """Have a processor's images resized to a shorter side of so many pixels (None: not at all) and padded, whatever was
    saved."""
    for name, value in ((SHORT_SIDE, short_side), (PADDING, None if padding == "none" else padding)):
        if value is not None:
            setattr(image_processor, name, value)
        elif hasattr(image_processor, name):
            delattr(image_processor, name)


def is_padded(image_processor: Any) -> bool:
    """Whether the processor's images are padded to squares."""
    return getattr(image_processor, PADDING, None) is not None


def short_side_size(size_hw: tuple[int, int], image_processor: Any) -> tuple[int, int]:
    """(H, W) with the shorter side at the processor's number of pixels, the proportions kept; as it is without one."""
    pixels = getattr(image_processor, SHORT_SIDE, None)
    if pixels is None:
        return size_hw
    factor = pixels / min(size_hw)
    height, width = (max(round(side * factor), 1) for side in size_hw)
    return height, width


def processed_size(size_hw: tuple[int, int], image_processor: Any) -> tuple[int, int]:
    """(H, W) at which the model sees an image, padding left out, from its original size: `image_short_side`, then the
    smart resize; with padding, the square around it keeps to `max_pixels`.

    Raises:
        ValueError: one side is more than `image_size.MAX_ASPECT` times the other.
    """
    ensure_torchvision()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    cell = image_processor.patch_size * image_processor.merge_size
    most = image_processor.size["longest_edge"]
    wanted = short_side_size(size_hw, image_processor)
    share = min(wanted) / max(wanted) if is_padded(image_processor) else 1.0  # of the square that is the image
    height, width = smart_resize(
        *wanted, factor=cell, min_pixels=image_processor.size["shortest_edge"], max_pixels=most * share
    )
    if is_padded(image_processor):  # rounded to whole cells, the longer side may be a cell beyond
        limit = max(math.isqrt(most) // cell, 1) * cell
        height, width = min(height, limit), min(width, limit)
    return height, width


def padded_size(processed_hw: tuple[int, int], image_processor: Any) -> tuple[int, int]:
    """(H, W) of what the model is given for an image of this processed size, padding included."""
    return (max(processed_hw),) * 2 if is_padded(image_processor) else processed_hw


def has_own_frame(image_processor: Any) -> bool:
    """Whether images must be resized here, and not by the processor, which knows the smart resize alone."""
    return is_padded(image_processor) or getattr(image_processor, SHORT_SIDE, None) is not None


def framed(image: Image.Image, image_processor: Any) -> Image.Image:
    """An RGB image as the model is given it: resampled once, and padded with the mean colour, which is 0 behind the
    normalisation."""
    size = processed_size((image.height, image.width), image_processor)
    found, (height, width) = resampled(image, size, image_processor), padded_size(size, image_processor)
    if (height, width) == size:
        return found
    canvas = Image.new("RGB", (width, height), tuple(round(255 * mean) for mean in image_processor.image_mean))
    canvas.paste(found, (0, 0))
    return canvas


def resampled(image: Image.Image, size_hw: tuple[int, int], image_processor: Any) -> Image.Image:
    """The image at (H, W), by the filter the processor resizes with."""
    height, width = size_hw
    return image.resize((width, height), Image.Resampling(image_processor.resample))
