"""Written inspection reports against true ones: the graded risk level, and every field's text.

A field that was not written counts as wrong and as an empty text; it is never left out of a mean. A field whose truth
is unknown is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.metrics.text_overlap import chrf, rouge_l

MISSING = ""
"""Stands in `confusion` for a level that was not written, or is none of the known ones."""


def level_metrics(written: Sequence[str | None], true: Sequence[str], levels: Sequence[str]) -> dict[str, Any]:
    """How well an ordered grade is met.

    Args:
        written: of each report the level that was written, None or another word where there is no usable one.
        true: of `levels`.
        levels: from the least to the most severe.

    Returns:
        `accuracy`: share of all reports whose level is right. `within_one`: share at most one level off. `macro_f1`:
        mean F1 over the levels that occur among truth or answers; a level not written is a miss. `quadratic_kappa`:
        Cohen's kappa with quadratic weights over the reports with a usable level (`n_graded` of `n`); None where truth
        and answers are all one level, or nothing is graded. `majority`: share of the commonest true level, which a
        constant answer reaches. `confusion`: truth -> answer -> count, `MISSING` for no usable level. Numbers are None
        for no report.

    Raises:
        ValueError: lists of different lengths, or a true level that is none of `levels`.
    """
    if len(written) != len(true):
        raise ValueError(f"one true level per report: {len(written)} answers, {len(true)} truths")
    if strange := sorted(set(true) - set(levels)):
        raise ValueError(f"true levels {strange} are none of {list(levels)}")
    answers = [level if level in levels else MISSING for level in written]
    confusion = {level: dict.fromkeys([*levels, MISSING], 0) for level in levels}
    for truth, answer in zip(true, answers, strict=True):
        confusion[truth][answer or MISSING] += 1
    n = len(true)
    place = {level: index for index, level in enumerate(levels)}
    graded = [
        (place[truth], place[answer]) for truth, answer in zip(true, answers, strict=True) if answer and answer in place
    ]
    return {
        "accuracy": sum(confusion[level][level] for level in levels) / n if n else None,
        "within_one": sum(abs(truth - answer) <= 1 for truth, answer in graded) / n if n else None,
        "macro_f1": _macro_f1(confusion, levels),
        "quadratic_kappa": _quadratic_kappa(graded, len(levels)),
        "majority": max(sum(row.values()) for row in confusion.values()) / n if n else None,
        "confusion": confusion,
        "n": n,
        "n_graded": len(graded),
    }


def field_metrics(
    written: Sequence[Mapping[str, str]], true: Sequence[Mapping[str, str]], fields: Sequence[str]
) -> dict[str, dict[str, float | int | None]]:
    """Per field: `exact` (share that is the same but for white space), `rouge_l` (mean), `chrf` (of the set), `n`.

    Args:
        written, true: of each report its fields; a field absent from `true` is not compared, one absent from `written`
            is an empty text.

    Returns:
        Field -> numbers in [0, 1], None where the field occurs in no truth; `n`: reports compared.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(written) != len(true):
        raise ValueError(f"one truth per report: {len(written)} answers, {len(true)} truths")
    result: dict[str, dict[str, float | int | None]] = {}
    for name in fields:
        pairs = [(ours.get(name, ""), truth[name]) for ours, truth in zip(written, true, strict=True) if name in truth]
        n = len(pairs)
        result[name] = {
            "exact": sum(is_same(ours, truth) for ours, truth in pairs) / n if n else None,
            "rouge_l": sum(rouge_l(ours, truth) for ours, truth in pairs) / n if n else None,
            "chrf": chrf([ours for ours, _ in pairs], [truth for _, truth in pairs]),
            "n": n,
        }
    return result


def is_same(text: str, reference: str) -> bool:
    """Whether two texts are the same but for white space."""
    return "".join(text.split()) == "".join(reference.split())


def _macro_f1(confusion: Mapping[str, Mapping[str, int]], levels: Sequence[str]) -> float | None:
    scores = []
    for level in levels:
        hits = confusion[level][level]
        num_true, num_written = sum(confusion[level].values()), sum(row[level] for row in confusion.values())
        if num_true + num_written:
            scores.append(2 * hits / (num_true + num_written))
    return sum(scores) / len(scores) if scores else None


def _quadratic_kappa(graded: Sequence[tuple[int, int]], num_levels: int) -> float | None:
    """1 - observed / expected squared distance, expected as if both gradings were drawn from their own frequencies."""
    n = len(graded)
    if not n:
        return None
    observed = sum((truth - answer) ** 2 for truth, answer in graded) / n
    counts = [[sum(pair[side] == level for pair in graded) for level in range(num_levels)] for side in (0, 1)]
    expected = sum(
        (i - j) ** 2 * counts[0][i] * counts[1][j] for i in range(num_levels) for j in range(num_levels)
    ) / (n * n)  # fmt: skip
    return 1 - observed / expected if expected else None
