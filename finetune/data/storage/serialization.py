"""A `Record` as the native JSON object of data/README.md, and as one line of text; nothing is opened here.

Reading the object back gives an equal record (all but `source`); paths below the root become relative to it.
"""

from __future__ import annotations

import base64
import json
import os
import re
from typing import Any

from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Polygon, Record

COLUMNS = ("id", "group", "images", "labels", "masks", "polygons", "evidence", "messages", "provenance")
"""The fields of a stored record, in order, in JSONL and in Parquet."""

SIZE_TEXT = re.compile(r"\s*[0-9]+\s*[xX×]\s*[0-9]+\s*")
"""What stands for an all-zero mask in place of a path."""

UNKNOWN_SUFFIX = ".img"
_TAKEN_FOR_SOMETHING_ELSE = re.compile(r"\s|data:|file://|https?:/", re.IGNORECASE)
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", "png", ".png"),
    (b"GIF8", "gif", ".gif"),
    (b"BM", "bmp", ".bmp"),
    (b"II*\0", "tiff", ".tif"),
    (b"MM\0*", "tiff", ".tif"),
)


def record_to_json(record: Record, root: str | os.PathLike[str]) -> dict[str, Any]:
    """The native object of a record: every field of `COLUMNS`, plain JSON values, one entry per image in the lists.

    Args:
        record: as read; embedded image bytes become `data:` URLs.
        root: the folder the object will be read from; paths below it are written relative, with forward slashes.

    Raises:
        DataFormatError: a path or text that no reader could read back.
    """
    texts = (record.id, record.group, *(t.content for t in record.turns), *(t.evidence or "" for t in record.targets))
    if not _is_utf8("".join(texts)):
        raise DataFormatError(
            "text holds half a character (a lone surrogate)",
            record=record.id,
            source=record.source or None,
            fix="write the text again as UTF-8",
        )
    return {
        "id": record.id,
        "group": record.group,
        "images": [_image_text(image, record, root) for image in record.images],
        "labels": [target.label for target in record.targets],
        "masks": [_mask_text(target, record, root) for target in record.targets],
        "polygons": [
            None if t.polygons is None else [_polygon_points(polygon) for polygon in t.polygons] for t in record.targets
        ],
        "evidence": [target.evidence for target in record.targets],
        "messages": [{"role": turn.role, "content": turn.content} for turn in record.turns],
        "provenance": record.provenance,
    }


def json_text(value: Any, record: Record) -> str:
    """One line of strict JSON: UTF-8 characters as they are, but ASCII only where text holds a lone surrogate.

    Raises:
        DataFormatError: NaN, infinity, or something that is not JSON.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value, allow_nan=False)
        return text
    except (TypeError, ValueError) as error:
        raise DataFormatError(
            f"record cannot be written as JSON ({error})",
            record=record.id,
            source=record.source or None,
            field="provenance",
            fix="use text, finite numbers, true, false, null, lists and objects only",
        ) from error


def relative_path(path: str, root: str | os.PathLike[str]) -> str:
    """`path` as it is written into a file in `root`: relative with forward slashes below it, else absolute."""
    full, base = os.path.abspath(path), os.path.abspath(root)
    if os.path.isabs(path) and os.path.normpath(path) != path:
        return path  # `a/../b` may lead elsewhere through a symbolic link
    if not full.startswith(os.path.join(base, "")):
        return full
    text = full[len(os.path.join(base, "")) :].replace(os.sep, "/")
    # "./" keeps a reader from taking a file's name for a size, a URL, or cutting its leading blanks.
    return f"./{text}" if SIZE_TEXT.fullmatch(text) or _TAKEN_FOR_SOMETHING_ELSE.match(text) else text


def image_suffix(data: bytes) -> str:
    """The usual file name suffix of encoded image bytes, by their signature; `UNKNOWN_SUFFIX` for others."""
    return _signature(data)[1]


def _signature(data: bytes) -> tuple[str, str]:
    """(media type below image/, suffix)."""
    for start, kind, suffix in _SIGNATURES:
        if data.startswith(start):
            return kind, suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", ".webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif", ".avif"
    if data[:12] == b"\0\0\0\x0cjP  \r\n\x87\n":
        return "jp2", ".jp2"
    return "*", UNKNOWN_SUFFIX


def _image_text(image: ImageInput, record: Record, root: str | os.PathLike[str]) -> str:
    if image.path is not None:
        return _path_text(image.path, record, root, "images")
    data = image.data or b""
    kind = _signature(data)[0]
    media_type = "application/octet-stream" if kind == "*" else f"image/{kind}"
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _mask_text(target: ImageTarget, record: Record, root: str | os.PathLike[str]) -> str | None:
    if target.mask_path:
        return _path_text(target.mask_path, record, root, "masks")
    return None if target.mask_size_hw is None else f"{target.mask_size_hw[0]}x{target.mask_size_hw[1]}"


def _path_text(path: str, record: Record, root: str | os.PathLike[str], field: str) -> str:
    text = relative_path(path, root)
    is_lost = text != text.rstrip() or "\0" in text
    if is_lost or not _is_utf8(text):
        raise DataFormatError(
            "path ends with a blank" if text != text.rstrip() else "path is not text",
            record=record.id,
            source=record.source or None,
            field=field,
            found=path,
            fix="rename the file",
        )
    return text


def _is_utf8(text: str) -> bool:
    """Whether text has no lone surrogate (an undecoded byte of a file name, half a character from broken JSON)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _polygon_points(polygon: Polygon) -> list[list[float]]:
    points = [[float(x), float(y)] for x, y in polygon]
    # A reader drops a repeated closing point, so where the first point is meant to stand twice it is written thrice.
    return [*points, points[0]] if polygon[0] == polygon[-1] else points
