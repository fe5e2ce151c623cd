"""Verbs of region candidates: samples, scan, prepare, build, evaluate below `regions`. Layers are imported when they
run."""

from __future__ import annotations

import argparse

from finetune.verbs.argument_types import VerbParser, override_arguments, positive, probability
from finetune.verbs.inference import loading_arguments


def regions_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=VerbParser)
    for name, summary, add_arguments in (
        ("samples", "draw surfaces with cracks, seepage and spalls and their label files", samples_arguments),
        ("scan", "count what the label files hold, and print a label_map to paste", scan_arguments),
        ("prepare", "divide images by folder and choose candidate regions", prepare_arguments),
        ("build", "write conversations about the candidates, ready to train on", build_arguments),
        (
            "evaluate",
            "choose a threshold on the validation file, then metrics and a page of the test file",
            evaluate_arguments,
        ),
    ):
        add_arguments(verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))


def samples_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for abnormal/ and normal/")
    parser.add_argument("--scenes", type=positive, default=12, metavar="N", help="folders, each one surface (12)")
    parser.add_argument("--per-scene", type=positive, default=2, metavar="N", help="images of either kind in each (2)")
    parser.add_argument("--side", type=positive, default=168, metavar="PIXELS", help="of the square images (168)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (0)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds some already")
    parser.set_defaults(handler=_samples)


def _samples(arguments: argparse.Namespace) -> int:
    from finetune.data.synthesis.surface_defects import write_surface_samples

    counts = write_surface_samples(
        arguments.out,
        arguments.scenes,
        arguments.per_scene,
        arguments.side,
        arguments.seed,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {arguments.out}: {counts[0]} images with {counts[1]} labelled boxes, {counts[2]} without")
    return 0


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="YAML", help="e.g. configs/data/regions.yaml")
    override_arguments(parser, "changes to --config or the defaults, e.g. out_dir=data/processed/set seed=1")


def scan_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.set_defaults(handler=_scan)


def _scan(arguments: argparse.Namespace) -> int:
    from finetune.data.regions.command import scan_command

    return scan_command(arguments)


def prepare_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at images that cannot be used; skip: leave them out whole, listed in rejected.jsonl (stop)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace candidates prepared earlier")
    parser.set_defaults(handler=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from finetune.data.regions.command import prepare_command

    return prepare_command(arguments)


def build_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--template", default="zh", metavar="NAME", help="zh, en, both, or your own YAML (zh)")
    parser.add_argument(
        "--copy-images", action="store_true", help="put the images into out_dir, so that it can be moved"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier build")
    parser.set_defaults(handler=_build)


def _build(arguments: argparse.Namespace) -> int:
    from finetune.data.regions.command import build_command

    return build_command(arguments)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="trained folder, or what forensics merge wrote")
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder to put on --model")
    threshold = parser.add_mutually_exclusive_group(required=True)
    threshold.add_argument(
        "--val", metavar="FILE", help="the threshold from 0.40 to 0.80 with the best region F1 here is taken for --test"
    )
    threshold.add_argument("--threshold", type=probability, metavar="P", help="take this one instead")
    threshold.add_argument("--threshold-from", metavar="FILE", help="the threshold.json of an earlier evaluation")
    parser.add_argument("--test", required=True, metavar="FILE", help="read when the threshold is fixed, not before")
    parser.add_argument("--out", required=True, metavar="DIR", help="metrics.json, predictions.jsonl, report.html, ...")
    parser.add_argument("--any-split", action="store_true", help="let --test hold records of train or val")
    parser.add_argument(
        "--max-regions", type=positive, metavar="N", help="candidates per question; more are asked in several (all)"
    )
    loading_arguments(parser)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions per forward pass (8)")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="limit of an answer (512)")
    parser.add_argument("--max-samples", type=positive, metavar="N", help="take N records of a file, evenly spread")
    parser.add_argument("--report-samples", type=positive, default=60, metavar="N", help="images in report.html (60)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output of an earlier evaluation")
    parser.set_defaults(handler=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from finetune.evaluation.regions.command import evaluate_command

    return evaluate_command(arguments)
