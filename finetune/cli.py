"""The console script `forensics`: one subcommand per verb. Every layer is imported only when its verb runs."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence

from finetune.errors import ForensicsError
from finetune.verbs import data, inference, regions, reports, training, vision
from finetune.verbs.argument_types import VerbParser

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 problems found, 2 a user's mistake (one line on stderr)."""
    arguments = build_parser().parse_args(argv)
    return _guarded(arguments.handler, arguments)


def train_main(argv: Sequence[str] | None = None) -> None:
    """`sft_llm.py`'s door to training: the arguments of `forensics train`; exits the process."""
    parser = VerbParser(prog="sft_llm.py", description="Train from a YAML configuration.")
    training.train_arguments(parser)
    arguments = parser.parse_args(argv)
    sys.exit(_guarded(arguments.handler, arguments))


def _guarded(handler: Handler, arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not any(map(shutil.which, ("nvidia-smi", "rocm-smi", "npu-smi", "xpu-smi"))):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns at import that it found no device
    # bitsandbytes, which PEFT imports, warns that a kernel it could download is missing; it works without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return handler(arguments)
    except ForensicsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print("error: no space left on the device; make room, and go on with the same command", file=sys.stderr)
            return ForensicsError.exit_code
        if error.filename is None or error.strerror is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; give a path that exists and may be used", file=sys.stderr)
        return ForensicsError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; imports nothing heavy."""
    from finetune import __version__

    parser = argparse.ArgumentParser(
        prog="forensics",
        description="Fine-tune Qwen2.5-VL into an image-forensics inspector: real or tampered, where, and why.",
        epilog="First steps: bash script/quickstart.sh. Every verb has --help.",
    )
    parser.add_argument("--version", action="version", version=f"forensics {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=VerbParser)
    for name, summary, add_arguments in (
        ("train", "train from a YAML configuration", training.train_arguments),
        (
            "precompute",
            "search pictures for repetitions before training, on all cores (train.search_cache)",
            training.precompute_arguments,
        ),
        ("predict", "verdict, mask and text for images", inference.predict_arguments),
        (
            "chat",
            "talk about images in the terminal, or put the answers of several models side by side",
            inference.chat_arguments,
        ),
        ("evaluate", "metrics, predictions and an HTML report on a labelled data set", inference.evaluate_arguments),
        ("vision", "heads on the vision tower: evaluate, infer with evidence, annotate", vision.vision_arguments),
        ("regions", "candidate regions of images: samples, scan, prepare, build, evaluate", regions.regions_arguments),
        ("reports", "inspection reports from a table: prepare, infer", reports.reports_arguments),
        ("merge", "turn an adapter into a standalone model folder, verified by reloading it", training.merge_arguments),
        ("doctor", "check environment, data and configuration, all problems at once", training.doctor_arguments),
        ("preview", "show records as training sees them: supervised tokens, images with masks", data.preview_arguments),
        (
            "audit",
            "find what gives labels away, copies across splits and bad files in data sets",
            data.audit_arguments,
        ),
        ("tiny", "build the tiny Qwen2.5-VL that everything runs on offline", training.tiny_arguments),
        ("synth", "make tampered and authentic images from photographs", data.synth_arguments),
        ("prepare", "check, divide and store a data set from any sources, then audit it", data.prepare_arguments),
    ):
        add_arguments(verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))
    return parser


if __name__ == "__main__":
    sys.exit(main())
