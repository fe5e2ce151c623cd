"""Verbs that ask models: predict, evaluate, chat. Their layers are imported when they run."""

from __future__ import annotations

import argparse

from finetune.errors import ConfigError
from finetune.verbs.argument_types import non_negative, positive, probability, reader_arguments

DTYPES = ("auto", "float32", "bfloat16", "float16")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="trained folder, e.g. runs/quickstart/best")
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder to put on --model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="images per forward pass (default 8)"
    )
    parser.add_argument(
        "--threshold", type=probability, default=0.5, metavar="P", help="score from which an image is tampered (0.5)"
    )
    parser.add_argument(
        "--mask-threshold",
        type=probability,
        default=0.5,
        metavar="P",
        help="score from which a pixel is tampered (0.5)",
    )
    calibration_argument(parser)
    parser.add_argument(
        "--tta",
        choices=("none", "hflip", "flips", "dihedral"),
        default="none",
        help="average the heads over the image and its mirrored copies (hflip: 2 in all, flips: 4), and their "
        "transposed ones (dihedral: 8); as many forward passes (default none)",
    )
    parser.add_argument("--no-text", action="store_true", help="verdict and mask only: one forward pass, no generation")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="limit of the answer (default 256)"
    )
    parser.add_argument(
        "--template", default=None, help="zh, en or a template YAML (default: as the model was trained)"
    )


def loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and in which precision a model's language part runs."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they were saved)")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none", help="nf4: 4-bit base")


def calibration_argument(parser: argparse.ArgumentParser) -> None:
    """For verbs whose model may be heads on the vision tower."""
    parser.add_argument(
        "--no-calibration",
        action="store_true",
        help="scores as vision heads give them, without the calibration.json beside them",
    )


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    model_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="write masks, overlays and predictions.jsonl here")
    parser.set_defaults(handler=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from finetune.inference.commands import predict_files

    return predict_files(arguments)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON or JSONL of any format in data/README.md")
    reader_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="metrics.json, predictions.jsonl, report.html, masks/"
    )
    parser.add_argument(
        "--max-samples", type=positive, metavar="N", help="evaluate N records, evenly spread over the file"
    )
    parser.add_argument("--no-baselines", action="store_true", help="leave out error-level analysis and noise variance")
    parser.add_argument("--baseline-data", metavar="FILE", help="data the baselines' thresholds are fitted on")
    parser.add_argument(
        "--report-samples", type=positive, default=48, metavar="N", help="cards in the report (default 48)"
    )
    parser.set_defaults(handler=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from finetune.evaluation.evaluate import evaluate_command

    return evaluate_command(arguments)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="[NAME=]DIR", help="base model, whole model, or an adapter naming its base")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR", help="adapter on --model; may be repeated"
    )
    parser.add_argument(
        "--merged", action="append", default=[], metavar="[NAME=]DIR", help="further whole model; may be repeated"
    )
    parser.add_argument("--script", metavar="FILE", help="ask every dialogue of a data file instead of a terminal")
    parser.add_argument("--out", metavar="FILE", help="answers of --script, one JSON line per dialogue")
    parser.add_argument("--html", metavar="FILE", help="page that shows the answers of --script side by side")
    reader_arguments(parser.add_argument_group("how --script is read"))
    parser.add_argument("--max-samples", type=positive, metavar="N", help="ask the first N dialogues of --script")
    loading_arguments(parser)
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="dialogues of --script at once (4)")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="limit of an answer (512)")
    parser.add_argument(
        "--temperature", type=non_negative, default=0.0, metavar="T", help="0 always takes the likeliest token (0)"
    )
    parser.add_argument("--top-p", type=probability, default=1.0, metavar="P", help="with --temperature (1)")
    parser.add_argument(
        "--threshold", type=probability, default=0.5, metavar="P", help="image score of tampering (0.5)"
    )
    parser.add_argument(
        "--mask-threshold", type=probability, default=0.5, metavar="P", help="the same of a pixel (0.5)"
    )
    calibration_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: as each model was trained)")
    parser.add_argument("--template", help="zh, en or a template YAML (default: as each model was trained)")
    parser.add_argument("--language", choices=("zh", "en"), help="of the messages (default: the system's)")
    parser.set_defaults(handler=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.script is None:
        for option in ("out", "html", "data_root", "max_samples"):
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} goes with --script FILE")
        from finetune.inference.chat.command import chat_command

        return chat_command(arguments)
    if arguments.out is None:
        raise ConfigError("--script needs --out FILE, where the answers are written")
    from finetune.inference.chat.script import script_command

    return script_command(arguments)
