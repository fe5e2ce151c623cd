"""Pixel targets: a mask file, polygons or `HxW` to one (H, W) array of 0/1 at the image's own size, and back again.

Frame: pixels of the upright original image; pixel (row r, column c) covers x in [c, c+1), y in [r, r+1), its centre at
half-integers. A pixel is in a polygon when its centre lies inside by the even-odd rule; several polygons are united.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from finetune.data.images import decode, image_size_hw
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Polygon

_MAX_INDEX = 31
_MAX_COMPRESSION_NOISE = 16
_SMALL_AREA = 16.0
"""Pixels; polygons of so little may lie between the centres of all pixels."""
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")


def load_mask(
    target: ImageTarget, size_hw: tuple[int, int], record_id: str | None = None, source: str | None = None
) -> np.ndarray | None:
    """The pixel target of one image.

    The mask file wins over polygons, polygons over `HxW`; label 0 alone is an all-zero mask.

    Args:
        target: what is known about the image.
        size_hw: (H, W) of the upright image.
        record_id, source: named in the error.

    Returns:
        (H, W) uint8, 1 = tampered; None where nothing is known about pixels.

    Raises:
        DataFormatError: unreadable mask, another size than the image, polygons outside it, a mask that contradicts
            the label.
    """

    def refuse(problem: str, field: str, **details: str) -> DataFormatError:
        return DataFormatError(problem, record=record_id, source=source, field=field, **details)

    if not target.has_mask:
        return None
    check_mask_size(target, size_hw, record_id, source)
    mask = np.zeros(size_hw, np.uint8)  # (H, W)
    field = "mask_path" if target.mask_size_hw else "label"
    if target.mask_path:
        field = "mask_path"
        mask = _read_mask_file(target.mask_path, record_id, source)
    elif target.polygons is not None:
        field = "polygons"
        mask = rasterize_polygons(target.polygons, size_hw)
    num_tampered = int(mask.sum())
    if target.label == 0 and num_tampered:
        raise refuse(
            "label 0 (real) with a mask that marks pixels",
            field,
            found=f"{num_tampered} of {mask.size} pixels",
            fix="correct the label, or remove the mask",
        )
    if target.label == 1 and not num_tampered:
        raise refuse(
            "label 1 (tampered) with an empty mask",
            field,
            found=target.mask_path or ("polygons without a pixel" if field == "polygons" else "all zero"),
            fix="correct the label or the mask (255 = tampered; polygons in pixels), or leave the mask out",
        )
    return mask


def load_edit_numbers(
    target: ImageTarget, num_edits: int, record_id: str | None = None, source: str | None = None
) -> np.ndarray | None:
    """Which of several edits made each pixel of a mask file, where it says so: by the indices of a palette (as the
    masks of objects in PASCAL VOC), or by grey values up to 31 of a lossless file.

    Args:
        target: whose mask file it is.
        num_edits: how many edits there are; a file that has none of the numbers 2 to this only tells 0 from 1.
        record_id, source: named in the error.

    Returns:
        (H, W) uint8, 0 = authentic, k = the k-th edit, anything above `num_edits` unknown; None where the target has
        no mask file, or one that does not number them.

    Raises:
        DataFormatError: unreadable mask.
    """
    if not target.mask_path:
        return None
    image = _decode_mask(target.mask_path, record_id, source)
    if image.mode != "P" and (image.mode != "L" or image.format in _LOSSY_FORMATS):
        return None
    numbers = np.asarray(image)
    if image.mode == "L" and numbers.max(initial=0) > _MAX_INDEX:
        return None
    return numbers if ((numbers >= 2) & (numbers <= num_edits)).any() else None


def check_mask_size(
    target: ImageTarget, size_hw: tuple[int, int], record_id: str | None = None, source: str | None = None
) -> None:
    """What `load_mask` would say of the size of a pixel target or the frame of its polygons; reads a header at most.

    Raises:
        DataFormatError: as `load_mask`.
    """
    if target.mask_path:
        try:
            found_hw = image_size_hw(ImageInput(path=target.mask_path))
        except DataFormatError as error:
            raise _about_mask(error, target.mask_path, record_id, source) from error
        _check_size(found_hw, size_hw, target.mask_path, record_id, source)
    elif target.polygons is not None:
        _check_polygon_frame(target.polygons, size_hw, record_id, source)
    elif target.mask_size_hw:
        height, width = target.mask_size_hw
        _check_size((height, width), size_hw, f"{height}x{width}", record_id, source)


def may_contradict_label(target: ImageTarget) -> bool:
    """Whether polygons or `HxW` may mark pixels of a real image or none of a tampered one: worth drawing them to see.

    False where a mask file decides, and for what is plain: polygons of some area on a tampered image.
    """
    if target.mask_path or target.label is None:
        return False
    if target.polygons is None:
        return target.label == 1 and target.mask_size_hw is not None
    return bool(target.polygons) if target.label == 0 else sum(map(_area, target.polygons)) < _SMALL_AREA


def _area(polygon: Polygon) -> float:
    """Pixels inside a polygon that does not cross itself (the shoelace formula)."""
    x, y = np.asarray(polygon, np.float64).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def binarize_mask(image: Image.Image) -> np.ndarray:
    """A mask picture of any mode to (H, W) uint8 of 0/1; `image.format` tells whether it was compressed with loss.

    The value of a pixel is its largest colour channel (a palette is looked up), transparent = 0, 16 bit scaled to 8
    where needed. In a lossless file whose values all are <= 31 they are indices (0/1 masks, instance numbers): non-zero
    is tampered. Otherwise > 127 is tampered, which ignores the ringing of JPEG masks and halves anti-aliased edges.

    Raises:
        ValueError: floating-point pixels, or non-zero values none of which means tampered (a mask in grey).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        values = np.asarray(image)  # (H, W)
        if values.max(initial=0) > 255:
            values = values / 257.0
    elif image.mode in ("1", "L") and "transparency" not in image.info:
        values = np.asarray(image.convert("L"))  # (H, W)
    else:
        rgba = np.asarray(image.convert("RGBA"))  # (H, W, 4)
        # Channel by channel: a maximum along the short last axis takes ten times as long.
        largest = np.maximum(np.maximum(rgba[..., 0], rgba[..., 1]), rgba[..., 2])  # (H, W)
        values = np.where(rgba[..., 3] > 127, largest, 0)  # (H, W)
    is_lossy = image.format in _LOSSY_FORMATS
    peak = float(values.max(initial=0))
    if peak <= _MAX_INDEX and not is_lossy:
        return (values > 0).astype(np.uint8)
    mask = (values > 127).astype(np.uint8)
    if not mask.any() and peak > (_MAX_COMPRESSION_NOISE if is_lossy else 0):
        raise ValueError(f"largest value {peak:g}")
    return mask


def rasterize_polygons(polygons: Sequence[Polygon], size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 with 1 where a pixel centre lies inside any polygon (each by the even-odd rule); exact, clipped."""
    height, width = size_hw
    mask = np.zeros(size_hw, np.uint8)  # (H, W)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64)  # (P, 2) as x, y
        top = int(np.clip(np.floor(points[:, 1].min()), 0, height))
        bottom = int(np.clip(np.ceil(points[:, 1].max()), 0, height))
        if bottom <= top:
            continue
        toggles = np.zeros((bottom - top, width + 1), np.int32)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            # Rows whose centre r + 0.5 lies in [min y, max y): each edge is crossed once, horizontal ones never.
            first, last = np.ceil(np.clip(np.array(sorted((y0, y1))) - 0.5, top, bottom)).astype(int)
            rows = np.arange(first, min(last, bottom))
            if rows.size:
                x_cross = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                columns = np.clip(np.ceil(x_cross - 0.5), 0, width).astype(int)  # first centre right of the edge
                np.add.at(toggles, (rows - top, columns), 1)
        mask[top:bottom] |= (np.cumsum(toggles, axis=1)[:, :width] % 2).astype(np.uint8)
    return mask


def polygons_from_mask(
    mask: np.ndarray,
    max_points: int = 64,
    min_area: float = 16.0,
    *,
    max_rings: int | None = None,
    fits: Callable[[tuple[Polygon, ...]], bool] | None = None,
) -> tuple[Polygon, ...]:
    """The regions of a mask as polygons, largest first, simplified until all together have at most `max_points` points.

    Contours run along pixel edges (8-connected), so `rasterize_polygons` gives the mask back where the budget allows.
    Holes are joined to their region by a seam of zero width. Douglas-Peucker with about the smallest common tolerance
    that fits. Left out, but never the largest: the smallest regions and holes beyond `max_rings` in number, and those
    that no longer have three points.

    Args:
        mask: (H, W), non-zero = tampered.
        max_points: >= 4, all regions together.
        min_area: in pixels; smaller regions and holes are left out.
        max_rings: at most this many regions and holes; `max_points` / 4 if None.
        fits: a second bound on the polygons, e.g. on the tokens of their text; the box of the largest region, which
            is what remains where nothing finer fits, is not asked about.
    """
    if max_points < 4:
        raise ValueError(f"a region needs up to 4 points, max_points is {max_points}")
    rings_kept = max_points // 4 if max_rings is None else max_rings
    regions = _contour_regions(_without_specks(np.asarray(mask) != 0, min_area), rings_kept)
    if not regions:
        return ()

    def is_small_enough(candidate: list[list[np.ndarray]]) -> bool:
        return _num_points(candidate) <= max_points and (fits is None or not candidate or fits(_joined(candidate)))

    simplified = _simplify(regions, 0.0)
    tolerance = 0.5
    while not is_small_enough(simplified):  # coarser and coarser, each from the last: few points are left soon
        finer, simplified = simplified, _simplify(simplified, tolerance)
        tolerance *= 2
    if tolerance > 0.5:
        low, high = 0.0, tolerance / 2
        for _ in range(8):
            middle = (low + high) / 2
            candidate = _simplify(finer, middle)
            if is_small_enough(candidate):
                high, simplified = middle, candidate
            else:
                low = middle
    if not simplified:
        (x0, y0), (x1, y1) = regions[0][0].min(axis=0), regions[0][0].max(axis=0)
        simplified = [[np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])]]
    return _joined(simplified)


def resize_mask(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) 0/1 to `size_hw`, uint8: 1 where at least half the area under a pixel was 1; growing repeats pixels."""
    height, width = size_hw
    area = np.ascontiguousarray(np.asarray(mask) != 0, dtype=np.float32)
    shrunk_hw = (min(height, area.shape[0]), min(width, area.shape[1]))
    if shrunk_hw != area.shape:
        area = cv2.resize(area, shrunk_hw[::-1], interpolation=cv2.INTER_AREA)
    if shrunk_hw != size_hw:
        area = cv2.resize(area, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return (area >= 0.5 - 1e-6).astype(np.uint8)  # float32 averages of exactly one half come out a hair below


def _decode_mask(path: str, record_id: str | None, source: str | None) -> Image.Image:
    try:
        return decode(ImageInput(path=path), field="mask_path")
    except DataFormatError as error:
        raise _about_mask(error, path, record_id, source) from error


def _read_mask_file(path: str, record_id: str | None, source: str | None) -> np.ndarray:
    try:
        return binarize_mask(_decode_mask(path, record_id, source))
    except ValueError as error:
        raise DataFormatError(
            f"mask holds neither 0/1 nor 0/255 ({error})",
            record=record_id,
            source=source,
            field="mask_path",
            found=path,
            fix="save it as PNG with 255 for tampered and 0 for the rest",
        ) from error


def _about_mask(error: DataFormatError, path: str, record_id: str | None, source: str | None) -> DataFormatError:
    """What was said of an image file, said of a mask file."""
    problem = error.problem.replace("image file", "mask file").replace("image path", "mask path")
    return DataFormatError(
        problem.replace("image is", "mask is"),
        record=record_id,
        source=source,
        field="mask_path",
        found=path,
        fix=error.fix,
    )


def _check_size(
    found_hw: tuple[int, int], size_hw: tuple[int, int], found: str, record_id: str | None, source: str | None
) -> None:
    if found_hw == size_hw:
        return
    if found_hw == size_hw[::-1]:
        fix = (
            "height and width are swapped: write HxW as height x width, turn the mask of an image that is upright by "
            "its EXIF orientation, or check that the mask belongs to this image"
        )
    else:
        fix = "resize the mask with nearest-neighbour, or check that it belongs to this image"
    raise DataFormatError(
        f"mask is {found_hw[0]}x{found_hw[1]} but the image is {size_hw[0]}x{size_hw[1]} (height x width)",
        record=record_id,
        source=source,
        field="mask_path",
        found=found,
        fix=fix,
    )


def _check_polygon_frame(
    polygons: Sequence[Polygon], size_hw: tuple[int, int], record_id: str | None, source: str | None
) -> None:
    """A point more than one pixel outside means another frame (a resized image, 0..1000 coordinates), and so do points
    that all lie in 0..1 (shares of the image's sides)."""
    height, width = size_hw
    values = [value for polygon in polygons for point in polygon for value in point]
    are_shares = all(0 <= value <= 1 for value in values) and any(value != int(value) for value in values)
    if are_shares and min(height, width) > 4:
        raise DataFormatError(
            "polygons lie in 0..1",
            record=record_id,
            source=source,
            field="polygons",
            found=polygons[0][0],
            expected=f"pixels: x in 0..{width}, y in 0..{height}",
            fix="multiply x by the width and y by the height of the upright original image",
        )
    for polygon in polygons:
        for x, y in polygon:
            if not (-1 <= x <= width + 1 and -1 <= y <= height + 1):
                raise DataFormatError(
                    "polygon leaves the image",
                    record=record_id,
                    source=source,
                    field="polygons",
                    found=(x, y),
                    expected=f"x in 0..{width}, y in 0..{height}",
                    fix="give x, y in pixels of the upright original image",
                )


def _without_specks(mask: np.ndarray, min_area: float) -> np.ndarray:
    """(H, W) uint8 without the regions (8-connected) and holes (4-connected) of fewer than `min_area` pixels."""
    result = mask.astype(np.uint8)
    for is_hole, connectivity in ((False, 8), (True, 4)):
        wanted = (1 - result) if is_hole else result
        _, components, stats, _ = cv2.connectedComponentsWithStats(wanted, connectivity=connectivity)
        is_small = stats[:, cv2.CC_STAT_AREA] < min_area
        is_small[0] = False  # component 0 is what was not asked for
        if is_hole:  # background that reaches the border is no hole
            for side in (components[0], components[-1], components[:, 0], components[:, -1]):
                is_small[side] = False
        result[is_small[components]] = is_hole
    return result


def _contour_regions(mask: np.ndarray, max_rings: int) -> list[list[np.ndarray]]:
    """[outer ring, hole, ...] per region, the largest rings first; each (P, 2) float64 in pixel-edge coordinates."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    crop = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    # A grid with nodes on pixel corners, edges and centres: contours through its set nodes run on the pixel edges.
    nodes = np.zeros((2 * crop.shape[0] + 1, 2 * crop.shape[1] + 1), np.uint8)
    nodes[1::2, 1::2] = crop
    nodes = cv2.dilate(nodes, np.ones((3, 3), np.uint8))
    contours, hierarchy = cv2.findContours(nodes, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [contour[:, 0].astype(np.float64) / 2 + (left, top) for contour in contours]
    areas = [abs(cv2.contourArea(ring.astype(np.float32))) for ring in rings]
    regions: dict[int, list[np.ndarray]] = {}
    by_area = sorted(range(len(rings)), key=lambda k: -areas[k])
    for index in by_area[:max_rings]:  # an outer ring is larger than its holes, so it comes first
        parent = int(hierarchy[0][index][3])
        if parent < 0:
            regions[index] = [rings[index]]
        else:
            regions[parent].append(rings[index])
    return list(regions.values())


def _simplify(regions: list[list[np.ndarray]], tolerance: float) -> list[list[np.ndarray]]:
    """Every region and hole that keeps three points at a tolerance in pixels."""
    result = []
    for region in regions:
        rings = [cv2.approxPolyDP(ring.astype(np.float32), tolerance, closed=True)[:, 0] for ring in region]
        if len(rings[0]) >= 3:
            result.append([ring.astype(np.float64) for ring in rings if len(ring) >= 3])
    return result


def _num_points(regions: list[list[np.ndarray]]) -> int:
    """Points of all regions once their holes are joined in; a seam repeats two points."""
    return sum(sum(map(len, rings)) + 2 * (len(rings) - 1) for rings in regions)


def _joined(regions: list[list[np.ndarray]]) -> tuple[Polygon, ...]:
    """One polygon per region, its holes attached."""
    rings = [functools.reduce(_join, region) for region in regions]
    return tuple(tuple((float(x), float(y)) for x, y in ring) for ring in rings)


def _join(outer: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Outer ring with a hole attached by a seam between their nearest points; even-odd filling keeps the hole empty."""
    distances = ((outer[:, None] - hole[None]) ** 2).sum(axis=2)  # (P_outer, P_hole)
    at, start = np.unravel_index(int(distances.argmin()), distances.shape)
    loop = np.roll(hole, -int(start), axis=0)
    return np.concatenate([outer[: at + 1], loop, loop[:1], outer[at:]])
