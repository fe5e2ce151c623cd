"""Numbers and lines of an evaluated file of candidate regions: metrics with intervals, calibration, form of answers.

Pure functions over what the model said (`ReadRegions`) and the records' labels. In a record that could not be used
nothing is called abnormal: its regions score 0, so its abnormal ones count as missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from finetune.data.regions.wording import ABNORMAL, NORMAL
from finetune.errors import ConfigError
from finetune.evaluation.regions.sets import region_boxes, region_labels
from finetune.inference.regions.pictures import Outcome
from finetune.inference.regions.predictor import ReadRegions
from finetune.metrics.bootstrap import Interval, bootstrap_auroc, bootstrap_interval
from finetune.metrics.calibration import ece
from finetune.metrics.regions import ScoredImage, all_regions, region_metrics, sweep

OUTCOMES: dict[tuple[int, bool], Outcome] = {(1, True): "tp", (0, True): "fp", (1, False): "fn", (0, False): "tn"}
"""(label, called abnormal) -> what a region is: true or false positive, missed, correctly quiet."""


def scored_image(read: ReadRegions) -> ScoredImage:
    """What the metrics read of one record; types that the model wrote of regions it calls abnormal."""
    labels = region_labels(read.record)
    true_types = {name: kind for name, kind in labels.items() if kind is not None}
    scores = {name: read.scores.get(name, 0.0) for name in labels}
    pred_types = {name: each.type for name, each in read.findings.items() if read.verdicts.get(name)}
    return ScoredImage(scores, list(true_types), true_types, pred_types)


def choose_threshold(scored: Sequence[ReadRegions], path: str) -> tuple[float, list[dict[str, Any]]]:
    """The threshold of 0.40 to 0.80 with the best region F1, the lowest of equals, and what each would give.

    Args:
        path: of the validation file, for the error.

    Returns:
        The threshold, and rows of `threshold`, `f1`, `precision`, `recall` of regions and `image_f1`.

    Raises:
        ConfigError: no abnormal region to choose by.
    """
    images = [scored_image(each) for each in scored]
    try:
        threshold, f1 = sweep(images)
    except ValueError as error:
        raise ConfigError(f"--val {path}: {error}; give another file, or --threshold") from error
    rows = []
    for step in f1:
        found = region_metrics(images, step)
        roi = found["roi"]
        rows.append(
            {
                "threshold": step,
                "f1": roi["f1"],
                "precision": roi["precision"],
                "recall": roi["recall"],
                "image_f1": found["image"]["f1"],
            }
        )
    return threshold, rows


def split_metrics(read: Sequence[ReadRegions], num_rejected: int, threshold: float) -> dict[str, Any]:
    """One file's section of metrics.json.

    Args:
        read: verdicts at `threshold` and the answers behind them.
        num_rejected: lines of the file that are no usable records, which no metric knows.

    Returns:
        `num_images`, `num_failed` (of them without a verdict), `num_rejected`; what `region_metrics` gives;
        `calibration`, `answers`; `intervals` as name -> [low, high], `intervals_over_groups` where groups have several
        images.
    """
    images = [scored_image(each) for each in read]
    groups = [each.record.group or f"#{number}" for number, each in enumerate(read)]
    has_groups = len(set(groups)) < len(groups) and len(set(groups)) > 1
    return {
        "num_images": len(read),
        "num_failed": sum(each.error is not None for each in read),
        "num_rejected": num_rejected,
        **region_metrics(images, threshold),
        "calibration": _calibration(read),
        "answers": _answers(read),
        "intervals": _intervals(images, threshold, list(range(len(images)))),
        "intervals_over_groups": _intervals(images, threshold, groups) if has_groups else {},
    }


def region_rows(read: ReadRegions) -> Iterator[dict[str, Any]]:
    """A line of predictions.jsonl for each candidate of a record.

    `probability` is that of the verdict's words, `confidence` the number that the model wrote; `type`, `confidence` and
    `reason` are null where it wrote nothing about the region. Without a verdict (`error`) both are null.
    """
    image = read.record.images[0]
    boxes = region_boxes(read.record)
    for name, kind in region_labels(read.record).items():
        finding = read.findings.get(name)
        verdict = read.verdicts.get(name)
        yield {
            "record": read.record.id,
            "image_path": image.path or "",
            "id": name,
            "box_xyxy": list(boxes[name]),
            "label": int(kind is not None),
            "true_type": kind,
            "verdict": None if verdict is None else ABNORMAL if verdict else NORMAL,
            "probability": read.scores.get(name),
            "confidence": None if finding is None else finding.confidence,
            "type": None if finding is None else finding.type,
            "reason": None if finding is None else finding.reason,
            "error": None if read.error is None else str(read.error),
        }


def answer_row(read: ReadRegions) -> dict[str, Any]:
    """The line of answers.jsonl for a record: every answer about it as it was written."""
    return {
        "record": read.record.id,
        "source": read.record.source,
        "answers": [each.text for each in read.answers],
        "is_exact": [each.parsed.is_exact for each in read.answers],
        "is_finished": [each.is_finished for each in read.answers],
        "error": None if read.error is None else str(read.error),
    }


def _calibration(read: Sequence[ReadRegions]) -> dict[str, Any]:
    """Expected calibration error of both confidences.

    `token`: the words' probability, over all regions with a verdict. `written`: the number the model wrote, over the
    regions it wrote one about, with that of the same regions' probability as `token_ece`, since the two are comparable
    on the same regions only.
    """
    probability: list[float] = []
    labels: list[int] = []
    both: list[tuple[float, float, int]] = []
    for each in read:
        for name, kind in region_labels(each.record).items():
            if name not in each.scores:
                continue
            label = int(kind is not None)
            probability.append(each.scores[name])
            labels.append(label)
            finding = each.findings.get(name)
            if finding is not None and finding.confidence is not None:
                both.append((finding.confidence, each.scores[name], label))
    written, token, truth = zip(*both, strict=True) if both else ((), (), ())
    return {
        "token": {"ece": ece(probability, labels), "n": len(labels)},
        "written": {"ece": ece(written, truth), "token_ece": ece(token, truth), "n": len(truth)},
    }


def _answers(read: Sequence[ReadRegions]) -> dict[str, Any]:
    """Form of the answers: share of exact ones, of JSON at all, and of those the model ended itself."""
    answers = [answer for each in read for answer in each.answers]
    n = len(answers)

    def share(count: int) -> float | None:
        return count / n if n else None

    return {
        "exact": share(sum(each.parsed.is_exact for each in answers)),
        "parsed": share(sum(bool(each.parsed.verdicts) for each in answers)),
        "finished": share(sum(each.is_finished for each in answers)),
        "n": n,
    }


def _intervals(images: Sequence[ScoredImage], threshold: float, units: Sequence[object]) -> dict[str, Any]:
    """95 % bootstrap intervals; what is drawn are whole units, a name per image.

    A region is never drawn without the others of its image: they are not independent.
    """
    counts, best, labels = [], [], []
    for image in images:
        positive = set(image.positive_region_ids)
        called = {name for name, score in image.scores.items() if score >= threshold}
        counts.append((len(called & positive), len(called), len(positive)))
        best.append(max(image.scores.values()))
        labels.append(int(bool(positive)))
    scores, truth = all_regions(images)
    of_region = [unit for image, unit in zip(images, units, strict=True) for _ in image.scores]
    hits = np.array(best) >= threshold  # (N,)
    image_counts = np.stack([hits & (np.array(labels) == 1), hits, np.array(labels)], axis=1).astype(np.int64)  # (N, 3)
    found = {
        "roi.f1": bootstrap_interval(_f1, np.array(counts), groups=units),
        "roi.precision": bootstrap_interval(_ratio(1), np.array(counts), groups=units),
        "roi.recall": bootstrap_interval(_ratio(2), np.array(counts), groups=units),
        "image.f1": bootstrap_interval(_f1, image_counts, groups=units),
        "roi.auroc": bootstrap_auroc(scores, truth, groups=of_region),
        "image.auroc": bootstrap_auroc(best, labels, groups=units),
    }
    return {name: _ends(interval) for name, interval in found.items()}


def _f1(counts: np.ndarray) -> float | None:
    """F1 of rows of (hits, called, positive)."""
    hits, called, positive = counts.sum(axis=0)
    return float(2 * hits / (called + positive)) if positive else None


def _ratio(column: int) -> Any:
    """Hits over another column's count, where there is any."""

    def ratio(counts: np.ndarray) -> float | None:
        total = counts.sum(axis=0)
        return float(total[0] / total[column]) if total[column] else None

    return ratio


def _ends(interval: Interval) -> list[float | None]:
    return [interval.low, interval.high]
