"""`forensics regions evaluate`: a threshold from the validation file, then the test file's metrics, lines and page.

The order is the point: the test file is read when the threshold stands in threshold.json, and never swept. The model is
asked without labels, which are read when its answers are there.
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

from finetune.data.images import load_image
from finetune.data.sources import spread
from finetune.data.storage.atomic import write_atomically
from finetune.evaluation.evaluate import write_json
from finetune.evaluation.regions.results import (
    OUTCOMES,
    answer_row,
    choose_threshold,
    region_rows,
    split_metrics,
)
from finetune.evaluation.regions.sets import (
    RegionSet,
    check_there,
    read_region_set,
    refuse_overlap,
    refuse_split,
    region_labels,
    seen,
)
from finetune.evaluation.regions.threshold import THRESHOLD_FILE, Threshold, read_threshold
from finetune.evaluation.vision_files import write_csv
from finetune.inference.commands import load_writer
from finetune.inference.regions.cards import RegionCard
from finetune.inference.regions.page import SWEEP_COLUMNS, regions_page
from finetune.inference.regions.predictor import ReadRegions, RegionPredictor, explain_regions, score_regions
from finetune.inference.run_folder import REGIONS, folder_identity, open_run
from finetune.markup import format_number
from finetune.progress import progress_bar
from finetune.training.reproducibility import commit, file_hash, versions

OWN = (
    *("metrics.json", "predictions.jsonl", "val_predictions.jsonl", "answers.jsonl", "sweep.csv", "report.html"),
    THRESHOLD_FILE,
)
_SETTINGS = ("val", "threshold", "threshold_from", "test", "any_split", "max_regions", "max_samples", "max_new_tokens")


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics regions evaluate`; exit status 1 where a record could not be used, else 0.

    Raises:
        ForensicsError: model, threshold, a file as a whole, a file of the wrong split, files that share images, or an
            output folder of another run.
    """
    start = time.monotonic()
    val = None
    if arguments.val is not None:
        check_there(arguments.val, "--val")
        val = read_region_set(arguments.val, arguments.max_samples)
        fix = "a threshold is never chosen on test records; give the validation file"
        refuse_split(val.records, ("test",), "--val", fix)
        if any(record.provenance.get("split") == "train" for record in val.records):
            print(f"warning: {arguments.val} holds records of train; scores there are too good", file=sys.stderr)
    check_there(arguments.test, "--test")
    given = read_threshold(arguments.threshold_from) if arguments.threshold_from is not None else None
    predictor = load_writer(arguments, RegionPredictor, "answers")
    models = {"model": folder_identity(arguments.model), "adapter": folder_identity(arguments.adapter)}
    folder = Path(arguments.out)
    _take_folder(arguments, folder, models)
    sweep: list[dict[str, Any]] = []
    scored_val: list[ReadRegions] = []
    if val is not None:
        scored_val = _shown(score_regions(predictor, val.records, arguments.max_regions), val, "validation: verdicts")
        threshold, sweep = _choose(scored_val, val, models)
        write_csv(folder / "sweep.csv", ("threshold", *SWEEP_COLUMNS), [list(row.values()) for row in sweep])
    else:
        threshold = given or Threshold(arguments.threshold)
        if threshold.model is not None and threshold.model != models:
            print(f"warning: {arguments.threshold_from} was chosen with another model", file=sys.stderr)
    threshold.save(folder)

    test = _read_test(arguments, threshold)
    scored = _shown(score_regions(predictor, test.records, arguments.max_regions), test, "test: verdicts")
    read = _explained(predictor, scored, threshold, arguments, "test: answers")
    metrics: dict[str, Any] = {"threshold": threshold.summary, "val": None}
    if val is not None:
        read_val = _explained(predictor, scored_val, threshold, arguments, "validation: answers")
        metrics["val"] = split_metrics(read_val, len(val.rejected), threshold.value)
        _write_lines(folder / "val_predictions.jsonl", [row for each in read_val for row in region_rows(each)])
    metrics["test"] = split_metrics(read, len(test.rejected), threshold.value)
    metrics["run"] = _run_facts(predictor, arguments, time.monotonic() - start)
    _write_files(folder, metrics, sweep, read, test, arguments.report_samples)
    errors = [*(val.rejected if val else ()), *(each.error for each in scored_val if each.error is not None)]
    errors += [*test.rejected, *(each.error for each in read if each.error is not None)]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    _print(metrics)
    if metrics["test"]["answers"]["exact"] == 0:
        print(
            f"warning: no answer of {arguments.model} has the form of forensics regions build; a model that was not "
            "trained on it, or too briefly, gives probabilities that mean little",
            file=sys.stderr,
        )
    print(f"wrote {folder}/report.html, metrics.json, predictions.jsonl, answers.jsonl, {THRESHOLD_FILE}")
    return 1 if errors else 0


def _take_folder(arguments: argparse.Namespace, folder: Path, models: dict[str, Any]) -> None:
    """Make the folder this evaluation's own; one that stopped in the middle is begun anew."""
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    is_unfinished = not (folder / "metrics.json").is_file()
    identity = {"settings": settings, "models": models}
    open_run(folder, REGIONS, identity, own=OWN, overwrite=arguments.overwrite, can_continue=is_unfinished)


def _choose(
    scored: Sequence[ReadRegions], val: RegionSet, models: dict[str, Any]
) -> tuple[Threshold, list[dict[str, Any]]]:
    """The threshold with everything that must not be tested on, and the rows of the sweep."""
    value, rows = choose_threshold(scored, val.path)
    best = next(row["f1"] for row in rows if row["threshold"] == value)
    chosen_on = seen(val.records)
    found = Threshold(
        value=value,
        swept=True,
        chosen_on=val.path,
        f1=best,
        model=models,
        images=sorted(chosen_on.images),
        groups=sorted(chosen_on.groups),
    )
    return found, rows


def _read_test(arguments: argparse.Namespace, threshold: Threshold) -> RegionSet:
    """The test file, read for the first time."""
    test = read_region_set(arguments.test, arguments.max_samples)
    if not arguments.any_split:
        fix = "give the test file, or add --any-split"
        refuse_split(test.records, ("train", "val"), "--test", fix)
    refuse_overlap(test.records, threshold.seen, "--test")
    return test


def _explained(
    predictor: RegionPredictor,
    scored: Sequence[ReadRegions],
    threshold: Threshold,
    arguments: argparse.Namespace,
    what: str,
) -> list[ReadRegions]:
    answers = explain_regions(predictor, scored, threshold.value, arguments.max_regions)
    return list(progress_bar(answers, desc=what, total=len(scored), unit="image"))


def _shown(found: Iterable[ReadRegions], data: RegionSet, what: str) -> list[ReadRegions]:
    return list(progress_bar(found, desc=what, total=len(data.records), unit="image"))


def _run_facts(predictor: RegionPredictor, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What was evaluated on what, and the training's seed, commit and configuration hash."""
    trained = predictor.bundle.settings.get("trained", {})
    return {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "data": arguments.test,
        "validation": arguments.val,
        "data_hash": file_hash(arguments.test),
        "max_regions": arguments.max_regions,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": trained.get("seed"),
        "config_hash": trained.get("config_hash"),
        "trained_commit": trained.get("commit"),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "device": str(predictor.device),
        "seconds": round(seconds, 2),
        "versions": versions(),
    }


def _write_files(
    folder: Path,
    metrics: dict[str, Any],
    sweep: Sequence[dict[str, Any]],
    read: Sequence[ReadRegions],
    test: RegionSet,
    report_samples: int,
) -> None:
    """Everything about the test file; metrics.json last, which marks the run as finished."""
    rows = [row for each in read for row in region_rows(each)]
    _write_lines(folder / "predictions.jsonl", rows)
    rejected = [{"record": error.record, "source": error.source, "error": str(error)} for error in test.rejected]
    _write_lines(folder / "answers.jsonl", [*map(answer_row, read), *rejected])
    cards = [_card(each) for each in spread(read, report_samples)]
    known = [(row["label"], row["probability"]) for row in rows if row["probability"] is not None]
    scores = ([label for label, _ in known], [score for _, score in known])
    title = f"候选区域评测 Candidate regions: {Path(test.path).name}"
    page = regions_page(title, metrics, sweep, cards, scores)
    write_atomically(folder / "report.html", [page.encode()])
    write_json(folder / "metrics.json", metrics)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows])


def _card(read: ReadRegions) -> RegionCard:
    """The card of one record; its image is read once more."""
    record, has_error = read.record, read.error is not None
    labels = region_labels(record)
    return RegionCard(
        id=record.id,
        image=None if has_error else load_image(record.images[0], record.id, record.source),
        rows=list(region_rows(read)),
        outcomes={name: OUTCOMES[int(labels[name] is not None), called] for name, called in read.verdicts.items()},
        answers=[each.text for each in read.answers],
        error=str(read.error) if has_error else "",
    )


def _print(metrics: dict[str, Any]) -> None:
    """The numbers that are compared, one line for each file."""
    chosen = metrics["threshold"]
    source = f"chosen on {chosen['chosen_on']}" if chosen["swept"] else "as given"
    print(f"threshold {chosen['value']:.2f}, {source}")
    for name in ("val", "test"):
        part = metrics[name]
        if part is None:
            continue
        roi, image = ({key: format_number(value) for key, value in part[level].items()} for level in ("roi", "image"))
        print(
            f"{name}: {roi['n']} regions of {part['num_images']} images: F1 {roi['f1']} (all abnormal "
            f"{roi['all_positive_f1']}), precision {roi['precision']}, recall {roi['recall']}, AUROC {roi['auroc']}; "
            f"images: F1 {image['f1']}, AUROC {image['auroc']}; exact answers {format_number(part['answers']['exact'])}"
        )
