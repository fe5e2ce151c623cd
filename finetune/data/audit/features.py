"""What tells images apart without looking at their content: container, name, size; and colour statistics beside them.

One value per feature and image; leaks.py asks how well each gives the label away. No labels here.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageStat, JpegImagePlugin

from finetune.data.containers import is_embedded, read_embedded
from finetune.schema import ImageInput

Family = Literal["container", "name", "content"]
Kind = Literal["number", "category"]

FEATURES: dict[str, tuple[Family, Kind]] = {
    "extension": ("container", "category"),
    "format": ("container", "category"),
    "mode": ("container", "category"),
    "size": ("container", "category"),
    "width": ("container", "number"),
    "height": ("container", "number"),
    "aspect": ("container", "number"),
    "pixels": ("container", "number"),
    "file_bytes": ("container", "number"),
    "bytes_per_pixel": ("container", "number"),
    "jpeg_quality": ("container", "number"),
    "jpeg_tables": ("container", "category"),
    "jpeg_subsampling": ("container", "category"),
    "jpeg_progressive": ("container", "category"),
    "metadata": ("container", "category"),
    "has_exif": ("container", "category"),
    "exif_tags": ("container", "number"),
    "exif_make": ("container", "category"),
    "exif_model": ("container", "category"),
    "exif_software": ("container", "category"),
    "exif_orientation": ("container", "category"),
    "name_prefix": ("name", "category"),
    "name_words": ("name", "category"),
    "name_shape": ("name", "category"),
    "name_length": ("name", "number"),
    "name_digits": ("name", "number"),
    **{
        f"{statistic}_{channel}": ("content", "number")
        for statistic in ("mean", "std")
        for channel in ("red", "green", "blue")
    },
    "saturation": ("content", "number"),
}
"""Every feature: container features are a leak, names are never seen by a model, content may differ for good reason."""

_KEPT_METADATA = ("icc_profile", "dpi", "xmp", "comment", "gamma", "photoshop", "adobe", "jfif", "mp")
_STATISTICS_SIDE = 256


def container_features(image: ImageInput, size_hw: tuple[int, int]) -> dict[str, float | str]:
    """Container and name features of a readable image; a number that does not apply is left out.

    Args:
        image: its header is read again, no pixel is decoded.
        size_hw: of the upright image.
    """
    path = image.path if image.path is not None and not is_embedded(image.path) else ""
    data = image.data if image.data is not None else None if path else read_embedded(image.path or "")
    num_bytes = os.path.getsize(path) if data is None else len(data)
    height, width = size_hw
    features: dict[str, float | str] = {
        "size": f"{width}x{height}",
        "width": width,
        "height": height,
        "aspect": width / height,
        "pixels": width * height,
        "file_bytes": num_bytes,
        "bytes_per_pixel": num_bytes / (width * height),
    }
    if path:
        features.update(name_features(os.path.basename(path)))
    with warnings.catch_warnings():  # damaged EXIF: the pixels are still good
        warnings.simplefilter("ignore")
        with Image.open(path if data is None else io.BytesIO(data)) as opened:
            features.update(_header_features(opened))
    return features


def name_features(name: str) -> dict[str, float | str]:
    """Of a file name: extension, first letters, all words, length, and its pattern (9 for digits, a for letters)."""
    stem, extension = os.path.splitext(name)
    shape = re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "9", stem))
    prefix = re.match(r"[^\W\d_]*", stem)
    return {
        "extension": extension.lower(),
        "name_prefix": prefix[0].lower() if prefix else "",
        "name_words": " ".join(re.findall(r"[^\W\d_]+", stem.lower())),
        "name_shape": shape,
        "name_length": len(stem),
        "name_digits": sum(character.isdigit() for character in stem),
    }


def content_features(rgb: Image.Image) -> dict[str, float | str]:
    """Colour statistics of an upright RGB image, in levels 0..255, at a side of at most 256 pixels."""
    scale = min(_STATISTICS_SIDE / max(rgb.size), 1.0)
    size = (max(round(rgb.width * scale), 1), max(round(rgb.height * scale), 1))
    small = rgb.resize(size, Image.Resampling.BOX, reducing_gap=1.0)
    statistics = ImageStat.Stat(small)
    features: dict[str, float | str] = {}
    for place, channel in enumerate(("red", "green", "blue")):
        features[f"mean_{channel}"] = statistics.mean[place]
        features[f"std_{channel}"] = statistics.stddev[place]
    red, green, blue = small.split()
    brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
    features["saturation"] = ImageStat.Stat(ImageChops.subtract(brightest, darkest)).mean[0]
    return features


def jpeg_quality(tables: Mapping[int, list[int]]) -> int:
    """The libjpeg quality 1..100 whose luminance table is nearest; the order of the table's entries does not matter."""
    first = np.sort(np.asarray(tables[min(tables)], dtype=np.int64))  # (64,)
    return int(np.abs(_standard_tables() - first).sum(axis=1).argmin()) + 1


def _header_features(opened: Image.Image) -> dict[str, float | str]:
    features: dict[str, float | str] = {"format": opened.format or "", "mode": opened.mode}
    features["metadata"] = " ".join(key for key in _KEPT_METADATA if key in opened.info)
    tables = getattr(opened, "quantization", None)
    if tables:
        features["jpeg_quality"] = jpeg_quality(tables)
        text = ";".join(",".join(map(str, tables[number])) for number in sorted(tables))
        features["jpeg_tables"] = hashlib.sha256(text.encode()).hexdigest()[:8]
        sampling = JpegImagePlugin.get_sampling(opened)
        features["jpeg_subsampling"] = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}.get(sampling, "other")
        is_progressive = opened.info.get("progressive") or opened.info.get("progression")
        features["jpeg_progressive"] = "progressive" if is_progressive else "baseline"
    try:
        exif = dict(Image.Image.getexif(opened))
    except Exception:  # damaged EXIF raises SyntaxError, struct.error, ...; it counts as none
        exif = {}
    if opened.format == "TIFF":
        exif = {}  # its own tags, not a camera's
    features["has_exif"] = "yes" if exif else "no"
    features["exif_tags"] = len(exif)
    tags = {"make": ExifTags.Base.Make, "model": ExifTags.Base.Model, "software": ExifTags.Base.Software}
    for name, tag in tags.items():
        features[f"exif_{name}"] = str(exif.get(tag, "")).strip("\0 ")
    features["exif_orientation"] = str(exif.get(ExifTags.Base.Orientation, ""))
    return features


@cache
def _standard_tables() -> np.ndarray:
    """(100, 64) int64: the luminance table of Annex K at quality 1..100 as libjpeg scales it, entries sorted."""
    # fmt: off
    base = np.array([
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
        14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
        49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ])
    # fmt: on
    quality = np.arange(1, 101)[:, None]
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)  # (100, 1)
    return np.sort(np.clip((base * scale + 50) // 100, 1, 255), axis=1)
