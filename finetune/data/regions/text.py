"""The list of candidate regions as the model reads it: ids and corners in whole pixels of the resized image it sees.

In a stored conversation `<regions>` stands for the list, so that one file fits any image size of a run; the boxes stay
in pixels of the original image (`provenance.regions`).
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.data.answer_polygons import scale_polygons
from finetune.errors import DataFormatError
from finetune.schema import Record, Turn

REGIONS_PLACEHOLDER = "<regions>"
REGIONS = "regions"
"""Key of `Record.provenance` that holds the candidates: a list of `id`, `box_xyxy`, `type` (null without a defect)."""
POSITIVE_IDS = "positive_region_ids"
"""Key of `Record.provenance` that holds the ids of the candidates with a defect."""

BoxXyxy = tuple[float, float, float, float]


def resized_box(box: Sequence[float], original_hw: tuple[int, int], processed_hw: tuple[int, int]) -> tuple[int, ...]:
    """x1, y1, x2, y2 in whole pixels of the resized image, within it, at least one pixel wide and high.

    Args:
        box: corners in pixels of the original image.
        original_hw, processed_hw: (H, W) of the upright original and of what the model sees.
    """
    corners = ((box[0], box[1]), (box[2], box[3]))
    (scaled,) = scale_polygons([corners], original_hw, processed_hw)
    sides = []
    for axis, limit in ((0, processed_hw[1]), (1, processed_hw[0])):
        low = min(max(round(scaled[0][axis]), 0), limit - 1)
        sides.append((low, max(min(round(scaled[1][axis]), limit), low + 1)))
    return (sides[0][0], sides[1][0], sides[0][1], sides[1][1])


def region_text(
    ids: Sequence[str], boxes: Sequence[Sequence[float]], original_hw: tuple[int, int], processed_hw: tuple[int, int]
) -> str:
    """`<regions>`, a line `R1: [x1, y1, x2, y2]` per candidate, `</regions>`."""
    lines = (
        f"{name}: {list(resized_box(box, original_hw, processed_hw))}" for name, box in zip(ids, boxes, strict=True)
    )
    return "\n".join((REGIONS_PLACEHOLDER, *lines, "</regions>"))


def record_regions(record: Record) -> list[tuple[str, BoxXyxy]] | None:
    """(id, box in pixels of the original image) of a record's candidates; None for a record without any.

    Raises:
        DataFormatError: `provenance.regions` is damaged, or the record has not one image.
    """
    found = record.provenance.get(REGIONS)
    if found is None:
        return None

    def problem(text: str, value: object) -> DataFormatError:
        expected = '[{"id": "R1", "box_xyxy": [x1, y1, x2, y2], ...}, ...] about one image, ids different'
        where = f"provenance.{REGIONS}"
        return DataFormatError(
            text, record=record.id, source=record.source, field=where, found=value, expected=expected
        )

    if len(record.images) != 1:
        raise problem("regions of a record without exactly one image", len(record.images))
    if not isinstance(found, list) or not found:
        raise problem("no list of regions", found)
    regions: list[tuple[str, BoxXyxy]] = []
    for entry in found:
        name, box = (entry.get("id"), entry.get("box_xyxy")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name or not isinstance(box, list | tuple) or not _is_box(box):
            raise problem("no region", entry)
        regions.append((name, (float(box[0]), float(box[1]), float(box[2]), float(box[3]))))
    if len({name for name, _ in regions}) < len(regions):
        raise problem("region id used twice", [name for name, _ in regions])
    return regions


def _is_box(box: Sequence[object]) -> bool:
    numbers = [float(each) for each in box if isinstance(each, int | float) and not isinstance(each, bool)]
    return len(numbers) == len(box) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]


def expand_regions(
    record: Record, turns: tuple[Turn, ...], sizes_hw: Sequence[tuple[int, int]], processed: Sequence[tuple[int, int]]
) -> tuple[Turn, ...]:
    """Turns with `<regions>` written out; unchanged for a record without candidates.

    Args:
        sizes_hw, processed: (H, W) of each image before and after the processor's resize.

    Raises:
        DataFormatError: as `record_regions`.
    """
    regions = record_regions(record)
    if regions is None:
        return turns
    text = region_text([name for name, _ in regions], [box for _, box in regions], sizes_hw[0], processed[0])
    return tuple(
        Turn(turn.role, turn.content if turn.role == "assistant" else turn.content.replace(REGIONS_PLACEHOLDER, text))
        for turn in turns
    )
