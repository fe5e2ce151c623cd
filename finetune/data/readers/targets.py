"""Labels, masks, polygons and evidence of a raw record, one value per image; a single image may have bare values.

Nothing is opened here: whether a mask fits its image is masks.py's question.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from finetune.schema import ImageTarget, Polygon

if TYPE_CHECKING:
    from finetune.data.readers.common import Item

LABEL_FIELDS = ("labels", "label")
MASK_FIELDS = ("masks", "mask", "mask_path")
POLYGON_FIELDS = ("polygons",)
EVIDENCE_FIELDS = ("evidence",)
TARGET_FIELDS = (*LABEL_FIELDS, *MASK_FIELDS, *POLYGON_FIELDS, *EVIDENCE_FIELDS)

_SIZE = re.compile(r"([0-9]+)\s*[xX×]\s*([0-9]+)")
_MAX_SIDE = 10**6
_POLYGON_FORM = "regions as [[x, x, x, ...], [y, y, y, ...]] or [[x, y], [x, y], [x, y], ...], at least 3 points each"


def read_targets(item: Item, num_images: int) -> tuple[ImageTarget, ...]:
    """One `ImageTarget` per image.

    Raises:
        DataFormatError: a label that is not 0/1, a list of another length than the images, a malformed mask or polygon.
    """
    labels = _per_image(item, LABEL_FIELDS, num_images)
    masks = _per_image(item, MASK_FIELDS, num_images)
    polygons = _polygons_per_image(item, num_images)
    evidence = _per_image(item, EVIDENCE_FIELDS, num_images)
    targets = []
    for index in range(num_images):
        mask_path, mask_size_hw = read_mask(item, *masks[index])
        field, text = evidence[index]
        targets.append(
            ImageTarget(
                label=read_label(item, *labels[index]),
                mask_path=mask_path,
                mask_size_hw=mask_size_hw,
                polygons=_read_polygons(item, *polygons[index]),
                evidence=None if text is None else item.text(text, field),
            )
        )
    return tuple(targets)


def _present(item: Item, names: tuple[str, ...]) -> str | None:
    present = [name for name in names if item.fields.get(name) is not None]
    if len(present) > 1:
        raise item.error("the same target given twice", found=present, fix=f"keep '{present[0]}' only")
    return present[0] if present else None


def _per_image(item: Item, names: tuple[str, ...], num_images: int) -> list[tuple[str, Any]]:
    """(field name for messages, raw value or None) for each image."""
    name = _present(item, names)
    if name is None:
        return [(names[0], None)] * num_images
    value = item.fields[name]
    if not isinstance(value, list):
        if num_images != 1:
            raise item.error(
                f"one value for {num_images} images", field=name, found=value, fix="give a list, one value per image"
            )
        return [(name, value)]
    if len(value) != num_images:
        raise item.error(
            f"{len(value)} values for {num_images} images", field=name, found=value, fix="give one value per image"
        )
    return [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]


def read_label(item: Item, field: str, value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is int and value in (0, 1):  # True == 1, so the type is asked for
        return value
    fix = "write 0 for real, 1 for tampered, null where unknown"
    if isinstance(value, str) and value.strip() in ("0", "1"):
        fix = f"write the number {value.strip()} without quotes"
    elif isinstance(value, bool):
        fix = f"write {int(value)} instead of {'true' if value else 'false'}"
    raise item.error("label is neither 0 nor 1", field=field, found=value, expected="0 (real) or 1 (tampered)", fix=fix)


def read_mask(item: Item, field: str, value: Any) -> tuple[str | None, tuple[int, int] | None]:
    if value is None:
        return None, None
    text = item.text(value, field)
    if text[:5].lower() == "data:":
        raise item.error("masks cannot be embedded", field=field, found=text, fix="save the mask as a PNG file")
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return item.path(text, field), None
    if max(map(len, match.groups())) > len(str(_MAX_SIDE)) or not all(map(int, match.groups())):
        raise item.error("impossible mask size", field=field, found=text, expected="HEIGHTxWIDTH, e.g. 1080x1920")
    return None, (int(match.group(1)), int(match.group(2)))


def _polygons_per_image(item: Item, num_images: int) -> list[tuple[str, Any]]:
    """Like `_per_image`; with one image the outer list over images may be left out."""
    value = item.fields.get("polygons")
    if num_images == 1 and isinstance(value, list):
        # [[[xs], [ys]]] reads the same as "one image" and as "one region", so a list of one is taken as per image.
        is_per_image = len(value) == 1 and (value[0] is None or value[0] == [] or _depth(value[0]) >= 2)
        return [("polygons[0]", value[0])] if is_per_image else [("polygons", value)]
    return _per_image(item, POLYGON_FIELDS, num_images)


def _depth(value: Any) -> int:
    """Nesting of lists along the first entries: 0 for a number, 2 for [[1, 2], [3, 4]]."""
    depth = 0
    while isinstance(value, list):
        depth += 1
        value = value[0] if value else None
    return depth


def _read_polygons(item: Item, field: str, value: Any) -> tuple[Polygon, ...] | None:
    """The regions of one image: [] or a list of regions, or the answer text's flat [[xs], [ys], [xs], [ys], ...]."""
    if value is None:
        return None
    if value == []:
        return ()
    depth = _depth(value)
    if depth == 3:
        return tuple(read_region(item, f"{field}[{index}]", region) for index, region in enumerate(value))
    if depth == 2 and all(isinstance(row, list) for row in value):
        if all(len(row) == 2 for row in value):
            return (read_region(item, field, value),)
        if len(value) % 2 == 0:
            return tuple(read_region(item, field, value[i : i + 2]) for i in range(0, len(value), 2))
    raise item.error("polygons cannot be read", field=field, found=value, expected=_POLYGON_FORM)


def read_region(item: Item, field: str, region: Any) -> Polygon:
    """One closed region: two equally long rows are x and y, rows of two are points; 2x2 is too short either way."""

    def refuse(problem: str) -> Exception:
        return item.error(problem, field=field, found=region, expected=_POLYGON_FORM)

    if not isinstance(region, list) or not region or not all(isinstance(row, list) for row in region):
        raise refuse("polygon is not a list of lists")
    if len(region) == 2 and len(region[0]) == len(region[1]):
        points = list(zip(region[0], region[1], strict=True))
    elif all(len(row) == 2 for row in region):
        points = [(row[0], row[1]) for row in region]
    else:
        raise refuse("polygon with unequal numbers of x and y")
    for value in (value for point in points for value in point):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value if isinstance(value, float) else 0) or abs(value) > _MAX_SIDE:
            raise refuse(f"polygon coordinate {str(value)[:20]!r} is not a pixel position")
    polygon = tuple((float(x), float(y)) for x, y in points)
    if len(polygon) > 3 and polygon[0] == polygon[-1]:
        polygon = polygon[:-1]  # the schema leaves the closing point out
    if len(polygon) < 3:
        raise refuse(f"polygon of {len(polygon)} points")
    return polygon
