"""Finds everything wrong with a data set before training starts, all at once: `forensics doctor --data FILE`.

Checks only, nothing is repaired or left out. Each problem is one line with the record, the value found and what to do.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.containers import backing_file
from finetune.data.image_size import MAX_ASPECT, too_narrow
from finetune.data.images import image_size_hw, load_image, missing_file_advice, seems_cut_off
from finetune.data.masks import check_mask_size, load_mask, may_contradict_label
from finetune.data.readers import scan_records
from finetune.data.token_checks import control_token, missing_kind, record_error, reserved, token_errors
from finetune.errors import DataFormatError
from finetune.schema import RESULT_WORDS, ImageInput, ImageTarget, Record
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens

_LIST = re.compile(r"^(?:<[^<>]*>|\s)*\[\s*\{")
"""The beginning of an answer about several images, behind its forensic tokens."""
_MAX_LISTED = 20
_FEW_MASKS = 8
"""Below so many masks it is not asked whether they seem inverted."""


@dataclass(frozen=True)
class Problem:
    """One finding.

    Args:
        severity: an error stops training; a warning is printed.
        record: id of the record, "" where the whole file is meant.
        message: one line, in `DataFormatError`'s wording.
    """

    severity: Literal["error", "warning"]
    record: str
    message: str


class InvalidDataError(DataFormatError):
    """Several problems of one data set, one per line."""

    def __init__(self, problem: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(problem)
        self.problems = tuple(problems)
        lines = [f"- {found.message}" for found in self.problems[:_MAX_LISTED]]
        if len(self.problems) > _MAX_LISTED:
            lines.append(
                f"- and {len(self.problems) - _MAX_LISTED} more: run `forensics doctor --data FILE` to list all"
            )
        self.args = ("\n".join([str(self), *lines]),)

    def __reduce__(self) -> tuple[type[InvalidDataError], tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.problem, self.problems)  # pickled by worker processes


def check_file(
    path: str | os.PathLike[str],
    tokens: SpecialTokens,
    *,
    format: str = "auto",
    root: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    check_pixels: bool = True,
    has_text: bool = True,
    words: Mapping[str, int] = RESULT_WORDS,
    progress: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
) -> tuple[list[Record], list[Problem]]:
    """The records of a file that can be read, and every problem of the file and of those records.

    Args:
        format, root, options: of the reader. check_pixels, has_text, words, progress: see `check_records`.
    """
    records, errors = scan_records(path, format, root, options)
    problems = [Problem("error", error.record or "", str(error)) for error in errors]
    if records or not problems:
        problems += check_records(
            records, tokens, check_pixels=check_pixels, has_text=has_text, words=words, progress=progress
        )
    return records, problems


def check_records(
    records: Sequence[Record],
    tokens: SpecialTokens,
    *,
    check_pixels: bool = True,
    has_text: bool = True,
    words: Mapping[str, int] = RESULT_WORDS,
    progress: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
) -> list[Problem]:
    """Every problem of a data set that is meant for training, in record order; [] when it is fit for use.

    Args:
        records: as read.
        tokens: the model's vocabulary.
        check_pixels: decode every image and mask; otherwise only ask whether the files exist.
        has_text: False for a run that trains on images, labels and masks alone: conversations are not looked at, and a
            record needs an image.
        words: of an answer's `"result"` and the labels they stand for, see `Template.result_words`.
        progress: wraps the iteration, e.g. `tqdm`.
    """
    if not records:
        error = DataFormatError("empty data set", expected="at least one record", fix="check the path and the splits")
        return [Problem("error", "", str(error))]
    problems: list[Problem] = []
    lacking: dict[str, list[str]] = {}
    contradicting: list[str] = []
    covered: dict[str, float] = {}
    said = _result_pattern(words)
    for record in progress(records) if progress else records:
        about_text = conversation_errors(record, tokens) if has_text else _picture_errors(record)
        errors = [*about_text, *file_errors(record, check_pixels, covered)]
        problems += [Problem("error", record.id, str(error)) for error in errors]
        if has_text and (kind := missing_kind(record, tokens)):
            lacking.setdefault(kind, []).append(record.id)
        if has_text and _contradicts_itself(record, said, words):
            contradicting.append(record.id)
    for kind, names in lacking.items():
        what = {"mask": "a mask", "cls": "a label"}[kind]
        reason = f"{what} but no {kind} token, so the {kind} head learns nothing from it"
        problems.append(_warning(names, reason))
    if contradicting:
        reason = 'the answer\'s "result" and the label disagree; correct the one that is wrong'
        problems.append(_warning(contradicting, reason))
    if warning := _seem_inverted(covered):
        problems.append(warning)
    labels = {target.label for record in records for target in record.targets} - {None}
    if len(labels) == 1:
        only = labels.pop()
        error = DataFormatError(
            "only one class present",
            found=f"every labelled image has label {only}",
            expected="0 (real) and 1 (tampered)",
            fix=f"add {'tampered' if only == 0 else 'real'} images, or the model learns one answer for all",
        )
        problems.append(Problem("warning", "", str(error)))
    return problems


def _warning(names: Sequence[str], message: str) -> Problem:
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return Problem("warning", names[0], f"record '{names[0]}'{others}: {message}")


def _seem_inverted(covered: Mapping[str, float]) -> Problem | None:
    """A warning where the masks of tampered images mark more than half of the image as a rule.

    Args:
        covered: by record, the largest marked share of its tampered images.
    """
    large = {name: share for name, share in covered.items() if share > 0.5}
    if len(covered) < _FEW_MASKS or 2 * len(large) <= len(covered):
        return None
    reason = (
        f"{len(large)} of {len(covered)} masks of tampered images mark more than half of the image "
        f"(median {statistics.median(covered.values()):.0%}); if black marks the tampering in them, give their source "
        "the option mask_pixels: dark"
    )
    return _warning(list(large), reason)


def _result_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Finds what answers say under `"result"`, quoted or as `text_first` writes it."""
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    return re.compile(rf'"result"\s*:\s*"?({"|".join(longest_first)})(?=\s*["<,}}])')


def _contradicts_itself(record: Record, result: re.Pattern[str], labels_of: Mapping[str, int]) -> bool:
    """Whether an answer's `"result"` is the word for one label and its image has the other.

    Looked for where it is clear which image is meant: one image, whose answers say one word each, or one answer that is
    a list with an object for each image.
    """
    answers = [turn.content for turn in record.turns if turn.role == "assistant"]
    said = [[labels_of[word] for word in result.findall(answer)] for answer in answers]
    labels = [target.label for target in record.targets]
    if len(labels) == 1:
        return any(len(words) == 1 and labels[0] not in (None, words[0]) for words in said)
    for answer, words in zip(answers, said, strict=True):
        if _LIST.search(answer) and len(words) == len(labels):
            return any(label not in (None, word) for label, word in zip(labels, words, strict=True))
    return False


def validate_for_training(
    records: Sequence[Record],
    tokens: SpecialTokens,
    *,
    check_pixels: bool = True,
    has_text: bool = True,
    words: Mapping[str, int] = RESULT_WORDS,
    progress: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
) -> list[Problem]:
    """`check_records`, raising on errors; the warnings are returned for the caller to print.

    Raises:
        InvalidDataError: lists the first 20 errors, one line each.
    """
    problems = check_records(
        records, tokens, check_pixels=check_pixels, has_text=has_text, words=words, progress=progress
    )
    _refuse([problem for problem in problems if problem.severity == "error"], len(records))
    return problems


def validate_for_evaluation(
    records: Sequence[Record],
    *,
    has_text: bool = True,
    progress: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
) -> None:
    """What keeps a model from judging a data set and its figures from being taken: questions, images and masks.

    Headers are read, and files that seem cut off decoded. An image may lack its label, a question its answer, and an
    answer may hold another model's tokens: none of that is read.

    Args:
        has_text: whether the model is asked in words at all. progress: as of `check_records`.

    Raises:
        InvalidDataError: lists the first 20 errors, one line each.
    """
    problems = []
    for record in progress(records) if progress else records:
        errors = [*(question_errors(record) if has_text else ()), *file_errors(record, check_pixels=False)]
        if not record.images:
            errors.append(record_error(record, "no image, so there is nothing to judge", fix="remove the record"))
        problems += [Problem("error", record.id, str(error)) for error in errors]
    _refuse(problems, len(records))


def _refuse(errors: Sequence[Problem], num_records: int) -> None:
    """Raise where there is any."""
    if errors:
        num_bad = len({problem.record for problem in errors})
        raise InvalidDataError(f"{len(errors)} problems in {num_bad} of {num_records} records", errors)


def conversation_errors(record: Record, tokens: SpecialTokens) -> Iterable[DataFormatError]:
    """What is wrong with a record's text: placeholders, roles, empty answers, control tokens, forensic tokens.

    Of a record without a conversation: what its answer could not be made from.
    """
    if not record.turns:
        unlabelled = [index for index, target in enumerate(record.targets) if target.label is None]
        if unlabelled:
            yield record_error(
                record,
                f"image {unlabelled[0]} has no label and the record no conversation",
                field="labels",
                fix="add the label the answer is to be made from, or messages",
            )
        for target in record.targets:
            if found := reserved(target.evidence or ""):
                yield record_error(
                    record,
                    "token in the evidence, which is put into the answer as it is",
                    field="evidence",
                    found=found,
                    fix="say it in words; the answer's tokens are put in by data.layout",
                )
        return
    yield from question_errors(record)
    if all(turn.role != "assistant" for turn in record.turns):
        yield record_error(record, "conversation without an assistant turn", fix="add the answer to learn from")
    for index, turn in enumerate(record.turns):
        if turn.role == "assistant" and not turn.content.strip():
            yield record_error(
                record, "assistant turn is empty", field=f"turn {index}", fix="write the answer or remove the turn"
            )
    yield from token_errors(record, tokens, len(record.images) or _num_placeholders(record))


def question_errors(record: Record) -> Iterable[DataFormatError]:
    """What is wrong with a conversation whatever its answers are worth: images that have no place, tokens in a text
    that is not an answer, control tokens."""
    num_placeholders = _num_placeholders(record)
    if record.turns and num_placeholders != len(record.images):
        yield record_error(
            record,
            f"{num_placeholders} {IMAGE_PLACEHOLDER} placeholders but {len(record.images)} images",
            field="images",
            fix='list one file per placeholder, "images": ["a.jpg"]'
            if num_placeholders > len(record.images)
            else f"write {IMAGE_PLACEHOLDER} in the conversation where each image stands",
        )
    for index, turn in enumerate(record.turns):
        if turn.role != "assistant" and (matches := SpecialTokens.find(turn.content)):
            yield record_error(
                record,
                f"forensic token in a {turn.role} turn",
                field=f"turn {index}",
                found=matches[0].group(),
                fix="forensic tokens belong in the assistant's answer",
            )
        if found := control_token(turn.content):
            yield record_error(
                record,
                "control token of the chat format in a text",
                field=f"turn {index}",
                found=found,
                fix=f"remove it; an image is written {IMAGE_PLACEHOLDER}",
            )


def _num_placeholders(record: Record) -> int:
    return sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in record.turns)


def _picture_errors(record: Record) -> Iterable[DataFormatError]:
    """What a run without text cannot use: a record without an image, an image of which nothing is known."""
    if not record.images:
        yield record_error(
            record, "no image, and this run reads images alone", fix="remove the record, or train with text"
        )
    unknown = [index for index, target in enumerate(record.targets) if target.label is None and not target.has_mask]
    if unknown:
        yield record_error(
            record,
            f"image {unknown[0]} has neither label nor mask",
            field="labels",
            fix="add the label (0 real, 1 tampered) or a mask, or remove the record",
        )


def file_errors(
    record: Record, check_pixels: bool, covered: dict[str, float] | None = None
) -> Iterable[DataFormatError]:
    """Images and masks that are missing, damaged, or do not fit each other.

    Without `check_pixels` headers are read, and only files that seem cut off are decoded: what is found here would
    otherwise end a run when the record is drawn.

    Args:
        covered: gets, by the record's id, the largest share of a tampered image that its mask marks, where masks are
            opened.
    """
    for image, target in zip(record.images, record.targets, strict=True):
        if check_pixels:
            yield from _pixel_errors(record, image, target, covered)
            continue
        missing, is_cut_off = False, False
        for kind, path in (("image", image.path), ("mask", target.mask_path)):
            if path is None:
                continue
            if not os.path.isfile(backing_file(path)):
                missing = True
                yield record_error(
                    record,
                    f"{kind} file not found",
                    field=f"{kind}s",
                    found=path,
                    fix=missing_file_advice(path),
                )
            else:
                is_cut_off = is_cut_off or (backing_file(path) == path and seems_cut_off(path))
        if is_cut_off and not missing:
            yield from _pixel_errors(record, image, target)
        elif not missing:
            yield from _header_errors(record, image, target)


def _header_errors(record: Record, image: ImageInput, target: ImageTarget) -> Iterable[DataFormatError]:
    """What the headers of an image and its mask, or its polygons, bring to light: the first error."""
    try:
        size_hw = image_size_hw(image, record.id, record.source or None)
        check_mask_size(target, size_hw, record.id, record.source or None)
        if may_contradict_label(target):
            load_mask(target, size_hw, record.id, record.source or None)
    except DataFormatError as error:
        yield error


def _pixel_errors(
    record: Record, image: ImageInput, target: ImageTarget, covered: dict[str, float] | None = None
) -> Iterable[DataFormatError]:
    """What decoding an image and its mask brings to light: the first error. `covered`: see `file_errors`."""
    try:
        width, height = load_image(image, record.id, record.source or None).size
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise too_narrow([(height, width)], record.id, record.source or None)
        mask = load_mask(target, (height, width), record.id, record.source or None)
        if covered is not None and mask is not None and target.label == 1:
            covered[record.id] = max(float(mask.mean()), covered.get(record.id, 0.0))
    except DataFormatError as error:
        yield error
