"""Generated answers: is it the JSON the template asks for, and does its word agree with the head and with the truth.

Strict on purpose: no repair, no code fences, no text around the object; a model that stops writing the format shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.schema import RESULT_WORDS, Polygon
from finetune.special_tokens import SpecialTokens


@dataclass(frozen=True)
class ParsedAnswer:
    """A well-formed answer.

    Args:
        label: 0 real, 1 tampered, from `result`.
        polygons: regions of `mask`, as the model wrote its coordinates.
        evidence: its explanation, "" where the answer has none.
    """

    label: int
    polygons: tuple[Polygon, ...]
    evidence: str


def parse_answer(text: str, required: Sequence[str] = ("result", "mask")) -> ParsedAnswer | None:
    """Read `{"result": "fake", "mask": [[x1, x2, ...], [y1, y2, ...], ...], "evidence": "..."}`.

    Args:
        text: the generated answer; forensic tokens and outer white space are ignored.
        required: keys that must be there besides `result`; other keys than the three are allowed.

    Returns:
        The answer, or None where the text is not one JSON object, a key is missing or double, `result` is not a word of
        `RESULT_WORDS`, `mask` is not pairs of equally long lists of at least 3 finite numbers, or `evidence` no string.
    """
    try:
        answer = json.loads(
            SpecialTokens().strip(text), object_pairs_hook=_without_doubles, parse_constant=_reject_constant
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or any(key not in answer for key in ("result", *required)):
        return None
    result, evidence, polygons = answer["result"], answer.get("evidence", ""), _polygons(answer.get("mask", []))
    if not isinstance(result, str) or result not in RESULT_WORDS or not isinstance(evidence, str) or polygons is None:
        return None
    return ParsedAnswer(RESULT_WORDS[result], polygons, evidence)


def text_metrics(
    texts: Sequence[str],
    head_labels: Sequence[int | None],
    true_labels: Sequence[int | None] | None = None,
) -> dict[str, float | int | None]:
    """How well-formed the generated answers are, and whom their verdict agrees with.

    Args:
        texts: one answer per image.
        head_labels: verdict of the classification head per image, 0, 1, or None where there is none.
        true_labels: truth per image, 0, 1, or None where unknown.

    Returns:
        `parse_rate`: share of all texts that `parse_answer` accepts. `label_agreement`: share of parsed answers with
        the head's verdict (agreement, not correctness). `label_accuracy`: share of parsed answers with the true label.
        None where nothing can be compared. `n`, `n_parsed`: int.

    Raises:
        ValueError: for lists of different lengths.
    """
    truth: Sequence[int | None] = [None] * len(texts) if true_labels is None else true_labels
    if not len(texts) == len(head_labels) == len(truth):
        raise ValueError(f"one label per text: {len(texts)} texts, {len(head_labels)} verdicts, {len(truth)} labels")
    answers = [parse_answer(text) for text in texts]
    return verdict_metrics([None if answer is None else answer.label for answer in answers], head_labels, truth)


def verdict_metrics(
    text_labels: Sequence[int | None], head_labels: Sequence[int | None], true_labels: Sequence[int | None]
) -> dict[str, float | int | None]:
    """`text_metrics` for answers that were read already.

    Args:
        text_labels: verdict of each answer, 0 or 1, None where it could not be read.
    """
    num_parsed = sum(label is not None for label in text_labels)
    return {
        "parse_rate": num_parsed / len(text_labels) if len(text_labels) else None,
        "label_agreement": _agreement(text_labels, head_labels),
        "label_accuracy": _agreement(text_labels, true_labels),
        "n": len(text_labels),
        "n_parsed": num_parsed,
    }


def _agreement(text_labels: Sequence[int | None], labels: Sequence[int | None]) -> float | None:
    pairs = zip(text_labels, labels, strict=True)
    same = [ours == theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return sum(same) / len(same) if same else None


def _polygons(mask: Any) -> tuple[Polygon, ...] | None:
    """Alternating x and y lists as polygons; None where they are not."""
    if not isinstance(mask, list) or len(mask) % 2 or not all(isinstance(axis, list) for axis in mask):
        return None
    polygons = []
    for xs, ys in zip(mask[::2], mask[1::2], strict=True):
        if len(xs) != len(ys) or len(xs) < 3 or not all(_is_number(value) for value in (*xs, *ys)):
            return None
        polygons.append(tuple((float(x), float(y)) for x, y in zip(xs, ys, strict=True)))
    return tuple(polygons)


def _is_number(value: Any) -> bool:
    """Finite int or float; `1e999` parses to infinity, and a bool is an int in Python."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
