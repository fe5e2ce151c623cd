"""The expensive half of writing a record: its image and mask files read, checked, and encoded again where asked.

`prepare_payload` is a pure function of picklable values, so that a pool of processes can run it while the main process
only writes. It names no output file and writes nothing.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from finetune.data.answer_polygons import scale_polygons
from finetune.data.containers import is_embedded, read_embedded
from finetune.data.images import MAX_PIXELS, image_size_hw, load_image
from finetune.data.masks import load_mask, resize_mask
from finetune.data.storage.serialization import UNKNOWN_SUFFIX, image_suffix
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record

OnPicture = Callable[[ImageInput, Image.Image], object]
MIN_SIDE = 28
"""Smallest bound on an image's side, in pixels: one merge group of Qwen2.5-VL's patches."""


@dataclass(frozen=True)
class ImageOptions:
    """How image files are stored.

    Args:
        mode: "keep" copies each file byte for byte; "reencode" decodes it to upright RGB and writes it anew, without
            metadata; "reference" leaves it where it is and stores its path (JSONL only).
        format, quality: of "reencode"; quality 1..100 of JPEG and WebP.
        max_size_hw: (H, W) of "reencode": larger images are made smaller, aspect ratio kept, and with them their masks
            and polygons.
        is_checked: decode every image and hold its mask and polygons against it, so that what training would refuse
            is found now; False where the caller has done that.

    Raises:
        ConfigError: options that contradict each other.
    """

    mode: Literal["keep", "reencode", "reference"] = "keep"
    format: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int = 85
    max_size_hw: tuple[int, int] | None = None
    is_checked: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("keep", "reencode", "reference"):
            raise ConfigError(f"images.mode is '{self.mode}'; expected keep, reencode or reference")
        if self.format not in ("jpeg", "png", "webp"):
            raise ConfigError(f"images.format is '{self.format}'; expected jpeg, png or webp")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"images.quality is {self.quality}; expected 1..100")
        if self.max_size_hw is not None and (self.mode != "reencode" or min(self.max_size_hw) < MIN_SIDE):
            raise ConfigError(
                f"images.max_size_hw is {self.max_size_hw} with images.mode '{self.mode}'; expected height and width "
                f"of at least {MIN_SIDE} px, and mode 'reencode'"
            )


@dataclass(frozen=True)
class Blob:
    """One encoded file: its bytes and the suffix that fits them."""

    data: bytes
    suffix: str


@dataclass(frozen=True)
class EncodedRecord:
    """What is written of one record's images.

    images, masks: one entry per image; None where there is no file to write (no mask, or mode "reference").
    targets: those of the record, scaled where its images were resized.
    """

    images: tuple[Blob | None, ...]
    masks: tuple[Blob | None, ...]
    targets: tuple[ImageTarget, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(len(blob.data) for blob in (*self.images, *self.masks) if blob is not None)


def prepare_payload(record: Record, options: ImageOptions, on_picture: OnPicture | None = None) -> EncodedRecord:
    """Read, check and encode the images and masks of one record.

    Args:
        on_picture: called with each image and its decoded RGB picture, for whoever would otherwise decode it again;
            not called for images that are copied unchecked.

    Raises:
        DataFormatError: an unreadable image or mask, or, when checked, one that does not fit its target.
    """
    images: list[Blob | None] = []
    masks: list[Blob | None] = []
    targets: list[ImageTarget] = []
    for image, target in zip(record.images, record.targets, strict=True):
        blob, mask, target = _encode_one(image, target, record, options, on_picture)
        images.append(blob)
        masks.append(mask)
        targets.append(target)
    return EncodedRecord(tuple(images), tuple(masks), tuple(targets))


def _encode_one(
    image: ImageInput, target: ImageTarget, record: Record, options: ImageOptions, on_picture: OnPicture | None
) -> tuple[Blob | None, Blob | None, ImageTarget]:
    source = record.source or None
    if options.mode == "reencode":
        picture = load_image(image, record.id, source)
        if on_picture is not None:
            on_picture(image, picture)
        size_hw = (picture.height, picture.width)
        if options.is_checked:
            load_mask(target, size_hw, record.id, source)
        new_hw = fitted_size(size_hw, options.max_size_hw)
        blob = _encode_image(picture, new_hw, options, record)
        if new_hw != size_hw:
            return blob, *_resize_target(target, size_hw, new_hw, record)
    else:
        if options.is_checked:
            picture = load_image(image, record.id, source)
            if on_picture is not None:
                on_picture(image, picture)
            load_mask(target, (picture.height, picture.width), record.id, source)
        else:
            image_size_hw(image, record.id, source)  # at least the header is that of an image
        if options.mode == "reference":
            return None, None, target
        blob = _copy(image, record, "images")
    if target.mask_path is None:
        return blob, None, target
    return blob, _copy(ImageInput(path=target.mask_path), record, "masks"), target


def fitted_size(size_hw: tuple[int, int], max_size_hw: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) of an image made small enough, aspect ratio kept to the pixel; never larger than it was."""
    if max_size_hw is None:
        return size_hw
    scale = min(max_size_hw[0] / size_hw[0], max_size_hw[1] / size_hw[1], 1.0)
    return max(round(size_hw[0] * scale), 1), max(round(size_hw[1] * scale), 1)


def shrink_mask(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """`masks.resize_mask`, but a mark smaller than half a new pixel stays one pixel instead of vanishing.

    A tampered image must not become one with an empty mask.
    """
    small = resize_mask(mask, size_hw)
    if mask.any() and not small.any():
        rows, columns = np.nonzero(mask)
        small[rows * size_hw[0] // mask.shape[0], columns * size_hw[1] // mask.shape[1]] = 1
    return small


def zero_mask_png(size_hw: tuple[int, int], record: Record) -> bytes:
    """A PNG of an all-zero mask, one bit per pixel: what an `HxW` looks like where every mask is a picture.

    Raises:
        DataFormatError: larger than any image that could be opened.
    """
    height, width = size_hw
    if height * width > MAX_PIXELS:
        raise DataFormatError(
            "impossible mask size",
            record=record.id,
            source=record.source or None,
            field="masks",
            found=f"{height}x{width}",
            expected=f"at most {MAX_PIXELS} pixels",
            fix="give the height and width of the image",
        )
    return _zero_png(size_hw)


@functools.lru_cache(maxsize=256)  # a set has few sizes
def _zero_png(size_hw: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("1", size_hw[::-1]).save(stream, "PNG")
    return stream.getvalue()


def _encode_image(picture: Image.Image, new_hw: tuple[int, int], options: ImageOptions, record: Record) -> Blob:
    if new_hw != (picture.height, picture.width):
        picture = picture.resize(new_hw[::-1], Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    settings = {} if options.format == "png" else {"quality": options.quality}
    try:
        picture.save(stream, options.format.upper(), **settings)
    except (OSError, ValueError) as error:  # JPEG ends at 65500 pixels a side, WebP at 16383
        raise DataFormatError(
            f"image cannot be written as {options.format} ({str(error)[:80]})",
            record=record.id,
            source=record.source or None,
            field="images",
            found=f"{picture.width}x{picture.height} pixels",
            fix="set images.max_size_hw, or images.format: png",
        ) from error
    return Blob(stream.getvalue(), {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}[options.format])


def _resize_target(
    target: ImageTarget, size_hw: tuple[int, int], new_hw: tuple[int, int], record: Record
) -> tuple[Blob | None, ImageTarget]:
    """The mask file and the target in the frame of the resized image."""
    if target.polygons is not None:
        target = replace(target, polygons=scale_polygons(target.polygons, size_hw, new_hw))
    if target.mask_size_hw is not None:
        target = replace(target, mask_size_hw=new_hw)
    if target.mask_path is None:
        return None, target
    mask = load_mask(ImageTarget(mask_path=target.mask_path), size_hw, record.id, record.source or None)
    assert mask is not None, "a mask path always gives a mask"
    stream = io.BytesIO()
    Image.fromarray(shrink_mask(mask, new_hw) * np.uint8(255)).save(stream, "PNG")
    return Blob(stream.getvalue(), ".png"), target


def _copy(image: ImageInput, record: Record, field: str) -> Blob:
    """The file's own bytes."""
    path = image.path

    def refuse(problem: str, fix: str | None) -> DataFormatError:
        source = record.source or None
        return DataFormatError(problem, record=record.id, source=source, field=field, found=path, fix=fix)

    try:
        if path is None:
            data = image.data or b""
        else:
            data = read_embedded(path) if is_embedded(path) else Path(path).read_bytes()
    except DataFormatError as error:
        raise refuse(error.problem, error.fix) from error
    except OSError as error:
        raise refuse(f"file cannot be read ({error.strerror})", "check the path and its permissions") from error
    suffix = image_suffix(data)
    if suffix == UNKNOWN_SUFFIX and path is not None and not is_embedded(path):
        suffix = os.path.splitext(path)[1].lower() or suffix
    return Blob(data, suffix)
