"""`forensics evaluate`: a model on a labelled data set, beside two classical baselines; numbers, predictions, a report.

Order matters for honesty: the predictor gets queries without targets; targets are read when its answer is there.
Localisation is averaged over tampered images, false alarms over authentic ones, image metrics over all labelled ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.config import SourceConfig
from finetune.data.chat import question_turns
from finetune.data.dataset import read_sources, spread
from finetune.data.edit_operations import operation_name
from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.data.readers.options import options_from
from finetune.data.validation import validate_for_evaluation
from finetune.errors import DataFormatError
from finetune.evaluation.comparison import compare_baselines, fitted_thresholds
from finetune.evaluation.results import EvaluationResults, Origin
from finetune.inference.commands import load_predictor
from finetune.inference.output import PredictionWriter
from finetune.inference.pages.report import ReportSample, format_table, render_report
from finetune.inference.predictor import Predictor
from finetune.inference.queries import queries_of
from finetune.metrics.calibration import Calibration
from finetune.progress import progress_bar
from finetune.schema import Prediction, Record
from finetune.training.reproducibility import commit, file_hash, seen_before, versions

RESULTS = ("metrics.json", "report.html")


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics evaluate`; exit status 0."""
    options = options_from(arguments.option)
    source = SourceConfig(arguments.data, arguments.format, arguments.data_root, options=options)
    records = read_sources([source], "eval")
    if arguments.max_samples is not None:
        records = spread(records, arguments.max_samples)
    if arguments.no_baselines and arguments.baseline_data:
        print("warning: --baseline-data is not read, since --no-baselines leaves the baselines out", file=sys.stderr)
    predictor = load_predictor(arguments)
    with_text = predictor.writes_text and not arguments.no_text
    refuse_unusable(records, predictor)
    data = data_facts(arguments.data, predictor)
    thresholds = None if arguments.no_baselines else fitted_thresholds(arguments.baseline_data)
    start = time.monotonic()
    results, samples = run_model(predictor, records, arguments, with_text)
    metrics = results.metrics(arguments.threshold)
    score_sets = {"model": results.score_set()}
    if not arguments.no_baselines:
        print("baselines: error-level analysis and local noise variance on the same images", flush=True)
        metrics["baselines"], baseline_scores, intervals = compare_baselines(records, thresholds)
        metrics["intervals"] |= intervals
        score_sets |= baseline_scores
    used = {"image": arguments.threshold, "mask": arguments.mask_threshold}
    metrics["run"] = run_facts(predictor, used, time.monotonic() - start) | data
    out_dir = Path(arguments.out)
    write_json(out_dir / "metrics.json", metrics)
    page = render_report(
        title="Forensics evaluation · 取证评测报告",
        metrics=metrics,
        samples=samples,
        history=training_history(arguments.model),
        run={"data": Path(arguments.data).name, "model": Path(arguments.model).name},
        score_sets=score_sets,
        threshold=arguments.threshold,
        mask_threshold=arguments.mask_threshold,
    )
    (out_dir / "report.html").write_text(page, encoding="utf-8")
    print(format_table(metrics))
    print(f"wrote {out_dir}/metrics.json, predictions.jsonl, masks/ and report.html")
    return 0


def run_model(
    predictor: Predictor, records: Sequence[Record], arguments: argparse.Namespace, with_text: bool
) -> tuple[EvaluationResults, list[ReportSample]]:
    """Predict every record, write each prediction, and keep what metrics and report need."""
    results = EvaluationResults(arguments.mask_threshold, with_text=with_text, with_masks=predictor.has_mask_head)
    samples: list[ReportSample] = []
    shown = {record.id for record in spread(records, arguments.report_samples)}
    answers = predictor.predict(
        queries_of(records, lambda record: question_turns(record, predictor.template)), with_text=with_text
    )
    inputs = [image.path for record in records for image in record.images if image.path]
    inputs += [target.mask_path for record in records for target in record.targets if target.mask_path]
    with PredictionWriter(arguments.out, inputs=inputs) as writer:
        for name in RESULTS:  # of an earlier evaluation, which is being replaced
            (writer.out_dir / name).unlink(missing_ok=True)
        for record, predictions in zip(records, progress_bar(answers, total=len(records), unit="record"), strict=True):
            for index, prediction in enumerate(predictions):
                target = record.targets[index]
                mask = load_mask(target, prediction.size_hw, record.id, record.source)
                f1 = results.add(prediction, target.label, mask, Origin(record.group, operation_name(record, index)))
                writer.write(prediction, label_true=target.label, f1=None if f1 is None else round(f1, 6))
                if record.id in shown:
                    samples.append(report_sample(record, index, prediction, mask, f1))
    return results, samples


def report_sample(record: Record, index: int, prediction: Prediction, mask: Any, f1: float | None) -> ReportSample:
    """The card of one image of a record; the image is read once more."""
    return ReportSample(
        id=prediction.id,
        image=load_image(record.images[index], record.id, record.source),
        true_mask=mask,
        mask_scores=prediction.mask_scores,
        label_true=record.targets[index].label,
        label_pred=prediction.label if prediction.is_judged else None,
        score=prediction.score if prediction.is_judged else None,
        f1=f1,
        text=prediction.text,
        parse_ok=prediction.parse_ok if prediction.text else None,
        operation=operation_name(record, index) if record.targets[index].label == 1 else "",
        told_operation=prediction.operation,
    )


def refuse_unusable(records: Sequence[Record], predictor: Predictor) -> None:
    """What headers and the ends of files tell of images and masks that cannot be used, at once, before the first
    prediction. Damage inside a file, or a mask that contradicts its label, ends the evaluation at its record.

    Raises:
        DataFormatError: no label at all, or a list of what cannot be used.
    """
    labels = {target.label for record in records for target in record.targets} - {None}
    if not labels:
        raise DataFormatError(
            "no image has a label, so there is nothing to evaluate",
            expected="labels 0 (real) or 1 (tampered)",
            fix="use forensics predict for unlabelled images",
        )
    validate_for_evaluation(records, has_text=not predictor.bundle.base.reads_tower, progress=_checked)
    if len(labels) == 1:
        only = "tampered" if 1 in labels else "authentic"
        print(
            f"warning: every labelled image is {only}, so what needs both classes (AUROC ...) stays empty",
            file=sys.stderr,
        )


def data_facts(data: str, predictor: Predictor) -> dict[str, Any]:
    """Which file is evaluated, for metrics.json; warns where the model, or one it was trained from, was trained or
    chosen on that very file. A folder has no hash, so of it nothing is known."""
    own = file_hash(data)
    is_known = None if own is None else own in seen_before(predictor.bundle.settings)
    if is_known:
        print(
            f"warning: the model was trained or chosen on {data} itself, so its figures say nothing about new pictures",
            file=sys.stderr,
        )
    return {"data_hash": own, "seen_in_training": is_known}


def _checked(records: Sequence[Record]) -> Iterable[Record]:
    """A bar while the headers of images and masks are read."""
    return progress_bar(records, total=len(records), desc="checking", unit="record", leave=False)


def run_facts(predictor: Predictor, thresholds: dict[str, float], seconds: float) -> dict[str, Any]:
    """How it was evaluated: versions, seconds, and the training's seed, commit and configuration hash."""
    trained = predictor.bundle.settings.get("trained", {})
    used = predictor.calibration
    calibration = {"method": used.method, "num_images": used.num_images} if isinstance(used, Calibration) else None
    return {
        "versions": versions(),
        "seconds": round(seconds, 1),
        "seed": trained.get("seed"),
        "commit": commit(),
        "config_hash": trained.get("config_hash"),
        "trained_commit": trained.get("commit"),
        "device": str(predictor.device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "layout": predictor.layout,
        "tta": predictor.generation.tta,
        "calibration": calibration,
        "thresholds": thresholds,
    }


def training_history(model_path: str) -> list[dict[str, Any]]:
    """Logged numbers of the training that wrote this model, if they lie beside it."""
    file = Path(model_path).parent / "history.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def write_json(path: Path, value: Any) -> None:
    """Write a file of indented JSON and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
