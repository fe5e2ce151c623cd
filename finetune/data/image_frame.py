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
from finetune.config.model_folder import FRAME, PADDING, SHORT_SIDE
from finetune.data.image_size import MAX_ASPECT
from finetune.torchvision_compat import ensure_torchvision


def set_frame(image_processor: Any, short_side: int | None = None, padding: ImagePadding = "none") -> None:
    """Have a processor's images resized to a shorter side of so many pixels (None: not at all) and padded, whatever was
    saved."""
    for name, value in ((SHORT_SIDE, short_side), (PADDING, None if padding == "none" else padding)):
        if value is not None:
            setattr(image_processor, name, value)
        elif hasattr(image_processor, name):
            delattr(image_processor, name)


def frame_of(image_processor: Any) -> dict[str, Any]:
    """What is set of the frame, by the names of the configuration; {} where images are resized as Qwen2.5-VL's are."""
    return {name: getattr(image_processor, name) for name in FRAME if hasattr(image_processor, name)}


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
    smart resize; with padding, what it has of the square, which keeps to the bounds of pixels.

    Raises:
        ValueError: one side is more than `MAX_ASPECT` times the other.
    """
    cell = image_processor.patch_size * image_processor.merge_size
    bounds = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    wanted = short_side_size(size_hw, image_processor)
    if is_padded(image_processor):
        return _size_in_square(wanted, cell, *bounds)
    ensure_torchvision()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height, width = smart_resize(*wanted, factor=cell, min_pixels=bounds[0], max_pixels=bounds[1])
    return height, width


def _size_in_square(size_hw: tuple[int, int], cell: int, least: int, most: int) -> tuple[int, int]:
    """(H, W) in whole cells: the longer side as a square of `least` to `most` pixels has it, the other in proportion.

    Where no square of whole cells lies between the bounds, the largest below `most`.
    """
    shorter, longer = sorted(size_hw)
    if longer > MAX_ASPECT * shorter:
        raise ValueError(f"one side is more than {MAX_ASPECT} times the other")
    low = -(-(math.isqrt(max(least, 1) - 1) + 1) // cell)
    high = max(math.isqrt(most) // cell, 1)
    side = min(max(_rounded(longer, cell), low), high)  # in cells, as all below
    other = max(_rounded(side * shorter, longer), 1)
    return (side * cell, other * cell) if size_hw[0] >= size_hw[1] else (other * cell, side * cell)


def _rounded(number: int, by: int) -> int:
    """`number` / `by`, to the nearest whole number."""
    return (2 * number + by) // (2 * by)


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
