"""Format `labelme`: one JSON of LabelMe (imagePath, shapes), or a folder of them; polygon, rectangle, circle and mask.

A circle becomes 64 corners. `imagePath` starts from the JSON's own folder, as LabelMe writes it; the embedded
`imageData` is used where that file is missing.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.exact_polygons import exact_polygons
from finetune.data.images import decode, image_size_hw
from finetune.data.readers.annotated import upright_polygons
from finetune.data.readers.common import Item
from finetune.data.readers.file_tree import IMAGE_SUFFIXES, iter_files
from finetune.data.readers.json_files import load_json
from finetune.data.readers.options import FRAMES, UNANNOTATED, Options
from finetune.data.readers.targets import read_region
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Polygon, Record

LABELME_OPTIONS = ("labels", "unannotated", "unlabelled_images", "frame")
LABELME_EXAMPLE = '{"imagePath": "a.jpg", "imageHeight": H, "imageWidth": W, "shapes": [{"label", "points", ...}]}'
_CIRCLE_CORNERS = 64


@dataclass(frozen=True)
class _Settings:
    labels: tuple[str, ...] | None
    is_authentic_without: bool
    frame: str


def is_labelme(value: Any) -> bool:
    """Whether a JSON value is a LabelMe file."""
    return isinstance(value, dict) and "shapes" in value and "imagePath" in value


def read_labelme(
    value: Any, path: Path, root: str, options: Options
) -> Iterator[tuple[str, str, Record | DataFormatError]]:
    """The record of one LabelMe file.

    Raises:
        DataFormatError: it cannot be used.
    """
    yield path.name, path.name, _read_file(value, path, path.name, root, _read_settings(options))


def read_labelme_folder(path: Path, root: str, options: Options) -> Iterator[tuple[str, str, Record | DataFormatError]]:
    """The records of all .json files below a folder in the order of their paths, then its images without one."""
    settings = _read_settings(options)
    unlabelled = options.choice("unlabelled_images", ("error", *UNANNOTATED), "error")
    labelled: set[str] = set()
    for relative in iter_files(path, (".json",)):
        file = path / relative
        try:
            value = load_json(file)
            record: Record | DataFormatError = _read_file(value, file, relative, root, settings)
            labelled.add(_image_path(value["imagePath"], file))
        except DataFormatError as error:
            record = error
        yield relative, relative, record
    stems = {os.path.splitext(relative)[0] for relative in iter_files(path, (".json",))}
    for relative in iter_files(path, IMAGE_SUFFIXES):
        name = os.path.normpath(path / relative)
        if name in labelled or os.path.splitext(relative)[0] in stems:
            continue
        if unlabelled == "error":
            yield (
                relative,
                relative,
                DataFormatError(
                    "image without a LabelMe file",
                    source=relative,
                    found=name,
                    fix="annotate it, or set options.unlabelled_images: authentic or unknown",
                ),
            )
            continue
        target = ImageTarget(label=0 if unlabelled == "authentic" else None)
        yield relative, relative, Record(relative, (ImageInput(path=name),), (target,), source=relative)


def _read_settings(options: Options) -> _Settings:
    labels = options.texts("labels", ()) if "labels" in options.values else None
    is_authentic = options.choice("unannotated", UNANNOTATED, "authentic") == "authentic"
    return _Settings(labels, is_authentic, options.choice("frame", FRAMES, "upright"))


def _image_path(text: str, file: Path) -> str:
    return os.path.normpath(os.path.join(file.parent, text.replace("\\", "/")))  # LabelMe on Windows writes "..\\a.jpg"


def _read_file(value: Any, file: Path, relative: str, root: str, settings: _Settings) -> Record:
    record_id = os.path.splitext(relative)[0]
    if not is_labelme(value):
        raise DataFormatError("not a LabelMe file", record=record_id, source=relative, expected=LABELME_EXAMPLE)
    item = Item(value, record_id, relative, root)
    image = _read_image(item, file)
    size_hw = _stated_size(item)
    shapes = value["shapes"]
    if not isinstance(shapes, list):
        raise item.error("shapes are not a list", field="shapes", found=shapes)
    polygons: list[Polygon] = []
    names: set[str] = set()
    for index, shape in enumerate(shapes):
        field = f"shapes[{index}]"
        if not isinstance(shape, dict):
            raise item.error("shape is not an object", field=field, found=shape)
        name = item.text(shape.get("label", ""), f"{field}.label")
        if settings.labels is None or name in settings.labels:
            polygons += _read_shape(item, shape, field, size_hw)
            names.add(name)
    label = 1 if polygons else (0 if settings.is_authentic_without else None)
    target = ImageTarget(label, polygons=upright_polygons(item, image, polygons, size_hw, settings.frame) or None)
    named = sorted(names - {""})
    return Record(record_id, (image,), (target,), source=relative, provenance={"categories": named} if named else {})


def _read_image(item: Item, file: Path) -> ImageInput:
    """The file `imagePath` names, below the data root; the embedded bytes where it does not exist."""
    text = item.text(item.fields["imagePath"], "imagePath").replace("\\", "/")
    if not text.strip() or "\0" in text:
        raise item.error("empty or unusable path", field="imagePath", found=text, fix="give the file's path")
    joined = os.path.normpath(os.path.join(os.path.relpath(file.parent, item.root), text))
    is_inside = not os.path.isabs(text) and joined.split(os.sep)[0] != ".."
    path = text if os.path.isabs(text) else os.path.join(item.root, joined)
    data = item.fields.get("imageData")
    if (not is_inside and not os.path.isabs(text)) or (data and not os.path.isfile(path)):
        if not data:
            return ImageInput(path=item.path(joined, "imagePath"))  # raises: it leaves the data root
        try:
            return ImageInput(data=base64.b64decode(item.text(data, "imageData"), validate=True) or b"\0")
        except (binascii.Error, ValueError) as error:
            raise item.error(f"not base64 ({error})", field="imageData", found=data) from error
    return ImageInput(path=path)


def _stated_size(item: Item) -> tuple[int, int] | None:
    height, width = item.fields.get("imageHeight"), item.fields.get("imageWidth")
    if height is None or width is None:
        return None
    if type(height) is not int or type(width) is not int or not (0 < height <= 10**6 and 0 < width <= 10**6):
        raise item.error("impossible image size", field="imageHeight, imageWidth", found=(height, width))
    return height, width


def _read_shape(item: Item, shape: dict[str, Any], field: str, size_hw: tuple[int, int] | None) -> list[Polygon]:
    kind = shape.get("shape_type") or "polygon"
    points = shape.get("points")
    field = f"{field}.points"
    if kind == "polygon":
        if not isinstance(points, list) or len(points) < 3:
            raise item.error("polygon of fewer than 3 points", field=field, found=points)
        return [read_region(item, field, points)]
    if kind not in ("rectangle", "circle", "mask"):
        raise item.error(
            "shape without an area", field=field, found=kind, expected="polygon, rectangle, circle or mask"
        )
    if kind == "rectangle" and isinstance(points, list) and len(points) == 4:
        return [read_region(item, field, points)]  # LabelMe 6 writes all four corners
    if not isinstance(points, list) or len(points) != 2:
        raise item.error(f"{kind} without its two points", field=field, found=points)
    # A third point makes `read_region` check the numbers; two alone would read as a row of x and a row of y.
    (x0, y0), (x1, y1), _ = read_region(item, field, [*points, points[0]])
    if kind == "rectangle":
        return [((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
    if kind == "circle":
        radius = math.hypot(x1 - x0, y1 - y0)
        angles = [2 * math.pi * k / _CIRCLE_CORNERS for k in range(_CIRCLE_CORNERS)]
        return [tuple((x0 + radius * math.cos(a), y0 + radius * math.sin(a)) for a in angles)]
    return _read_mask(item, shape.get("mask"), (round(min(x0, x1)), round(min(y0, y1))), field)


def _read_mask(item: Item, text: Any, corner: tuple[int, int], field: str) -> list[Polygon]:
    """A base64 PNG of the region's box, non-zero = inside, its first pixel at `corner` (x, y)."""
    try:
        data = base64.b64decode(item.text(text, field), validate=True)
    except (binascii.Error, ValueError) as error:
        raise item.error(f"mask is not base64 ({error})", field=field, found=text) from error
    picture = ImageInput(data=data)
    image_size_hw(picture, item.record_id, item.source)
    mask = np.asarray(decode(picture, item.record_id, item.source, field).convert("L")) != 0
    x, y = corner
    return [tuple((px + x, py + y) for px, py in polygon) for polygon in exact_polygons(mask)]
