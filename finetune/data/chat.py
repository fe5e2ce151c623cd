"""Records become conversations, and conversations become token ids with their loss mask, in one place.

Templates (`template.py`) say how questions and answers are worded; ids and labels are rendered together, segment by
segment, so that the loss mask is exact. Only assistant turns are supervised, image tokens never. The text is
Qwen2.5-VL's own chat format.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from finetune.data.template import Layout, Template, template_of
from finetune.errors import DataFormatError
from finetune.schema import ImageTarget, Polygon, Record, Turn
from finetune.special_tokens import IGNORE_INDEX, IMAGE_PLACEHOLDER, SpecialTokens

logger = logging.getLogger(__name__)

VISION_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_PAD = "<|image_pad|>"


class Segment(NamedTuple):
    """A piece of rendered chat text and whether its tokens are supervised."""

    text: str
    is_supervised: bool


def conversation(
    record: Record,
    template: Template,
    tokens: SpecialTokens,
    layout: Layout,
    polygons: Sequence[Sequence[Polygon]] = (),
) -> tuple[Turn, ...]:
    """The turns a record is trained on: the user's own, shorthand written out and missing tokens added, or rendered
    ones.

    Args:
        polygons: per image, in pixels of the *processed* image; used for rendered answers.

    Raises:
        DataFormatError: a record without turns has an image without label.
    """
    if not record.turns:
        template = template_of(record, template)
        question = prompt(template, len(record.images), key=record.id)
        answer = render_answer(record, template, tokens, layout, polygons)
        return (Turn("user", question), Turn("assistant", answer))
    turns = tuple(
        Turn(turn.role, tokens.expand(turn.content) if turn.role == "assistant" else turn.content)
        for turn in record.turns
    )
    has_tokens = any(tokens.find(turn.content) for turn in turns)
    has_targets = any(target.label is not None or target.has_mask for target in record.targets)
    return turns if has_tokens or not has_targets else _insert_tokens(record, turns, tokens, layout)


def _insert_tokens(record: Record, turns: tuple[Turn, ...], tokens: SpecialTokens, layout: Layout) -> tuple[Turn, ...]:
    """Put the tokens into the first assistant turn that has seen every image; without such a turn the text stays."""
    last_image = max((i for i, turn in enumerate(turns) if IMAGE_PLACEHOLDER in turn.content), default=-1)
    runs = tokens.run * len(record.images)
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and index > last_image:
            content = runs + turn.content if layout == "tokens_first" else turn.content + runs
            return (*turns[:index], Turn("assistant", content), *turns[index + 1 :])
    _warn_without_place(record.id)
    return turns


@cache
def _warn_without_place(record_id: str) -> None:
    """Once per record, not once per epoch."""
    logger.warning(
        "record '%s' has labels but no assistant turn after its last image, so it trains the text only; "
        "put the forensic tokens where you want them",
        record_id,
    )


def prompt(template: Template, num_images: int, key: str = "") -> str:
    """A question about `num_images` images; `key` picks the phrasing ("" the first), the same one for the same key."""
    choice = zlib.crc32(key.encode())
    if num_images == 1:
        return template.prompts[choice % len(template.prompts)]
    wording = template.prompts_multi[choice % len(template.prompts_multi)]
    return wording.replace("{images}", IMAGE_PLACEHOLDER * num_images)


def question_turns(record: Record, template: Template) -> tuple[Turn, ...]:
    """What stands before the answer that concludes about all images: the turns up to the last image, or a prompt.

    The template's first phrasing is taken, so that a score does not depend on how a record is named.

    No written answer is left in it, since an earlier one may already give a verdict: an assistant's images become the
    user's, its words are dropped.
    """
    if not record.turns:
        return (Turn("user", prompt(template_of(record, template), len(record.images), key="")),)
    last_image = max((i for i, turn in enumerate(record.turns) if IMAGE_PLACEHOLDER in turn.content), default=-1)
    end = next(
        (i for i, turn in enumerate(record.turns) if turn.role == "assistant" and i > last_image), len(record.turns)
    )
    kept = []
    for turn in record.turns[:end]:
        if turn.role != "assistant":
            kept.append(turn)
        elif images := turn.content.count(IMAGE_PLACEHOLDER):
            kept.append(Turn("user", IMAGE_PLACEHOLDER * images))
    return tuple(kept)


def render_answer(
    record: Record,
    template: Template,
    tokens: SpecialTokens,
    layout: Layout,
    polygons: Sequence[Sequence[Polygon]] = (),
) -> str:
    """The assistant's answer in a layout: one object for one image, a JSON list for several.

    Raises:
        DataFormatError: an image has no label, so there is no answer to write.
    """
    objects = []
    for index, target in enumerate(record.targets):
        if target.label is None:
            raise DataFormatError(
                f"image {index + 1} has neither a label nor a written answer",
                record=record.id,
                source=record.source,
                fix="give 'labels' (0 real, 1 tampered) or 'messages' with an assistant turn",
            )
        own_polygons = polygons[index] if index < len(polygons) else (target.polygons or ())
        objects.append(_fill(template, layout, target, tokens, own_polygons, is_single=len(record.targets) == 1))
    if len(objects) == 1:
        return objects[0]
    joined = "[" + ", ".join(objects) + "]"
    return tokens.run * len(objects) + joined if layout == "tokens_first" else joined


def _fill(
    template: Template,
    layout: Layout,
    target: ImageTarget,
    tokens: SpecialTokens,
    polygons: Sequence[Polygon],
    is_single: bool,
) -> str:
    label = int(target.label or 0)
    return template.answers[layout].format(
        tokens=tokens.run if is_single else "",
        cls="".join(tokens.cls),
        mask_tokens="".join(tokens.mask),
        result=template.result[label],
        mask=polygon_text(polygons),
        evidence=json.dumps(target.evidence or template.evidence[label], ensure_ascii=False)[1:-1],
    )


def polygon_text(polygons: Sequence[Polygon]) -> str:
    """`[[x1, x2, ...], [y1, y2, ...], ...]` with whole numbers: a pair of lists for each region."""
    lists = [[round(point[axis]) for point in polygon] for polygon in polygons for axis in (0, 1)]
    return json.dumps(lists)


def segments(turns: Sequence[Turn], system: str, *, for_generation: bool = False) -> list[Segment]:
    """Turns as chat text in pieces, each wholly supervised or not.

    Args:
        system: used unless the first turn is a system turn.
        for_generation: end with an open assistant turn instead of nothing.
    """
    pieces: list[Segment] = []
    if not turns or turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    for turn in turns:
        pieces.append(Segment(f"<|im_start|>{turn.role}\n", False))
        is_answer = turn.role == "assistant"
        for index, text in enumerate(turn.content.split(IMAGE_PLACEHOLDER)):
            if index:
                pieces.append(Segment(VISION_BLOCK, False))
            if text:
                pieces.append(Segment(text, is_answer))
        pieces.append(Segment("<|im_end|>", is_answer))
        pieces.append(Segment("\n", False))
    if for_generation:
        pieces.append(Segment("<|im_start|>assistant\n", False))
    return pieces


def encode(pieces: Sequence[Segment], tokenizer: Any, image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids and labels of rendered segments.

    Args:
        image_tokens: number of image tokens of each image, in order of the placeholders.

    Returns:
        `input_ids` and `labels` of the same length; a label is the token's own id where it is supervised, else -100.
        Runs
        of segments between supervision changes are tokenised together, so the ids are those of the whole text: every
        boundary stands at a special token or after the header's line break, which no BPE merge crosses. The exception
        is an answer that begins with a line break; it is split there, as when the model writes it after the prompt.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, is_supervised in _written(pieces, image_tokens):
        ids = tokenizer.encode(text, add_special_tokens=False)
        input_ids += ids
        labels += ids if is_supervised else [IGNORE_INDEX] * len(ids)
    return input_ids, labels


def token_spans(
    pieces: Sequence[Segment], tokenizer: Any, image_tokens: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The whole text of `encode`, and of each of its ids the characters [start, end) it was made of."""
    whole = ""
    spans: list[tuple[int, int]] = []
    for text, _ in _written(pieces, image_tokens):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        spans += [(start + len(whole), end + len(whole)) for start, end in found]
        whole += text
    return whole, spans


def _written(pieces: Sequence[Segment], image_tokens: Sequence[int]) -> list[Segment]:
    """Runs of segments between supervision changes, with each image's tokens."""
    counts = iter(image_tokens)
    return [
        Segment(re.sub(re.escape(IMAGE_PAD), lambda _: IMAGE_PAD * next(counts), text), is_supervised)
        for text, is_supervised in _merge(pieces)
    ]


def _merge(pieces: Sequence[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for piece in pieces:
        if merged and merged[-1].is_supervised == piece.is_supervised:
            merged[-1] = Segment(merged[-1].text + piece.text, piece.is_supervised)
        else:
            merged.append(piece)
    return merged
