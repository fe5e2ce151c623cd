"""How alike do several models answer the same dialogues? Counts per model, agreement and distances per pair."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.inference.chat.terminal import table

Verdicts = Mapping[tuple[int, int], Mapping[str, Any]]
"""(dialogue, image) -> the verdict's JSON."""


def summarize(
    lines: Sequence[Mapping[str, Any]], names: Sequence[str], masks_root: Path, mask_threshold: float
) -> dict[str, Any]:
    """Numbers per model and per pair of models; None where nothing can be counted.

    Args:
        lines: objects of answers.jsonl.
        names: of the models, in order.
        masks_root: folder that the mask paths are relative to.

    Returns:
        `models`: name -> `has_heads`, `answers`, `parse_rate` (of answers about new images), `tampered` and `scored`
        (verdicts), `mean_score`, `accuracy` and `written_accuracy` (of scores and of text, where labels are known),
        `self_agreement` (text against score). `pairs`: list of `a`, `b`, `verdict_agreement`, `written_agreement`,
        `mean_score_difference`, `max_score_difference`, `mask_iou` (images where either marks something), `same_text`.
    """
    verdicts = {name: _verdicts(lines, name) for name in names}
    labels = {(d, i): label for d, line in enumerate(lines) for i, label in enumerate(line["labels"])}
    pairs = [
        {"a": a, "b": b, **_pair(lines, a, b, verdicts, masks_root, mask_threshold)}
        for a, b in itertools.combinations(names, 2)
    ]
    return {"models": {name: _model(lines, name, verdicts[name], labels) for name in names}, "pairs": pairs}


def summary_text(summary: Mapping[str, Any]) -> str:
    """The same as tables for the terminal."""
    rows = [("model", "answers", "parsed", "tampered", "mean score", "accuracy", "text = score")]
    for name, numbers in summary["models"].items():
        scored = f"{numbers['tampered']}/{numbers['scored']}" if numbers["has_heads"] else "no heads"
        rows.append(
            (
                name,
                str(numbers["answers"]),
                percent(numbers["parse_rate"]),
                scored,
                number(numbers["mean_score"]),
                percent(numbers["accuracy"]),
                percent(numbers["self_agreement"]),
            )
        )
    if not summary["pairs"]:
        return table(rows)
    pairs = [("pair", "same verdict", "same written", "|score| mean", "max", "mask IoU", "same text")]
    for pair in summary["pairs"]:
        pairs.append(
            (
                f"{pair['a']} / {pair['b']}",
                percent(pair["verdict_agreement"]),
                percent(pair["written_agreement"]),
                number(pair["mean_score_difference"]),
                number(pair["max_score_difference"]),
                number(pair["mask_iou"]),
                percent(pair["same_text"]),
            )
        )
    return f"{table(rows)}\n\n{table(pairs)}"


def percent(value: float | None) -> str:
    """`87 %`, or a dash."""
    return "–" if value is None else f"{100 * value:.0f} %"


def number(value: float | None) -> str:
    """Four digits after the point, or a dash."""
    return "–" if value is None else f"{value:.4f}"


def _verdicts(lines: Sequence[Mapping[str, Any]], name: str) -> dict[tuple[int, int], Mapping[str, Any]]:
    found = {}
    for d, line in enumerate(lines):
        for turn in line["turns"]:
            found.update({(d, verdict["image"]): verdict for verdict in turn["answers"][name]["verdicts"]})
    return found


def _model(
    lines: Sequence[Mapping[str, Any]], name: str, verdicts: Verdicts, labels: Mapping[tuple[int, int], int | None]
) -> dict[str, Any]:
    answers = [turn["answers"][name] for line in lines for turn in line["turns"]]
    scored = {key: verdict for key, verdict in verdicts.items() if verdict["score"] is not None}
    known = {key: label for key, label in labels.items() if label is not None}
    written = {key: verdict["text_label"] for key, verdict in verdicts.items() if verdict["text_label"] is not None}
    return {
        "has_heads": any(answer["has_heads"] for answer in answers),
        "answers": len(answers),
        "parse_rate": _mean([answer["parse_ok"] for answer in answers if answer["parse_ok"] is not None]),
        "scored": len(scored),
        "tampered": sum(verdict["label"] for verdict in scored.values()),
        "mean_score": _mean([verdict["score"] for verdict in scored.values()]),
        "accuracy": _mean([scored[key]["label"] == label for key, label in known.items() if key in scored]),
        "written_accuracy": _mean([written[key] == label for key, label in known.items() if key in written]),
        "self_agreement": _mean([label == scored[key]["label"] for key, label in written.items() if key in scored]),
    }


def _pair(
    lines: Sequence[Mapping[str, Any]],
    a: str,
    b: str,
    verdicts: Mapping[str, Verdicts],
    masks_root: Path,
    mask_threshold: float,
) -> dict[str, Any]:
    both = [(verdicts[a][key], verdicts[b][key]) for key in verdicts[a] if key in verdicts[b]]
    scored = [(x, y) for x, y in both if x["score"] is not None and y["score"] is not None]
    written = [(x, y) for x, y in both if x["text_label"] is not None and y["text_label"] is not None]
    distances = [abs(x["score"] - y["score"]) for x, y in scored]
    masked = [(x, y) for x, y in both if x["mask_path"] and y["mask_path"]]
    texts = [(turn["answers"][a]["text"], turn["answers"][b]["text"]) for line in lines for turn in line["turns"]]
    return {
        "verdict_agreement": _mean([x["label"] == y["label"] for x, y in scored]),
        "written_agreement": _mean([x["text_label"] == y["text_label"] for x, y in written]),
        "mean_score_difference": _mean(distances),
        "max_score_difference": max(distances, default=None),
        "mask_iou": _mean([iou for x, y in masked if (iou := _iou(x, y, masks_root, mask_threshold)) is not None]),
        "same_text": _mean([x == y for x, y in texts]),
    }


def _iou(x: Mapping[str, Any], y: Mapping[str, Any], root: Path, threshold: float) -> float | None:
    """Overlap of the marked pixels of two masks; None where both are empty."""
    first, second = (np.asarray(Image.open(root / each["mask_path"])) >= 255 * threshold for each in (x, y))
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else None


def _mean(values: Sequence[float | bool]) -> float | None:
    return float(np.mean(values)) if values else None
