"""How a finished picture becomes a file: container, its parameters, and the photograph's EXIF, alike for both classes.

Everything is decided from the host photograph and a stream of random numbers that knows no label. EXIF is copied by a
list of allowed tags: no orientation, thumbnail, GPS, software, maker notes or names of people.
"""

from __future__ import annotations

import io
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

IMAGE_FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Container of the finished images → file extension. Masks are always PNG."""
METADATA = ("strip", "carry")

_EXIF_IFD = 0x8769
_MAIN_TAGS = {0x010F: "make", 0x0110: "model", 0x0132: "date_time"}
_CAMERA_TAGS = {
    0x829A: "exposure_time",
    0x829D: "f_number",
    0x8822: "exposure_program",
    0x8827: "iso",
    0x9003: "date_time_original",
    0x9004: "date_time_digitized",
    0x9204: "exposure_bias",
    0x9207: "metering_mode",
    0x9209: "flash",
    0x920A: "focal_length",
    0xA402: "exposure_mode",
    0xA403: "white_balance",
    0xA405: "focal_length_35mm",
    0xA433: "lens_make",
    0xA434: "lens_model",
}
_SUMMARY = ("make", "model", "lens_model", "exposure_time", "f_number", "iso", "focal_length", "date_time_original")


_NUMBER_COLOURS = [*(0, 0, 0), *([*(255, 255, 255), *(255, 255, 0), *(0, 255, 255)] * 10)]
"""Red, green and blue of black, then white, yellow and cyan in turn: all but black are above 127 as grey levels too."""


def draw_container(image_format: str, quality_range: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
    """The container's parameters as JSON values for the provenance: `{"format": "jpeg", "quality": 91, ...}`."""
    if image_format == "png":
        return {"format": "png"}
    quality = int(rng.integers(quality_range[0], quality_range[1] + 1))
    subsampling = "4:2:0" if image_format == "webp" or rng.random() < 0.7 else "4:4:4"
    return {"format": image_format, "quality": quality, "subsampling": subsampling}


def encode_image(image: np.ndarray, container: dict[str, Any], exif: bytes = b"") -> bytes:
    """The file of a picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        container: of `draw_container`.
        exif: block of `carried_exif`; b"" writes no metadata at all.
    """
    if container["format"] == "png" and not exif:
        return encode_png(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    options: dict[str, Any] = {"exif": exif} if exif else {}
    if container["format"] == "png":
        options["compress_level"] = 1
    else:
        options["quality"] = container["quality"]
    if container["format"] == "jpeg":
        options["subsampling"] = container["subsampling"]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, container["format"].upper(), **options)
    return buffer.getvalue()


def encode_numbers(numbers: np.ndarray) -> bytes:
    """A mask (H, W) uint8 of 0, 1, 2, ... as PNG with a palette: pixels are the numbers, colours black, then bright
    ones, so that it reads as a mask of 0 and 255 too.

    Raises:
        ValueError: a number above 30, for which there is no colour.
    """
    if numbers.max(initial=0) >= len(_NUMBER_COLOURS) // 3:
        raise ValueError(f"number {numbers.max()} in a mask, there are colours for {len(_NUMBER_COLOURS) // 3 - 1}")
    picture = Image.fromarray(numbers)
    picture.putpalette(_NUMBER_COLOURS)  # from grey levels to indices
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_png(array: np.ndarray) -> bytes:
    """A grey (H, W) or blue-green-red (H, W, 3) uint8 picture as PNG, fast and without metadata."""
    done, encoded = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise RuntimeError(f"OpenCV could not encode a PNG of shape {array.shape}")
    return bytes(encoded)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, whatever stops the process."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


@lru_cache(maxsize=4096)
def photo_exif(path: str) -> tuple[bytes, dict[str, Any]]:
    """EXIF of a photograph: the block that `metadata: carry` writes, and a summary of the camera for the provenance.

    Returns:
        the block without what the file's head rules out, b"" where nothing is left; `{"make": ..., "model": ...,
        "exposure_time": ..., ...}` with the tags that are there. Damaged EXIF gives b"" and `{"damaged": True}`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Pillow warns of corrupt EXIF and gives what it could read
            with Image.open(path) as file:
                exif = file.getexif()
                found = {tag: exif[tag] for tag in _MAIN_TAGS if tag in exif}
                camera = {tag: value for tag, value in exif.get_ifd(_EXIF_IFD).items() if tag in _CAMERA_TAGS}
        carried = Image.Exif()
        for tag, value in found.items():
            carried[tag] = value
        if camera:
            carried[_EXIF_IFD] = dict(camera)
        block = carried.tobytes() if found or camera else b""
    except Exception:  # struct.error, SyntaxError, TypeError, ... on damaged EXIF; the pixels are still good
        return b"", {"damaged": True}
    named = {name: found[tag] for tag, name in _MAIN_TAGS.items() if tag in found}
    named |= {name: camera[tag] for tag, name in _CAMERA_TAGS.items() if tag in camera}
    return block, {name: _plain(named[name]) for name in _SUMMARY if name in named}


def _plain(value: Any) -> str | int | float | None:
    """An EXIF value as JSON: rationals as numbers, null where they are divided by 0."""
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if isinstance(value, str):
        return value.strip("\0 ")
    if isinstance(value, TiffImagePlugin.IFDRational):
        return round(float(value), 6) if value.denominator else None
    if isinstance(value, tuple):
        return _plain(value[0]) if value else None
    return value if isinstance(value, (int, float)) else str(value)
