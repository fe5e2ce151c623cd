"""What training makes of one record, piece by piece, to be looked at before a run; how it is drawn is not decided here.

Made of the dataset's own rendering and of `chat.encode`, so what is shown as supervised is what has a label. Without a
tokenizer (`without_tokenizer`) pieces are segments of text and have no ids.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from PIL import Image

from finetune.config import DataConfig
from finetune.data.answer_polygons import PolygonFrame
from finetune.data.chat import IMAGE_PAD, Segment, encode
from finetune.data.dataset import ForensicDataset, Sample, leaks, num_image_tokens
from finetune.data.image_frame import padded_size, set_frame
from finetune.data.validation import Problem, check_records
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import Record
from finetune.special_tokens import IGNORE_INDEX, SpecialTokens
from finetune.torchvision_compat import ensure_torchvision

Kind = Literal["text", "forensic", "image"]
_MAX_SPLIT = 16  # tokens that share the bytes of one character, or of several in a row


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation: a token, or a few that share a character, or all tokens of an image.

    Args:
        text: as the tokenizer decodes it; `<image 24x18=432 tokens>` (rows x columns) for an image.
        kind: forensic tokens and images are told apart by their ids.
        is_supervised: whether its tokens have a label.
        ids: its token ids, () without a tokenizer.
    """

    text: str
    kind: Kind
    is_supervised: bool
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageView:
    """One image as the sample holds it.

    Args:
        image: decoded RGB, upright.
        frame: original and processed size, and what the answer's coordinates are counted in.
        padded_hw: (H, W) of what the model is given, the processed size or the square around it.
        num_tokens: image tokens it takes.
        label: 0 real, 1 tampered, None unknown.
        mask: (h, w) uint8 0/1 at the size the loss sees, None where no pixel target is known.
    """

    image: Image.Image
    frame: PolygonFrame
    padded_hw: tuple[int, int]
    num_tokens: int
    label: int | None
    mask: np.ndarray | None

    @property
    def seen(self) -> str:
        """`HxW` at which the model sees it, and behind a stroke of the square where it is padded."""
        sizes = dict.fromkeys((self.frame.processed_hw, self.padded_hw))
        return " / ".join(f"{height}x{width}" for height, width in sizes)

    @property
    def tampered_share(self) -> float | None:
        """Share of the mask that is tampered, in [0, 1]."""
        return None if self.mask is None else float(self.mask.mean())


@dataclass(frozen=True)
class RecordView:
    """A record with everything a preview shows; no pieces and no images where it cannot be trained on."""

    record: Record
    pieces: tuple[Piece, ...]
    images: tuple[ImageView, ...]
    problems: tuple[Problem, ...]
    has_ids: bool
    max_length: int

    @property
    def num_tokens(self) -> int:
        """Length of the sequence; 0 without ids."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def num_supervised(self) -> int:
        """Tokens with a label."""
        return sum(len(piece.ids) for piece in self.pieces if piece.is_supervised)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that stand for images; known without a tokenizer too."""
        return sum(image.num_tokens for image in self.images)

    @property
    def supervised_text(self) -> str:
        """What the model is taught to write, forensic tokens included."""
        return "".join(piece.text for piece in self.pieces if piece.is_supervised)

    @property
    def has_errors(self) -> bool:
        """Whether training would refuse the record."""
        return any(problem.severity == "error" for problem in self.problems)


def view_record(dataset: ForensicDataset, index: int) -> RecordView:
    """One record of a dataset, whatever is wrong with it: problems are listed, not raised."""
    record = dataset.records[index]
    has_ids = dataset.processor.tokenizer is not None
    max_length = dataset.config.max_length
    found = check_records([record], dataset.tokens, words=dataset.template.result_words)
    problems = [problem for problem in found if problem.record]  # "" is about whole sets
    try:
        sample, segments, processed = dataset.rendered(index)
    except DataFormatError as error:
        if not any(problem.severity == "error" for problem in problems):
            problems.append(Problem("error", record.id, str(error)))
        return RecordView(record, (), (), tuple(problems), has_ids, max_length)
    images = tuple(_image_views(dataset, sample, processed))
    tokens = dataset.tokens
    if has_ids:
        pieces = tuple(_token_pieces(segments, dataset.processor.tokenizer, tokens, images))
    else:
        pieces = tuple(_segment_pieces(segments, tokens, images))
    problems += _rendering_problems(dataset, record, pieces, max_length)
    return RecordView(record, pieces, images, tuple(problems), has_ids, max_length)


def without_tokenizer(config: DataConfig) -> Any:
    """A stand-in for the processor that resizes images as Qwen2.5-VL's does but turns no text into ids.

    Raises:
        ConfigError: a budget in tokens, which cannot be counted.
    """
    if config.max_polygon_tokens is not None:
        raise ConfigError("data.max_polygon_tokens counts tokens of a model; give --config or --model with it")
    ensure_torchvision()
    from transformers import Qwen2VLImageProcessorPil

    resizer = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    set_frame(resizer, config.image_short_side, config.image_padding)
    return SimpleNamespace(tokenizer=None, image_processor=resizer)


def choose(
    found: Iterable[Record | DataFormatError], num: int, ids: Sequence[str] = (), seed: int = 0
) -> tuple[list[Record], list[DataFormatError], int]:
    """Records to look at: those named, in the order of `ids`, or `num` drawn at random, in file order.

    Memory does not grow with the number of records.

    Returns:
        The records, the errors of rows that could not be read (at most 20), and how many there were in all.

    Raises:
        DataFormatError: a name that no record has.
    """
    generator = random.Random(seed)
    wanted: dict[str, Record | None] = dict.fromkeys(ids)
    drawn: list[tuple[int, Record]] = []
    errors: list[DataFormatError] = []
    num_errors = count = 0
    for item in found:
        if isinstance(item, DataFormatError):
            num_errors += 1
            errors += [item] if len(errors) < 20 else []
        elif wanted:
            if item.id in wanted and wanted[item.id] is None:
                wanted[item.id] = item
                if all(wanted.values()):
                    break
        else:  # reservoir sampling: every record stays with the same probability
            place = count if count < num else generator.randrange(count + 1)
            if place < num:
                drawn[place : place + 1] = [(count, item)]
            count += 1
    missing = [name for name, record in wanted.items() if record is None]
    if missing:
        raise DataFormatError("no record with this id", found=missing[0], fix="see the ids by leaving --id out")
    if wanted:
        return [record for record in wanted.values() if record is not None], errors, num_errors
    return [record for _, record in sorted(drawn, key=lambda pair: pair[0])], errors, num_errors


def _image_views(dataset: ForensicDataset, sample: Sample, processed: Sequence[tuple[int, int]]) -> Iterator[ImageView]:
    sizes = [(image.height, image.width) for image in sample.images]
    frames = dataset.frames(sizes, processed)
    for image, frame, label, mask in zip(sample.images, frames, sample.cls_labels, sample.masks, strict=True):
        image_processor = dataset.processor.image_processor
        padded = padded_size(frame.processed_hw, image_processor)
        count = num_image_tokens(frame.processed_hw, image_processor)
        yield ImageView(image, frame, padded, count, None if label == IGNORE_INDEX else label, mask)


def _token_pieces(
    segments: Sequence[Segment], tokenizer: Any, tokens: SpecialTokens, images: Sequence[ImageView]
) -> Iterator[Piece]:
    """Ids and labels as training makes them, put together again into what can be read."""
    input_ids, labels = encode(segments, tokenizer, [image.num_tokens for image in images])
    forensic_ids = set(tokenizer.convert_tokens_to_ids(list(tokens.all)))
    pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    waiting = iter(images)
    start = 0
    while start < len(input_ids):
        is_supervised = labels[start] != IGNORE_INDEX
        if input_ids[start] == pad:
            image = next(waiting)
            end = start + image.num_tokens
            yield Piece(_image_text(image), "image", is_supervised, tuple(input_ids[start:end]))
        elif input_ids[start] in forensic_ids:
            end = start + 1
            yield Piece(_decode(tokenizer, input_ids[start:end]), "forensic", is_supervised, (input_ids[start],))
        else:
            end = _end_of_character(tokenizer, input_ids, labels, start, forensic_ids | {pad})
            yield Piece(_decode(tokenizer, input_ids[start:end]), "text", is_supervised, tuple(input_ids[start:end]))
        start = end


def _end_of_character(
    tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], start: int, others: set[int]
) -> int:
    """First position after `start` where no character is cut: byte-level tokens may hold a part of one.

    A cut shows as U+FFFD on both sides of it, and the sides decoded together give something else; a U+FFFD of the text
    itself does not.
    """
    limit = start + 1
    while (
        limit < min(len(input_ids), start + _MAX_SPLIT)
        and input_ids[limit] not in others
        and (labels[limit] == IGNORE_INDEX) == (labels[start] == IGNORE_INDEX)
    ):
        limit += 1
    for end in range(start + 1, limit):
        left = _decode(tokenizer, input_ids[start:end])
        if "\ufffd" not in left:
            return end
        if left + _decode(tokenizer, input_ids[end:limit]) == _decode(tokenizer, input_ids[start:limit]):
            return end
    return limit


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _segment_pieces(segments: Sequence[Segment], tokens: SpecialTokens, images: Sequence[ImageView]) -> Iterator[Piece]:
    waiting = iter(images)
    known = set(tokens.all)
    for text, is_supervised in segments:
        for index, part in enumerate(text.split(IMAGE_PAD)):
            if index:
                yield Piece(_image_text(next(waiting)), "image", is_supervised)
            end = 0
            for match in tokens.find(part):
                if match.group() in known:
                    if match.start() > end:
                        yield Piece(part[end : match.start()], "text", is_supervised)
                    yield Piece(match.group(), "forensic", is_supervised)
                    end = match.end()
            if part[end:]:
                yield Piece(part[end:], "text", is_supervised)


def _image_text(image: ImageView) -> str:
    height, width = image.padded_hw
    cell = round((height * width / image.num_tokens) ** 0.5)
    return f"<image {height // cell}x{width // cell}={image.num_tokens} tokens>"


def _rendering_problems(
    dataset: ForensicDataset, record: Record, pieces: Sequence[Piece], max_length: int
) -> list[Problem]:
    """What only shows once the conversation is rendered."""
    found = []
    length = sum(len(piece.ids) for piece in pieces)
    if length > max_length:
        found.append(
            Problem("error", record.id, f"record '{record.id}': {length} tokens, above data.max_length = {max_length}")
        )
    if not any(piece.is_supervised for piece in pieces):
        found.append(Problem("warning", record.id, f"record '{record.id}': nothing is supervised"))
    has_labels = any(target.label is not None for target in record.targets)
    if has_labels and not any(piece.kind == "forensic" for piece in pieces):
        message = f"record '{record.id}' has labels but no forensic token, so the heads learn nothing from it"
        found.append(Problem("warning", record.id, message))
    if leaks(record, dataset.template, dataset.tokens, dataset.config.layout):
        message = f"record '{record.id}': a forensic token stands after text that gives its target away"
        found.append(Problem("warning", record.id, message))
    return found
