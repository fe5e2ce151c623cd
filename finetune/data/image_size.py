"""Sizes that Qwen2.5-VL's smart resize refuses."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import DataFormatError

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
