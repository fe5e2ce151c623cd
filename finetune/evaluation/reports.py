"""`forensics reports infer`: reports for images, lists and stored sets; on request beside the true ones, in numbers.

The model is asked without the truth, which is read when its answer is there. An image that could not be used, and a
field that was not written, count as wrong; nothing is left out of a mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.images import load_image
from finetune.data.reports.settings import ReportSettings, load_reports_config
from finetune.data.reports.table import canonical_level
from finetune.data.reports.template import load_report_template
from finetune.data.sources import spread
from finetune.data.storage.atomic import write_atomically
from finetune.errors import ConfigError
from finetune.inference.commands import load_writer
from finetune.inference.predictor import Predictor
from finetune.inference.reports.page import ReportCard, reports_page
from finetune.inference.reports.writing import WrittenReport, report_queries, write_reports
from finetune.metrics.reports import field_metrics, level_metrics
from finetune.progress import progress_bar
from finetune.training.reproducibility import commit, versions


def infer_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics reports infer`; exit status 1 where an input could not be used, else 0.

    Raises:
        ForensicsError: settings, template, model or an input as a whole; `--compare-gt` without any true report.
    """
    settings = load_reports_config(arguments.config, arguments.overrides).table
    template = load_report_template(settings.template, list(settings.fields))
    predictor = load_writer(arguments, Predictor, "reports")
    queries = report_queries(arguments.inputs, arguments.images, settings, template, predictor.template)
    if arguments.max_samples is not None:
        queries = spread(queries, arguments.max_samples)
    num_true = sum(asked.truth is not None for asked in queries)
    if arguments.compare_gt and not num_true:
        raise ConfigError(
            f"--compare-gt found no true report in {arguments.inputs[0]}; give a table or a stored set of reports, or "
            "leave it out"
        )
    start = time.monotonic()
    answers = write_reports(predictor, template, queries)
    written = list(progress_bar(answers, total=len(queries), unit="image"))
    metrics = compare(written, settings, template.fields) if arguments.compare_gt else None
    run = {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "data": ", ".join(arguments.inputs),
        "template": settings.template,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "device": str(predictor.device),
        "seconds": round(time.monotonic() - start, 2),
        "versions": versions(),
    }
    _write_files(arguments, settings, template.fields, written, metrics, run)
    _print(written, metrics)
    print(f"wrote {arguments.out}/results.json and {arguments.out}/report.html")
    return 1 if any(each.error is not None for each in written) else 0


def _write_files(
    arguments: argparse.Namespace,
    settings: ReportSettings,
    names: Sequence[str],
    written: Sequence[WrittenReport],
    metrics: dict[str, Any] | None,
    run: dict[str, Any],
) -> None:
    """results.json and report.html in --out, each whole or not at all."""
    out_dir = Path(arguments.out)
    out_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "run": run,
        "num_reports": len(written),
        "num_failed": sum(each.error is not None for each in written),
        "metrics": metrics,
        "reports": [as_result(each, settings, arguments.compare_gt) for each in written],
    }
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(out_dir / "results.json", [text.encode()])
    cards = [_card(each, arguments.compare_gt) for each in spread(written, arguments.report_samples)]
    facts = {key: value for key, value in run.items() if value is not None and key != "template"}
    page = reports_page(f"检查报告 Inspection reports: {run['data']}", cards, names, metrics, facts, len(written))
    write_atomically(out_dir / "report.html", [page.encode()])


def compare(written: Sequence[WrittenReport], settings: ReportSettings, names: Sequence[str]) -> dict[str, Any]:
    """Written reports against the true ones.

    Args:
        names: the fields in the template's order.

    Returns:
        `level`: `metrics.reports.level_metrics`, None where no field is graded. `fields`: `field_metrics`. `form`:
        share of all reports that are the template's to the character (`exact_form`), that have every field
        (`complete`), their number `n`. Reports without a truth count for the form only.
    """
    known = [each for each in written if each.asked.truth is not None]
    truths = [each.asked.truth or {} for each in known]
    level = None
    if settings.level_field is not None:
        graded = [
            (written_level(each, settings), truth[settings.level_field])
            for each, truth in zip(known, truths, strict=True)
            if settings.level_field in truth
        ]
        level = level_metrics([ours for ours, _ in graded], [truth for _, truth in graded], settings.levels)
    texts = []
    for each in known:
        fields = dict(each.parsed.fields)
        if (own := written_level(each, settings)) is not None:
            fields[settings.level_field or ""] = own
        texts.append(fields)
    n = len(written)
    form = {
        "exact_form": sum(each.parsed.is_exact for each in written) / n if n else None,
        "complete": sum(not each.parsed.missing for each in written) / n if n else None,
        "n": n,
    }
    return {"level": level, "fields": field_metrics(texts, truths, names), "form": form}


def written_level(written: WrittenReport, settings: ReportSettings) -> str | None:
    """The level of a written report as `levels` spells it; None where it has none, or another word."""
    text = written.parsed.fields.get(settings.level_field or "")
    level = None if text is None else canonical_level(text, settings)
    return level if level in settings.levels else None


def as_result(written: WrittenReport, settings: ReportSettings, with_truth: bool) -> dict[str, Any]:
    """One report as it stands in results.json."""
    asked = written.asked
    images = asked.query.images
    result: dict[str, Any] = {
        "id": asked.query.id,
        "image_path": (images[0].path or "") if images else "",
        "source": asked.source,
        "text": written.text,
        "fields": written.parsed.fields,
        "missing": list(written.parsed.missing),
        "is_exact": written.parsed.is_exact,
        "level": written_level(written, settings),
        "error": None if written.error is None else str(written.error),
    }
    return result | {"truth": asked.truth} if with_truth else result


def _card(written: WrittenReport, with_truth: bool) -> ReportCard:
    """The card of one report; its image is read once more."""
    asked = written.asked
    image = None
    if written.error is None:
        image = load_image(asked.query.images[0], asked.query.id, asked.source or None)
    return ReportCard(
        id=asked.query.id,
        image=image,
        text=written.text,
        fields=written.parsed.fields,
        missing=written.parsed.missing,
        truth=asked.truth if with_truth else None,
        error="" if written.error is None else str(written.error),
    )


def _print(written: Sequence[WrittenReport], metrics: dict[str, Any] | None) -> None:
    """Errors, then the reports of a few images or the numbers of a comparison."""
    for each in written:
        if each.error is not None:
            print(f"error: {each.error}", file=sys.stderr)
    if metrics is None:
        for each in written[:5]:
            if each.error is None:
                print(f"{each.asked.query.id}\n" + "\n".join(f"    {line}" for line in each.text.splitlines()))
        return
    level = metrics["level"]
    if level is not None and level["n"]:
        kappa = "–" if level["quadratic_kappa"] is None else f"{level['quadratic_kappa']:.3f}"
        print(
            f"risk level of {level['n']} reports: accuracy {level['accuracy']:.3f} (a constant answer "
            f"{level['majority']:.3f}), macro F1 {level['macro_f1']:.3f}, quadratic kappa {kappa}"
        )
    for name, found in metrics["fields"].items():
        if found["n"]:
            print(
                f"{name}: exact {found['exact']:.3f}, ROUGE-L {found['rouge_l']:.3f}, chrF {found['chrf']:.3f} "
                f"({found['n']} reports)"
            )
