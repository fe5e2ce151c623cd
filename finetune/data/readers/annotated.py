"""Polygons drawn with an annotation tool (COCO, LabelMe): the frame they were drawn in, turned upright and cropped.

Unlike a mask file they carry the size of the image the annotator saw, so a wrong image or a turned frame is found here.
A missing image is not: it is named when it is used, as in every format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from finetune.data.images import exif_orientation, image_size_hw
from finetune.data.readers.common import Item
from finetune.schema import ImageInput, Polygon

Point = tuple[float, float]

# What a point (x, y) of a stored image of width w and height h becomes in the upright one, by EXIF orientation.
_TURNS: dict[int, Callable[[float, float, int, int], Point]] = {
    1: lambda x, y, w, h: (x, y),
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (y, w - x),
}


def upright_polygons(
    item: Item, image: ImageInput, polygons: Sequence[Polygon], size_hw: tuple[int, int] | None, frame: str
) -> tuple[Polygon, ...]:
    """Polygons in pixels of the upright image, cropped to it.

    Args:
        image: opened (its header) where it exists.
        size_hw: (H, W) the annotation file states, or None.
        frame: `upright`, or `stored`: drawn on the pixels as stored, ignoring EXIF orientation.

    Raises:
        DataFormatError: another size than the image's, a polygon wholly outside, a missing image for `stored`.
    """
    is_there = image.path is None or os.path.isfile(image.path)
    turn = 1
    if is_there or frame == "stored":
        height, width = image_size_hw(image, item.record_id, item.source)
        if frame == "stored":
            turn = exif_orientation(image, item.record_id, item.source)
            height, width = (width, height) if turn >= 5 else (height, width)
        _check_size(item, image, size_hw, (height, width), frame)
        size_hw = (height, width)
    if size_hw is None:
        return tuple(polygons)
    height, width = size_hw
    cropped = [_crop(polygon, width, height) for polygon in polygons]
    for polygon, rest in zip(polygons, cropped, strict=True):
        if len(rest) < 3:
            raise item.error(
                "polygon lies outside the image",
                field="polygons",
                found=polygon[:3],
                expected=f"x in 0..{width}, y in 0..{height}",
                fix="give pixels of the image the annotation belongs to, or remove the region",
            )
    return tuple(tuple(_TURNS[turn](x, y, width, height) for x, y in polygon) for polygon in cropped)


def _check_size(
    item: Item, image: ImageInput, stated_hw: tuple[int, int] | None, found_hw: tuple[int, int], frame: str
) -> None:
    if stated_hw is None or stated_hw == found_hw:
        return
    fix = "check that the annotation belongs to this image, and that the image was not resized since"
    if stated_hw == found_hw[::-1]:
        other = "upright" if frame == "stored" else "stored"
        fix = f"if it was drawn {'with' if frame == 'stored' else 'without regard to'} EXIF orientation, set "
        fix += f"options.frame: {other}; otherwise height and width are exchanged"
    raise item.error(
        f"annotation of a {stated_hw[0]}x{stated_hw[1]} image but the image is {found_hw[0]}x{found_hw[1]} "
        f"(height x width, {frame})",
        field="height, width",
        found=image.path,
        fix=fix,
    )


def _crop(polygon: Sequence[Point], width: int, height: int) -> Polygon:
    """Sutherland-Hodgman against the four sides; the edges it adds along a side enclose no pixel centre."""
    points = list(polygon)
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        if all(sign * (point[axis] - limit) >= 0 for point in points):
            continue
        kept: list[Point] = []
        for start, end in zip(points[-1:] + points[:-1], points, strict=True):
            is_start_in, is_end_in = (sign * (point[axis] - limit) >= 0 for point in (start, end))
            if is_start_in != is_end_in:
                share = (limit - start[axis]) / (end[axis] - start[axis])
                other = start[1 - axis] + share * (end[1 - axis] - start[1 - axis])
                kept.append((float(limit), other) if axis == 0 else (other, float(limit)))
            if is_end_in:
                kept.append(end)
        points = kept
    return tuple(points)
