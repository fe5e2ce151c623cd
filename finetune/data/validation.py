"""Finds everything wrong with a data set before training starts, all at once: `forensics doctor --data FILE`.

Checks only, nothing is repaired or left out. Each problem is one line with the record, the value found and what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.containers import backing_file
from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.data.readers import scan_records
from finetune.errors import DataFormatError
from finetune.schema import Record
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens

_CHAT_TOKEN = re.compile(r"<\|(?:im_start|im_end|endoftext|image_pad|video_pad|vision_start|vision_end|vision_pad)\|>")
_ABSURD_TOKEN = re.compile(r"<(?:cls|mask)_\d{5,}>")
_MAX_LISTED = 20


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
    progress: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
) -> tuple[list[Record], list[Problem]]:
    """The records of a file that can be read, and every problem of the file and of those records.

    Args:
        format, root, options: of the reader. check_pixels, has_text, progress: see `check_records`.
    """
    records, errors = scan_records(path, format, root, options)
    problems = [Problem("error", error.record or "", str(error)) for error in errors]
    if records or not problems:
        problems += check_records(records, tokens, check_pixels=check_pixels, has_text=has_text, progress=progress)
    return records, problems


def check_records(
    records: Sequence[Record],
    tokens: SpecialTokens,
    *,
    check_pixels: bool = True,
    has_text: bool = True,
    progress: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
) -> list[Problem]:
    """Every problem of a data set that is meant for training, in record order; [] when it is fit for use.

    Args:
        records: as read.
        tokens: the model's vocabulary.
        check_pixels: decode every image and mask; otherwise only ask whether the files exist.
        has_text: False for a run that trains on images, labels and masks alone: conversations are not looked at, and a
            record needs an image.
        progress: wraps the iteration, e.g. `tqdm`.
    """
    if not records:
        error = DataFormatError("empty data set", expected="at least one record", fix="check the path and the splits")
        return [Problem("error", "", str(error))]
    problems: list[Problem] = []
    for record in progress(records) if progress else records:
        about_text = _conversation_errors(record, tokens) if has_text else _picture_errors(record)
        errors = [*about_text, *_file_errors(record, check_pixels)]
        problems += [Problem("error", record.id, str(error)) for error in errors]
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


def validate_for_training(
    records: Sequence[Record],
    tokens: SpecialTokens,
    *,
    check_pixels: bool = True,
    has_text: bool = True,
    progress: Callable[[Sequence[Record]], Iterable[Record]] | None = None,
) -> list[Problem]:
    """`check_records`, raising on errors; the warnings are returned for the caller to print.

    Raises:
        InvalidDataError: lists the first 20 errors, one line each.
    """
    problems = check_records(records, tokens, check_pixels=check_pixels, has_text=has_text, progress=progress)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        num_bad = len({problem.record for problem in errors})
        raise InvalidDataError(f"{len(errors)} problems in {num_bad} of {len(records)} records", errors)
    return problems


def leaking_tokens(record: Record, tokens: SpecialTokens) -> bool:
    """Whether a forensic token stands after assistant text, which a causal model has then read at the token.

    Text before the token counts wherever an earlier assistant turn or the same one holds it; whitespace, `<image>` and
    other forensic tokens do not count.
    """
    has_text = False
    for turn in record.turns:
        if turn.role != "assistant":
            continue
        end = 0
        content = _expand(turn.content, tokens)
        for match in tokens.find(content):
            has_text = has_text or bool(content[end : match.start()].replace(IMAGE_PLACEHOLDER, "").strip())
            if has_text:
                return True
            end = match.end()
        has_text = has_text or bool(content[end:].replace(IMAGE_PLACEHOLDER, "").strip())
    return False


def _error(record: Record, problem: str, **details: str) -> DataFormatError:
    return DataFormatError(problem, record=record.id, source=record.source or None, **details)


def _expand(text: str, tokens: SpecialTokens) -> str:
    """The shorthand written out, unless a slip of the keyboard asks for billions (`<mask_1> - <mask_999999999>`)."""
    return text if _ABSURD_TOKEN.search(text) else tokens.expand(text)


def _conversation_errors(record: Record, tokens: SpecialTokens) -> Iterable[DataFormatError]:
    if not record.turns:
        unlabelled = [index for index, target in enumerate(record.targets) if target.label is None]
        if unlabelled:
            yield _error(
                record,
                f"image {unlabelled[0]} has no label and the record no conversation",
                field="labels",
                fix="add the label the answer is to be made from, or messages",
            )
        return
    num_placeholders = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in record.turns)
    if num_placeholders != len(record.images):
        yield _error(
            record,
            f"{num_placeholders} {IMAGE_PLACEHOLDER} placeholders but {len(record.images)} images",
            field="images",
            fix='list one file per placeholder, "images": ["a.jpg"]'
            if num_placeholders > len(record.images)
            else f"write {IMAGE_PLACEHOLDER} in the conversation where each image stands",
        )
    if all(turn.role != "assistant" for turn in record.turns):
        yield _error(record, "conversation without an assistant turn", fix="add the answer to learn from")
    for index, turn in enumerate(record.turns):
        if turn.role == "assistant" and not turn.content.strip():
            yield _error(
                record, "assistant turn is empty", field=f"turn {index}", fix="write the answer or remove the turn"
            )
        if turn.role != "assistant" and (matches := tokens.find(turn.content)):
            yield _error(
                record,
                f"forensic token in a {turn.role} turn",
                field=f"turn {index}",
                found=matches[0].group(),
                fix="forensic tokens belong in the assistant's answer",
            )
        if match := _CHAT_TOKEN.search(turn.content):
            yield _error(
                record,
                "control token of the chat format in a text",
                field=f"turn {index}",
                found=match.group(),
                fix=f"remove it; an image is written {IMAGE_PLACEHOLDER}",
            )
    yield from _token_errors(record, tokens, len(record.images) or num_placeholders)


def _picture_errors(record: Record) -> Iterable[DataFormatError]:
    """What a run without text cannot use: a record without an image, an image of which nothing is known."""
    if not record.images:
        yield _error(record, "no image, and this run reads images alone", fix="remove the record, or train with text")
    unknown = [index for index, target in enumerate(record.targets) if target.label is None and not target.has_mask]
    if unknown:
        yield _error(
            record,
            f"image {unknown[0]} has neither label nor mask",
            field="labels",
            fix="add the label (0 real, 1 tampered) or a mask, or remove the record",
        )


def _token_errors(record: Record, tokens: SpecialTokens, num_images: int) -> Iterable[DataFormatError]:
    """Unknown tokens, or runs that are not whole: over all assistant turns 0 or `num_images` runs of each kind."""
    answers = [_expand(turn.content, tokens) for turn in record.turns if turn.role == "assistant"]
    unknown = list(dict.fromkeys(token for answer in answers for token in tokens.unknown(answer)))
    found = [match.group() for answer in answers for match in tokens.find(answer)]
    for kind, run in (("cls", tokens.cls), ("mask", tokens.mask)):
        bad = [token for token in unknown if token.startswith(f"<{kind}")]
        if bad:
            yield _error(
                record,
                f"unknown {kind} token",
                found=" ".join(bad[:3]) + (" ..." if len(bad) > 3 else ""),
                expected=_spelled(run),
                fix=_unknown_token_fix(kind, bad, len(run)),
            )
            continue
        sequence = [token for token in found if token.startswith(f"<{kind}")]
        if not sequence or sequence == list(run) * num_images:
            continue
        expected_count = num_images * len(run)
        expected = f"none, or {_spelled(run)} once for each of the {num_images} images ({expected_count} tokens)"
        if len(sequence) != expected_count:
            yield _error(
                record,
                f"{len(sequence)} {kind} tokens for {num_images} images",
                found=_spelled(sequence),
                expected=expected,
                fix=f"write the whole run, or set tokens.num_{kind}",
            )
        else:
            at = next(k for k, token in enumerate(sequence) if token != run[k % len(run)])
            yield _error(
                record,
                f"{kind} tokens out of order at number {at + 1}",
                found=sequence[at],
                expected=f"{run[at % len(run)]}; in all {expected}",
                fix="write each run in unbroken order",
            )


def _spelled(run: Sequence[str]) -> str:
    return "".join(run) if len(run) <= 3 else f"{run[0]}{run[1]}...{run[-1]}"


def _unknown_token_fix(kind: str, bad: list[str], num_known: int) -> str:
    """Which key of the configuration, or which spelling, makes the tokens known."""
    numbers = [token.rstrip(">").rpartition("_")[2] for token in bad if "_" in token]
    is_odd = [n for n in numbers if not n.isascii() or n.startswith("0") or len(n) > 4]
    if is_odd:
        return f"number the tokens <{kind}_1>, <{kind}_2>, ... without leading zeros"
    if not numbers:
        return f"write <cls_1> - <cls_{num_known}>, or set tokens.num_cls: 1"
    largest = max(map(int, numbers))
    if kind == "cls" and largest == 1:
        return "write <cls>, the spelling of a single token"
    return f"set tokens.num_{kind}: {largest}, or write " + (
        "<cls>" if num_known == 1 else f"<{kind}_1> - <{kind}_{num_known}>"
    )


def _file_errors(record: Record, check_pixels: bool) -> Iterable[DataFormatError]:
    """Images and masks that are missing, damaged, or do not fit each other."""
    for image, target in zip(record.images, record.targets, strict=True):
        try:
            if check_pixels:
                width, height = load_image(image, record.id, record.source or None).size
                load_mask(target, (height, width), record.id, record.source or None)
                continue
        except DataFormatError as error:
            yield error
            continue
        for kind, path in (("image", image.path), ("mask", target.mask_path)):
            if path is not None and not os.path.isfile(backing_file(path)):
                yield _error(
                    record,
                    f"{kind} file not found",
                    field=f"{kind}s",
                    found=path,
                    fix="check the path and the data root",
                )
