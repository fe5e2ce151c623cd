"""Which tokens of a question name which candidate region, for a model that looks at the regions itself.

Found by characters while the text is rendered, never by searching ids, which a tokenizer may merge across a border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.data.chat import Segment, token_spans
from finetune.data.regions.text import record_regions, region_text, resized_box
from finetune.errors import DataFormatError
from finetune.schema import Record


def region_places(
    record: Record,
    pieces: Sequence[Segment],
    tokenizer: Any,
    image_tokens: Sequence[int],
    sizes_hw: Sequence[tuple[int, int]],
    processed: Sequence[tuple[int, int]],
) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Boxes of a record's regions, and the tokens of each one's id in its lists.

    Args:
        pieces, image_tokens: the chat text as `finetune.data.chat.encode` gets it, `<regions>` written out.
        sizes_hw, processed: (H, W) of each image before and after the processor's resize.

    Returns:
        Boxes x1, y1, x2, y2 in whole pixels of the resized image, as the list says, and for each of them the numbers of
        the tokens that its id was made of; both empty for a record without candidates.

    Raises:
        DataFormatError: no list in the question, or an id that shares a token with what stands beside it.
    """
    regions = record_regions(record)
    if regions is None:
        return [], []
    names, boxes = [name for name, _ in regions], [box for _, box in regions]
    text, spans = token_spans(pieces, tokenizer, image_tokens)
    places = _id_characters(record, text, names, region_text(names, boxes, sizes_hw[0], processed[0]))
    tokens: list[list[int]] = [[] for _ in names]
    for number, (first, last) in places:
        touching = [token for token, (start, end) in enumerate(spans) if start < last and end > first]
        if spans[touching[0]][0] != first or spans[touching[-1]][1] != last:
            raise DataFormatError(
                "the tokenizer joins a region's id to the text beside it",
                record=record.id,
                source=record.source,
                found=names[number],
                expected="ids of letters and digits, such as R1",
                fix="build the regions again with forensics regions prepare and build",
            )
        tokens[number] += touching
    return [resized_box(box, sizes_hw[0], processed[0]) for box in boxes], tokens


def _id_characters(record: Record, text: str, names: Sequence[str], block: str) -> list[tuple[int, tuple[int, int]]]:
    """Number of a region and the characters [start, end) of its id, wherever the list `block` stands in the text."""
    lines = block.split("\n")[1:-1]
    found: list[tuple[int, tuple[int, int]]] = []
    at = text.find(block)
    while at >= 0:
        first = at + block.index("\n") + 1
        for number, (name, line) in enumerate(zip(names, lines, strict=True)):
            found.append((number, (first, first + len(name))))
            first += len(line) + 1
        at = text.find(block, at + len(block))
    if not found:
        raise DataFormatError(
            "no list of regions in the question, so the model cannot be told which region is meant",
            record=record.id,
            source=record.source,
            expected="<regions> in a question",
            fix="add <regions>, or set model.region_features: false",
        )
    return found
