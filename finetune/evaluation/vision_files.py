"""Files of `forensics vision evaluate`: metrics and predictions as CSV, curves, threshold tables, the worst cases.

All CSV files are UTF-8 with a byte-order mark, for Excel; an undefined value is an empty cell.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.inference.evidence.folder import file_stem
from finetune.inference.evidence.wording import score_text
from finetune.inference.visualization import comparison_panel
from finetune.metrics.thresholds import precision_recall_curve, roc_curve
from finetune.schema import Prediction, Record

KINDS = {"missed": "missed", "false_alarm": "false alarm", "misplaced": "badly placed"}
"""Kinds of a worst case: tampered and called real, real and called tampered, found but marked elsewhere."""


@dataclass(frozen=True)
class Judged:
    """One prediction beside what is known about its image.

    Args:
        record, index: which image of which record.
        mask_path: file of its 8-bit score map below the output folder, None without a map.
        f1, iou: at the pixel threshold, of tampered images with a mask; peak: largest pixel score; area: marked share.
    """

    record: Record
    index: int
    prediction: Prediction
    label: int | None
    mask_path: str | None
    f1: float | None
    iou: float | None
    peak: float | None
    area: float | None


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(["" if value is None else value for value in row] for row in rows)


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """`section,metric,value,low,high` for every number of metrics.json's sections; low and high are 95 % bounds."""
    intervals = metrics["intervals"]
    rows = []
    for section in ("image", "image_uncalibrated", "localization", "authentic", "empty_maps"):
        for name, value in metrics.get(section, {}).items():
            if name == "absent":
                continue  # the reason why its numbers are missing
            low, high = intervals.get(f"{section}.{name}", (None, None))
            rows.append((section, name, value, low, high))
    for name, found in metrics["operations"].items():
        rows += [(f"operation {name}", key, value, None, None) for key, value in found.items()]
    for kind, value in metrics["run"]["thresholds"].items():
        rows.append(("threshold", kind, value, None, None))
    write_csv(path, ("section", "metric", "value", "low", "high"), rows)


def write_predictions(path: Path, judged: Sequence[Judged], mask_threshold: float) -> None:
    """One row per image; `note` says which threshold emptied the heat map of an image called tampered."""
    columns = ("id", "image_path", "label_true", "label_pred", "correct", "score", "raw_score", "f1", "iou")
    rows = []
    for case in judged:
        prediction = case.prediction
        correct = None if case.label is None else int(case.label == prediction.label)
        raw = prediction.own_score
        figures = (round(prediction.score, 6), round(raw, 6), _rounded(case.f1), _rounded(case.iou))
        rest = (_rounded(case.area), _rounded(case.peak), case.mask_path, _note(case, mask_threshold))
        rows.append((prediction.id, prediction.image_path, case.label, prediction.label, correct, *figures, *rest))
    write_csv(path, (*columns, "marked_area", "peak", "heatmap", "note"), rows)


def empty_maps(judged: Sequence[Judged], mask_threshold: float) -> dict[str, Any]:
    """How many tampered images have a map without a marked pixel, the threshold that did it, and what they reach."""
    tampered = [case for case in judged if case.label == 1 and case.peak is not None]
    empty = [case for case in tampered if not case.area]
    peaks = [float(case.peak or 0.0) for case in empty]
    return {
        "n": len(empty),
        "of_tampered": len(tampered),
        "heatmap_threshold": mask_threshold,
        "highest_peak": max(peaks, default=None),
        "lowest_peak": min(peaks, default=None),
    }


def empty_maps_text(found: Mapping[str, Any]) -> str:
    """`empty_maps` as a sentence; "" where there is none."""
    if not found["n"]:
        return ""
    return (
        f"{found['n']} of {found['of_tampered']} tampered images have an empty heat map: no pixel reaches "
        f"heatmap_threshold={found['heatmap_threshold']:g} (their highest scores are {found['lowest_peak']:.3f} to "
        f"{found['highest_peak']:.3f}; curves/thresholds_pixel.csv says what other thresholds give)"
    )


def write_curves(folder: Path, labels: Sequence[int], scores: Sequence[float], tables: Mapping[str, Any]) -> None:
    """`roc.csv`, `pr.csv` and the two threshold tables."""
    write_csv(folder / "roc.csv", ("threshold", "false_alarm_rate", "detection_rate"), roc_curve(scores, labels))
    write_csv(folder / "pr.csv", ("threshold", "recall", "precision"), precision_recall_curve(scores, labels))
    for kind, rows in tables.items():
        write_csv(folder / f"thresholds_{kind}.csv", tuple(rows[0]), [tuple(row.values()) for row in rows])


def worst_cases(judged: Sequence[Judged], count: int) -> list[tuple[str, Judged]]:
    """Up to `count` (kind, case), the kinds in turn, each from its worst on.

    Missed: lowest score first. False alarm: highest first. Misplaced: called tampered, but with the lowest pixel F1.
    """
    labelled = [case for case in judged if case.label is not None]
    missed = sorted((c for c in labelled if c.label == 1 and c.prediction.label == 0), key=lambda c: c.prediction.score)
    alarms = sorted(
        (c for c in labelled if c.label == 0 and c.prediction.label == 1), key=lambda c: -c.prediction.score
    )
    placed = [c for c in labelled if c.label == 1 and c.prediction.label == 1 and c.f1 is not None and c.f1 < 0.5]
    placed.sort(key=lambda c: float(c.f1 or 0.0))
    columns = ([(kind, case) for case in cases] for kind, cases in zip(KINDS, (missed, alarms, placed), strict=True))
    return [found for found in chain.from_iterable(zip_longest(*columns)) if found is not None][:count]


def draw_worst(folder: Path, out_dir: Path, cases: Sequence[tuple[str, Judged]], mask_threshold: float) -> None:
    """A panel (image, true mask, heat map, overlay) per case, named by rank, kind and id."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, (kind, case) in enumerate(cases, start=1):
        image = load_image(case.record.images[case.index], case.record.id, case.record.source)
        size = (image.height, image.width)
        scores = score_map(out_dir, case)
        title = f"{case.prediction.id}: {KINDS[kind]}, score {case.prediction.score:.3f}"
        title += "" if case.f1 is None else f", pixel F1 {case.f1:.3f}"
        panel = comparison_panel(
            image,
            load_mask(case.record.targets[case.index], size, case.record.id, case.record.source),
            np.zeros(size, np.float32) if scores is None else scores,
            title,
            threshold=mask_threshold,
        )
        panel.save(folder / f"{rank:02d}-{kind}-{file_stem(Path(case.prediction.id).name)}.png")


def score_map(out_dir: Path, case: Judged) -> np.ndarray | None:
    """The (H, W) float32 map of a case, read back from its file (256 levels)."""
    if case.mask_path is None:
        return None
    return np.asarray(Image.open(out_dir / case.mask_path), dtype=np.float32) / 255


def _note(case: Judged, mask_threshold: float) -> str | None:
    is_right = case.label != 1 and case.prediction.label == 0
    if case.peak is None or case.area or is_right:
        return None
    peak = score_text(case.peak, mask_threshold, 3)
    return f"empty heat map: its peak {peak} is below heatmap_threshold={mask_threshold:g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
