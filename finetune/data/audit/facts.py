"""One record looked at in a worker process: every file opened once, what is wrong with it, and numbers for the rest.

The facts are small, so that a data set's fit in memory; pixels stay in the worker.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from finetune.data.audit.features import container_features, content_features
from finetune.data.fingerprints import Fingerprint, fingerprint
from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.data.token_checks import leaking_tokens
from finetune.data.validation import conversation_errors
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens

# What a statement about one class says; in a question both classes, or a question mark, are no statement.
_REAL = re.compile(
    r"真实|真图|原图|未经?篡改|没有篡改|\b(?:real|authentic|genuine|pristine|unaltered|untampered)\b", re.I
)
_FAKE = re.compile(
    r"伪造|篡改|造假|拼接|PS过|\b(?:fake|tampered|forged|forgery|spliced|manipulated|doctored|photoshopped)\b", re.I
)
_SENTENCE = re.compile(r"[^。！!？?.；;\n]+[。！!？?.；;\n]?")
_ASKS = re.compile(
    r"[?？]|是否|吗|有没有|还是|或|是不是|判断|检查|分析|鉴定|whether|\bif\b|\bor\b|\bany\b|check|inspect", re.I
)


class Job(NamedTuple):
    """A record with the split it belongs to and its group, as the caller sees them."""

    record: Record
    split: str
    group: str
    fold_key: str


class Fault(NamedTuple):
    """Something that makes a record unusable: which check it belongs to, and the one-line message."""

    check: str
    message: str


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """A readable image.

    Args:
        index: place among the record's images.
        label: 0, 1 or None.
        fingerprint: see fingerprints.py.
        features: by the names of `FEATURES`.
        mask_share: of tampered pixels, in [0, 1]; None without a usable pixel target.
        has_wrong_extension: the name says another format than the file has.
    """

    index: int
    label: int | None
    fingerprint: Fingerprint
    features: dict[str, float | str]
    mask_share: float | None
    has_wrong_extension: bool


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """A record without its pixels.

    Args:
        question: text before the first answer; "" where the template asks.
        labels: of all its images, readable or not.
        stated: class that the question states (0, 1), None where it asks.
        has_late_tokens: a forensic token stands after text that gives its target away.
        named_file: name of an image file that the question spells out, "".
    """

    id: str
    source: str
    split: str
    group: str
    fold_key: str
    question: str
    has_turns: bool
    labels: tuple[int | None, ...]
    stated: int | None
    has_late_tokens: bool
    named_file: str
    images: tuple[ImageFacts, ...]
    faults: tuple[Fault, ...]


class Examiner:
    """Callable of a worker process: a `Job` to its `RecordFacts`."""

    def __init__(self, tokens: SpecialTokens) -> None:
        self.tokens = tokens

    def __call__(self, job: Job) -> RecordFacts:
        record = job.record
        faults = [Fault("conversation", message) for message in self._conversation(record)]
        images = []
        for index, (image, target) in enumerate(zip(record.images, record.targets, strict=True)):
            facts, found = _examine(record, index, image, target)
            faults += found
            if facts is not None:
                images.append(facts)
        question = question_text(record)
        return RecordFacts(
            id=record.id,
            source=record.source,
            split=job.split,
            group=job.group,
            fold_key=job.fold_key,
            question=question,
            has_turns=bool(record.turns),
            labels=tuple(target.label for target in record.targets),
            stated=stated_class(question),
            has_late_tokens=leaking_tokens(record, self.tokens),
            named_file=_named_file(record, question),
            images=tuple(images),
            faults=tuple(faults),
        )

    def _conversation(self, record: Record) -> Iterator[str]:
        """What is wrong with the text and its tokens; files are opened elsewhere."""
        yield from map(str, conversation_errors(record, self.tokens))


def question_text(record: Record) -> str:
    """What a model has read when it writes the first answer: system and user text before it, placeholders out."""
    texts = []
    for turn in record.turns:
        if turn.role == "assistant":
            break
        texts.append(turn.content.replace(IMAGE_PLACEHOLDER, " ").strip())
    return "\n".join(texts).strip()


def stated_class(question: str) -> int | None:
    """0 or 1 where a sentence of the question states that class and only that one; a sentence that asks states none."""
    stated = set()
    for sentence in _SENTENCE.findall(question):
        if not _ASKS.search(sentence):
            rest = _REAL.sub(" ", sentence)  # "untampered" and 未篡改 hold the other class's words
            is_real, is_fake = rest != sentence, bool(_FAKE.search(rest))
            if is_real != is_fake:
                stated.add(int(is_fake))
    return stated.pop() if len(stated) == 1 else None


def _named_file(record: Record, question: str) -> str:
    for image in record.images:
        name = os.path.basename(image.path) if image.path is not None else ""
        stem = os.path.splitext(name)[0]
        if len(stem) >= 4 and re.search(rf"(?<!\w){re.escape(stem)}(?!\w)", question):
            return name
    return ""


def _examine(
    record: Record, index: int, image: ImageInput, target: ImageTarget
) -> tuple[ImageFacts | None, list[Fault]]:
    source = record.source or None
    try:
        rgb = load_image(image, record.id, source)
    except DataFormatError as error:
        return None, [Fault("unreadable", str(error))]
    faults: list[Fault] = []
    share = None
    size_hw = (rgb.height, rgb.width)
    try:
        mask = load_mask(target, size_hw, record.id, source)
        share = None if mask is None else float(mask.mean())
    except DataFormatError as error:
        is_size = error.problem.startswith("mask is") and "but the image is" in error.problem
        faults.append(Fault("mask_size" if is_size else "mask", str(error)))
    features = container_features(image, size_hw) | content_features(rgb)
    facts = ImageFacts(index, target.label, fingerprint(image, rgb), features, share, _has_wrong_extension(features))
    return facts, faults


_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}


def _has_wrong_extension(features: dict[str, float | str]) -> bool:
    known = _EXTENSIONS.get(str(features["format"]))
    extension = features.get("extension")
    return known is not None and bool(extension) and extension not in known
