"""`forensics vision evaluate`: heads on the vision tower, with LoRA and calibration, on an annotated set of images.

The language model is not loaded. Same metrics and conventions as `forensics evaluate`; beside them curves, tables over
thresholds and the worst cases. The predictor sees images only, targets are read once its answer is there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.config import SourceConfig
from finetune.config.vision_runs import VisionEvalConfig, identifying_settings, load_vision_config
from finetune.data.edit_operations import operation_name
from finetune.data.masks import load_mask
from finetune.data.sources import read_sources, spread
from finetune.errors import ConfigError
from finetune.evaluation.evaluate import (
    data_facts,
    refuse_unusable,
    report_sample,
    run_facts,
    training_history,
    write_json,
)
from finetune.evaluation.results import EvaluationResults, Origin
from finetune.evaluation.vision_files import (
    Judged,
    draw_worst,
    empty_maps,
    empty_maps_text,
    score_map,
    worst_cases,
    write_curves,
    write_metrics,
    write_predictions,
)
from finetune.inference.evidence.models import heads_folder, open_vision_predictor
from finetune.inference.evidence.predicting import predict_records
from finetune.inference.output import PredictionWriter
from finetune.inference.pages.charts import precision_recall_chart
from finetune.inference.pages.report import ReportSample, format_table, render_report
from finetune.inference.pages.thresholds import thresholds_html
from finetune.inference.predictor import Predictor
from finetune.inference.run_folder import EVALUATION, LOCK_FILE, RUN_FILE, open_run
from finetune.metrics.thresholds import PixelTable, image_table
from finetune.progress import progress_bar
from finetune.schema import Prediction, Record

OWN = ("metrics.json", "metrics.csv", "predictions.csv", "predictions.jsonl", "report.html", "masks", "curves", "worst")
_OTHER_FILES = (".json", ".txt", ".tsv", ".xlsx", ".html", ".htm", ".png", ".jpg", ".jpeg", ".yaml", ".yml", ".pdf")
"""Endings of `inference_output` that mean a file, and not one that is written."""


class Outputs(NamedTuple):
    """Where things go: everything into `folder`, but for the two files that may be named."""

    folder: Path
    metrics_csv: Path
    predictions: str
    """Name of the JSON lines in `folder`; the same with .csv is the table."""


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics vision evaluate`; exit status 0."""
    config = load_vision_config(arguments.config, arguments.overrides, VisionEvalConfig)
    outputs = output_files(config)
    records = read_sources([SourceConfig(config.ann_eval, root=config.data_root)], "eval")
    if config.max_samples is not None:
        records = spread(records, config.max_samples)
    predictor, models = open_vision_predictor(config)
    refuse_unusable(records, predictor)
    data = data_facts(config.ann_eval, predictor)
    take_folder(config, outputs, models, overwrite=arguments.overwrite)
    start = time.monotonic()
    results, pixels, judged = run_model(predictor, records, config, outputs)
    metrics = gather_metrics(results, pixels, judged, config)
    thresholds = {"image": config.classification_threshold, "mask": config.heatmap_threshold}
    metrics["run"] = run_facts(predictor, thresholds, time.monotonic() - start) | data
    del metrics["run"]["layout"]  # of text, which these heads do not read
    metrics["models"] = models
    write_files(metrics, judged, results, config, outputs)
    print(format_table(metrics))
    if text := empty_maps_text(metrics["empty_maps"]):
        print(text)
    print(
        f"wrote {outputs.folder}/report.html, metrics.json, predictions, masks/, curves/, worst/, {outputs.metrics_csv}"
    )
    return 0


def output_files(config: VisionEvalConfig) -> Outputs:
    """`inference_output` as a folder, or as the file of predictions in one, and `metrics_csv`.

    Raises:
        ConfigError: a file of another kind, or two of the files in one place.
    """
    given = Path(config.inference_output)
    if given.suffix.lower() in (".csv", ".jsonl") and not given.is_dir():
        folder, stem = given.parent, given.stem
    elif given.suffix.lower() in _OTHER_FILES and not given.is_dir():
        raise ConfigError(f"inference_output is {given}; give a folder, or a file ending in .csv or .jsonl")
    else:
        folder, stem = given, "predictions"
    metrics_csv = Path(config.metrics_csv or folder / "metrics.csv")
    predictions = {f"{stem}.jsonl", f"{stem}.csv"}
    if "metrics.csv" in predictions:
        raise ConfigError(f"inference_output is {given}, where the table of metrics goes; give another name")
    reserved = {*OWN, *predictions, RUN_FILE, LOCK_FILE} - {"metrics.csv"}
    if metrics_csv.resolve().parent == folder.resolve() and metrics_csv.name in reserved:
        raise ConfigError(f"metrics_csv is {metrics_csv}, which the evaluation writes itself; give another name")
    return Outputs(folder, metrics_csv, f"{stem}.jsonl")


def take_folder(config: VisionEvalConfig, outputs: Outputs, models: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder this evaluation's own.

    Raises:
        ConfigError: it holds another run or anything else, or metrics_csv exists, and `overwrite` is not given.
    """
    if outputs.metrics_csv.is_dir():
        raise ConfigError(f"metrics_csv is {outputs.metrics_csv}, which is a folder; give a file")
    is_inside = outputs.metrics_csv.resolve().parent == outputs.folder.resolve()
    if outputs.metrics_csv.exists() and not is_inside and not overwrite:
        raise ConfigError(f"metrics_csv {outputs.metrics_csv} exists; add --overwrite, or give another file")
    own = (*OWN, outputs.predictions, str(Path(outputs.predictions).with_suffix(".csv")))
    identity = {"settings": identifying_settings(config), "model": models}
    is_unfinished = not (outputs.folder / "metrics.json").is_file()  # stopped by a bad record, say: begun anew
    if not is_inside:
        try:
            outputs.metrics_csv.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be is known now
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"metrics_csv is {outputs.metrics_csv}: {reason}; give another file") from error
    open_run(outputs.folder, EVALUATION, identity, own=own, overwrite=overwrite, can_continue=is_unfinished)


def run_model(
    predictor: Predictor, records: Sequence[Record], config: VisionEvalConfig, outputs: Outputs
) -> tuple[EvaluationResults, PixelTable, list[Judged]]:
    """Predict every image, write its map and line, and keep the numbers; memory is flat in the pixels."""
    results = EvaluationResults(config.heatmap_threshold, with_text=False, with_masks=predictor.has_mask_head)
    pixels = PixelTable()
    judged: list[Judged] = []
    progress = progress_bar(total=len(records), unit="record")
    with PredictionWriter(outputs.folder, outputs.predictions) as writer, progress:
        for record, _, predictions in predict_records(predictor, records, config.batch_size, config.num_workers):
            for index, prediction in enumerate(predictions):
                stem = writer.write(prediction, label_true=record.targets[index].label)
                judged.append(judge(record, index, prediction, f"masks/{stem}.png", results, pixels))
            progress.update()
    return results, pixels, judged


def judge(
    record: Record,
    index: int,
    prediction: Prediction,
    mask_path: str,
    results: EvaluationResults,
    pixels: PixelTable,
) -> Judged:
    """Hold one prediction against its target; what is kept of it has no pixels.

    Heads without a map (stage A) take no part in pixel metrics, instead of counting as ones that mark nothing.
    """
    target, scores = record.targets[index], prediction.mask_scores
    mask = None if scores is None else load_mask(target, prediction.size_hw, record.id, record.source)
    f1 = results.add(prediction, target.label, mask, Origin(record.group, operation_name(record, index)))
    if mask is not None and target.label is not None:
        pixels.add(scores, mask)
    return Judged(
        record=record,
        index=index,
        prediction=replace(prediction, mask_scores=None, polygons=()),
        label=target.label,
        mask_path=None if scores is None else mask_path,
        f1=f1,
        iou=None if f1 is None else results.pixels[-1]["iou"],
        peak=None if scores is None else float(np.max(scores)),
        area=None if scores is None else float((scores >= results.mask_threshold).mean()),
    )


def gather_metrics(
    results: EvaluationResults, pixels: PixelTable, judged: Sequence[Judged], config: VisionEvalConfig
) -> dict[str, Any]:
    """The sections of metrics.json; `image_uncalibrated` is there where the scores were calibrated."""
    metrics = results.metrics(config.classification_threshold)
    del metrics["text"]  # none was asked for
    return {
        **metrics,
        "empty_maps": empty_maps(judged, config.heatmap_threshold),
        "thresholds": {
            "image": image_table(results.scores, results.labels),
            "pixel": pixels.rows(),
        },
    }


def write_files(
    metrics: dict[str, Any],
    judged: Sequence[Judged],
    results: EvaluationResults,
    config: VisionEvalConfig,
    outputs: Outputs,
) -> None:
    """Everything but the maps and lines, which were written on the way; last metrics.json, by which it is finished."""
    folder, heads = outputs.folder, heads_folder(config.head_checkpoint)
    write_predictions((folder / outputs.predictions).with_suffix(".csv"), judged, config.heatmap_threshold)
    labels, scores = results.score_set()
    write_curves(folder / "curves", labels, scores, metrics["thresholds"])
    worst = worst_cases(judged, config.worst_cases)
    draw_worst(folder / "worst", folder, worst, config.heatmap_threshold)
    tables = metrics["thresholds"]
    curve = precision_recall_chart(labels, scores)
    used = (config.classification_threshold, config.heatmap_threshold)
    shown = thresholds_html(tables["image"], tables["pixel"], *used, beside=curve)
    page = render_report(
        title="Vision evidence evaluation · 视觉证据评测报告",
        metrics=metrics,
        samples=report_cards(judged, worst, config, folder),
        history=training_history(str(heads)),
        run={"data": Path(config.ann_eval).name, "model": heads.name},
        score_sets={"model": (labels, scores)},
        threshold=config.classification_threshold,
        mask_threshold=config.heatmap_threshold,
        more=[("thresholds", ("阈值", "Thresholds"), shown)],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    write_metrics(outputs.metrics_csv, metrics)
    write_json(folder / "metrics.json", metrics)


def report_cards(
    judged: Sequence[Judged], worst: Sequence[tuple[str, Judged]], config: VisionEvalConfig, folder: Path
) -> list[ReportSample]:
    """Cards of the worst cases, then of images evenly spread over the others."""
    first = [case for _, case in worst][: config.report_samples]
    chosen = {id(case) for case in first}
    rest = [case for case in judged if id(case) not in chosen]
    cases = [*first, *spread(rest, config.report_samples - len(first))] if rest else first
    cards = []
    for case in cases:
        mask = load_mask(case.record.targets[case.index], case.prediction.size_hw, case.record.id, case.record.source)
        prediction = replace(case.prediction, mask_scores=score_map(folder, case))
        cards.append(report_sample(case.record, case.index, prediction, mask, case.f1))
    return cards
