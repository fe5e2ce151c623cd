"""Format `coco`: {"images", "annotations", "categories"}; polygons, uncompressed and compressed RLE, optionally boxes.

The file is loaded whole, since annotations stand behind the images. RLE is decoded here and not by pycocotools, whose C
code (2.0.11) writes out of bounds on a damaged string; the tests compare the two. RLE becomes polygons with exactly its
pixels, because the schema has no masks without a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.exact_polygons import exact_polygons
from finetune.data.images import MAX_PIXELS
from finetune.data.readers.annotated import upright_polygons
from finetune.data.readers.common import Item
from finetune.data.readers.options import FRAMES, UNANNOTATED, Options
from finetune.data.readers.targets import read_region
from finetune.errors import DataFormatError
from finetune.schema import ImageTarget, Polygon, Record

COCO_OPTIONS = ("categories", "unannotated", "crowd", "boxes", "frame")
COCO_EXAMPLE = '{"images": [{"id", "file_name", "height", "width"}], "annotations": [...], "categories": [...]}'

_Entries = Iterator[tuple[str, str, Record | DataFormatError]]


def is_coco(value: Any) -> bool:
    """Whether a JSON value is a COCO file: its images are objects, beside annotations."""
    if not isinstance(value, dict) or not isinstance(value.get("annotations"), list):
        return False
    images = value.get("images")
    return isinstance(images, list) and all(isinstance(image, dict) for image in images)


def read_coco(value: Any, path: Path, root: str, options: Options) -> _Entries:
    """(position, source, record or error) of every image, then the annotations that belong to none.

    Raises:
        DataFormatError: no COCO file, unusable categories or options.
    """
    if not is_coco(value):
        raise DataFormatError("not a COCO file", source=path.name, found=value, expected=COCO_EXAMPLE)
    settings = _Settings(value, options, path.name)
    by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    for index, annotation in enumerate(value["annotations"]):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        by_image.setdefault(_key(image_id), []).append((index, annotation))
    for index, image in enumerate(value["images"]):
        source = f"{path.name}:images[{index}]"
        image_id = image.get("id")
        item = Item(image, f"{path.stem}:{image_id}" if _key(image_id) else f"{path.stem}:{index}", source, root)
        try:
            yield str(index), source, _read_image(item, by_image.pop(_key(image_id), []), settings)
        except DataFormatError as error:
            yield str(index), source, error
    for index, annotation in (entry for entries in by_image.values() for entry in entries):
        source = f"{path.name}:annotations[{index}]"
        yield (
            source,
            source,
            DataFormatError(
                "annotation of an unknown image",
                source=source,
                field="image_id",
                found=annotation.get("image_id") if isinstance(annotation, dict) else annotation,
                fix="add the image to 'images', or remove the annotation (an id used twice also leads here)",
            ),
        )


class _Settings:
    """Options and category table of one file."""

    def __init__(self, value: dict[str, Any], options: Options, source: str) -> None:
        self.names: dict[Any, str] = {}
        categories = value.get("categories") or []
        if not isinstance(categories, list):
            raise DataFormatError("categories are not a list", source=source, found=categories)
        for category in categories:
            if not isinstance(category, dict) or not _key(category.get("id")):
                raise DataFormatError("category without an id", source=source, field="categories", found=category)
            self.names[_key(category["id"])] = str(category.get("name", category["id"]))
        wanted = options.values.get("categories")
        self.wanted: set[str] | None = None
        if wanted is not None:
            wanted = wanted if isinstance(wanted, (list, tuple)) else [wanted]
            known = {**{name: name for name in self.names.values()}, **self.names}
            unknown = [entry for entry in wanted if (entry if isinstance(entry, str) else _key(entry)) not in known]
            if unknown:
                expected = f"names or ids out of {sorted(set(self.names.values()))[:20]}"
                raise options.error("categories", expected)
            self.wanted = {known[entry if isinstance(entry, str) else _key(entry)] for entry in wanted}
        self.is_authentic_without = options.choice("unannotated", UNANNOTATED, "authentic") == "authentic"
        self.with_crowd = options.flag("crowd", True)
        self.with_boxes = options.flag("boxes", False)
        self.frame = options.choice("frame", FRAMES, "upright")


def _key(value: Any) -> Any:
    """An id that can be looked up: 1 and "1" are two, 1 and true are not the same; () for what is no id."""
    is_id = isinstance(value, (int, str)) and not isinstance(value, bool)
    return (type(value).__name__, value) if is_id else ()


def _read_image(item: Item, annotations: list[tuple[int, dict[str, Any]]], settings: _Settings) -> Record:
    if not _key(item.fields.get("id")):
        raise item.error("image without an id", field="id", found=item.fields.get("id"), expected="a number or text")
    image = item.image(item.fields.get("file_name"), "file_name")
    size_hw = _size(item, item.fields.get("height"), item.fields.get("width"))
    polygons: list[Polygon] = []
    names: list[str] = []
    for index, annotation in annotations:
        field = f"annotations[{index}]"
        category = _key(annotation.get("category_id"))
        if settings.names and category not in settings.names:
            raise item.error("annotation of an unknown category", field=field, found=annotation.get("category_id"))
        name = settings.names.get(category, "")
        is_crowd = annotation.get("iscrowd") in (1, True)
        if (settings.wanted is not None and name not in settings.wanted) or (is_crowd and not settings.with_crowd):
            continue
        polygons += _read_segmentation(item, annotation, field, size_hw, settings)
        names.append(name)
    label = 1 if polygons else (0 if settings.is_authentic_without else None)
    return Record(
        item.record_id,
        (image,),
        (ImageTarget(label=label, polygons=upright_polygons(item, image, polygons, size_hw, settings.frame) or None),),
        source=item.source,
        provenance={"categories": sorted(set(names) - {""})} if set(names) - {""} else {},
    )


def _size(item: Item, height: Any, width: Any) -> tuple[int, int] | None:
    if height is None and width is None:
        return None
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 10**6:
            raise item.error("impossible image size", field=name, found=value, expected="a whole number of pixels")
    return int(height), int(width)


def _read_segmentation(
    item: Item, annotation: dict[str, Any], field: str, size_hw: tuple[int, int] | None, settings: _Settings
) -> list[Polygon]:
    segmentation = annotation.get("segmentation")
    field = f"{field}.segmentation"
    if isinstance(segmentation, dict):
        return list(exact_polygons(decode_rle(item, segmentation, field, size_hw)))
    if not segmentation and settings.with_boxes:
        return [_read_box(item, annotation.get("bbox"), field)]
    if not isinstance(segmentation, list) or not segmentation:
        fix = "set options.boxes: true to take the box as the region" if annotation.get("bbox") else None
        raise item.error("annotation without a segmentation", field=field, found=segmentation, fix=fix)
    polygons = []
    for number, flat in enumerate(segmentation):
        where = f"{field}[{number}]"
        if not isinstance(flat, list) or len(flat) % 2 or len(flat) < 6:
            raise item.error(
                "polygon cannot be read", field=where, found=flat, expected="[x, y, x, y, ...], at least 3 points"
            )
        polygons.append(read_region(item, where, [list(point) for point in zip(flat[::2], flat[1::2], strict=True)]))
    return polygons


def _read_box(item: Item, box: Any, field: str) -> Polygon:
    """[x, y, width, height] as a rectangle."""
    numbers = (
        [value for value in box if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if (isinstance(box, list))
        else []
    )
    if len(numbers) != 4 or len(box) != 4 or not all(math.isfinite(v) for v in numbers if isinstance(v, float)):
        raise item.error("box cannot be read", field=field, found=box, expected="bbox: [x, y, width, height]")
    x, y, width, height = numbers
    return read_region(item, field, [[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def decode_rle(item: Item, rle: dict[str, Any], field: str, size_hw: tuple[int, int] | None) -> np.ndarray:
    """(H, W) uint8 of 0/1 from {"size": [H, W], "counts": list or compressed text}; runs go down the columns.

    Raises:
        DataFormatError: another size than the image's, runs that do not add up to it, a damaged text.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        raise item.error("RLE without a size", field=field, found=size, expected="[height, width]")
    height, width = _size(item, *size) or (0, 0)
    if not 0 < height * width <= MAX_PIXELS or (size_hw is not None and (height, width) != size_hw):
        raise item.error("RLE of another size than its image", field=field, found=size, expected=str(size_hw))
    runs = _uncompressed(item, counts, field) if isinstance(counts, str) else counts
    is_list = isinstance(runs, list) and all(type(run) is int and 0 <= run <= height * width for run in runs)
    if not isinstance(runs, list) or not is_list or sum(runs) != height * width:
        raise item.error(
            "RLE runs do not add up to the image",
            field=field,
            found=counts,
            expected=f"whole numbers with the sum {height * width}",
            fix="export the annotation again",
        )
    values = np.arange(len(runs), dtype=np.uint8) % 2
    return np.repeat(values, runs).reshape(width, height).T


def _uncompressed(item: Item, text: str, field: str) -> list[int]:
    """The runs of COCO's text form: 5 bits and a continuation bit per character, from the 4th on as differences."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise item.error("damaged RLE text", field=field, found=text, fix="export the annotation again")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise item.error("RLE text is cut off", field=field, found=text, fix="export the annotation again")
    return runs
