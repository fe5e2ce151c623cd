"""Verbs of the vision pipeline: evaluate, infer, annotate below `vision`. Their layers are imported when they run."""

from __future__ import annotations

import argparse

from finetune.verbs.argument_types import VerbParser, override_arguments, positive, probability, reader_arguments


def vision_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=VerbParser)
    for name, summary, add_arguments in (
        (
            "evaluate",
            "metrics, curves, threshold tables and the worst cases of heads on the vision tower",
            evaluate_arguments,
        ),
        (
            "infer",
            "verdict, overlay and explanation for folders of images, into a CSV and an evidence folder",
            infer_arguments,
        ),
        ("annotate", "put a heat map's evidence into records, for training explanations", annotate_arguments),
    ):
        add_arguments(verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))


def _settings(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--config", required=True, metavar="JSON", help=f"e.g. {example}; keys in docs/vision_evaluation.md"
    )
    override_arguments(parser, "changes to --config, e.g. heatmap_threshold=0.4 output.csv=out.csv")
    parser.add_argument("--overwrite", action="store_true", help="replace the output of an earlier run")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _settings(parser, "configs/eval/config_eval.json")
    parser.set_defaults(handler=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from finetune.evaluation.vision import evaluate_command

    return evaluate_command(arguments)


def infer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files or folders (default: 'images' of the file)"
    )
    _settings(parser, "configs/eval/config_inference.json")
    parser.add_argument("--chat", action="store_true", help="talk about one IMAGE in the terminal; writes nothing")
    parser.set_defaults(handler=_infer)


def _infer(arguments: argparse.Namespace) -> int:
    if arguments.chat:
        from finetune.inference.evidence.chat import chat_command

        return chat_command(arguments)
    from finetune.inference.evidence.inspection import infer_command

    return infer_command(arguments)


def annotate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="data file or folder of any format in data/README.md")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="records with evidence, .jsonl; overlays beside it"
    )
    _settings(parser, "configs/eval/config_inference.json")
    reader_arguments(parser)
    parser.add_argument("--max-samples", type=positive, metavar="N", help="take N records, evenly spread over DATA")
    parser.add_argument(
        "--without-evidence",
        type=probability,
        default=0.0,
        metavar="P",
        help="share of the records that keep their question as it is (0)",
    )
    parser.add_argument(
        "--keep-targets",
        action="store_true",
        help="keep labels and masks, so that heads on forensic tokens train too (default: text only)",
    )
    parser.set_defaults(handler=_annotate)


def _annotate(arguments: argparse.Namespace) -> int:
    from finetune.inference.evidence.annotating import annotate_command

    return annotate_command(arguments)
