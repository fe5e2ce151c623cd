"""`data.image_short_side`: images whose shorter side is a given number of pixels before Qwen2.5-VL's smart resize.

The number is kept on the image processor, so it is saved with a model and every user of the processor sees the same
frame. Pixels are resampled once, straight to the size after both steps. The sizes themselves: `dataset.processed_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from finetune.errors import DataFormatError

SHORT_SIDE = "image_short_side"
"""Attribute of the image processor, and key of its file in a saved folder."""


MAX_ASPECT = 200
"""Qwen2.5-VL's smart resize refuses an image whose one side is more than this many times the other."""


def too_narrow(
    sizes: Sequence[tuple[int, int]], record_id: str | None = None, source: str | None = None
) -> DataFormatError:
    """The error for images, (H, W) each, one of which goes beyond `MAX_ASPECT`."""
    return DataFormatError(
        "image cannot be resized for the model",
        record=record_id,
        source=source,
        found=", ".join(f"{width}x{height}" for height, width in sizes),
        expected=f"width and height within a factor of {MAX_ASPECT}",
        fix="crop the image, or remove the record",
    )


def set_short_side(image_processor: Any, pixels: int | None) -> None:
    """Have a processor's images resized to a shorter side of so many pixels; None: not at all, whatever was saved."""
    if pixels is not None:
        setattr(image_processor, SHORT_SIDE, pixels)
    elif hasattr(image_processor, SHORT_SIDE):
        delattr(image_processor, SHORT_SIDE)


def short_side_size(size_hw: tuple[int, int], image_processor: Any) -> tuple[int, int]:
    """(H, W) with the shorter side at the processor's number of pixels, the proportions kept; as it is without one."""
    pixels = getattr(image_processor, SHORT_SIDE, None)
    if pixels is None:
        return size_hw
    factor = pixels / min(size_hw)
    height, width = (max(round(side * factor), 1) for side in size_hw)
    return height, width


def resampled(image: Image.Image, size_hw: tuple[int, int], image_processor: Any) -> Image.Image:
    """The image at (H, W), by the filter the processor resizes with."""
    height, width = size_hw
    return image.resize((width, height), Image.Resampling(image_processor.resample))
