"""The console script `forensics`: one subcommand per verb. Every layer is imported only when its verb runs."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence

from finetune.errors import ConfigError, ForensicsError

_DTYPES = ("auto", "float32", "bfloat16", "float16")

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 problems found, 2 a user's mistake (one line on stderr)."""
    arguments = build_parser().parse_args(argv)
    return _guarded(arguments.handler, arguments)


def train_main(argv: Sequence[str] | None = None) -> None:
    """`sft_llm.py`'s door to training: the arguments of `forensics train`; exits the process."""
    parser = argparse.ArgumentParser(prog="sft_llm.py", description="Train from a YAML configuration.")
    _train_arguments(parser)
    arguments = parser.parse_args(argv)
    sys.exit(_guarded(arguments.handler, arguments))


def _guarded(handler: Handler, arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not any(map(shutil.which, ("nvidia-smi", "rocm-smi", "npu-smi", "xpu-smi"))):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns at import that it found no device
    try:
        return handler(arguments)
    except ForensicsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
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
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name, summary, add_arguments in (
        ("train", "train from a YAML configuration", _train_arguments),
        ("predict", "verdict, mask and text for images", _predict_arguments),
        (
            "chat",
            "talk about images in the terminal, or put the answers of several models side by side",
            _chat_arguments,
        ),
        ("evaluate", "metrics, predictions and an HTML report on a labelled data set", _evaluate_arguments),
        ("merge", "turn an adapter into a standalone model folder, verified by reloading it", _merge_arguments),
        ("doctor", "check environment, data and configuration, all problems at once", _doctor_arguments),
        ("preview", "show records as training sees them: supervised tokens, images with masks", _preview_arguments),
        (
            "audit",
            "find what gives labels away, copies across splits and bad files in data sets",
            _audit_arguments,
        ),
        ("tiny", "build the tiny Qwen2.5-VL that everything runs on offline", _tiny_arguments),
        ("synth", "make tampered and authentic images from photographs", _synth_arguments),
        ("prepare", "check, divide and store a data set from any sources, then audit it", _prepare_arguments),
    ):
        add_arguments(verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))
    return parser


# ---- train ----


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="e.g. configs/train/quickstart.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="e.g. train.max_steps=10 model.path=Qwen/Qwen2.5-VL-3B-Instruct",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last sound checkpoint of output_dir, or start if there is none (train.resume=auto)",
    )
    parser.add_argument("--stage", metavar="NAME", help="run this one of the configuration's stages (default: all)")
    parser.set_defaults(handler=_train)


def _train(arguments: argparse.Namespace) -> int:
    from finetune.config import RunConfig, load_config

    overrides = [*arguments.overrides, *(["train.resume=auto"] if arguments.resume else [])]
    config: RunConfig = load_config(arguments.config, overrides)  # before the heavy imports: mistakes show at once
    if arguments.stage or config.stages:
        from finetune.training.stages import run_stage, run_stages

        return run_stage(config, arguments.stage) if arguments.stage else run_stages(config)
    from finetune.training.run import train

    status: int = train(config).get("exit_status", 0)
    return status


# ---- predict ----


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="trained folder, e.g. runs/quickstart/best")
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder to put on --model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    parser.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="images per forward pass (default 8)"
    )
    parser.add_argument(
        "--threshold", type=_probability, default=0.5, metavar="P", help="score from which an image is tampered (0.5)"
    )
    parser.add_argument(
        "--mask-threshold",
        type=_probability,
        default=0.5,
        metavar="P",
        help="score from which a pixel is tampered (0.5)",
    )
    parser.add_argument("--no-text", action="store_true", help="verdict and mask only: one forward pass, no generation")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=256, metavar="N", help="limit of the answer (default 256)"
    )
    parser.add_argument(
        "--template", default=None, help="zh, en or a template YAML (default: as the model was trained)"
    )


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    _model_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="write masks, overlays and predictions.jsonl here")
    parser.set_defaults(handler=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from finetune.inference.commands import predict_files

    return predict_files(arguments)


# ---- chat ----


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--data-root", metavar="DIR", help="image paths of --script are relative to it")
    parser.add_argument("--format", default="auto", help="reader for --script (default: recognised from the records)")
    parser.add_argument("--max-samples", type=_positive, metavar="N", help="ask the first N dialogues of --script")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (default: as they were saved)")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none", help="nf4: 4-bit base")
    parser.add_argument(
        "--batch-size", type=_positive, default=4, metavar="N", help="dialogues of --script at once (4)"
    )
    parser.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="limit of an answer (512)")
    parser.add_argument(
        "--temperature", type=_non_negative, default=0.0, metavar="T", help="0 always takes the likeliest token (0)"
    )
    parser.add_argument("--top-p", type=_probability, default=1.0, metavar="P", help="with --temperature (1)")
    parser.add_argument(
        "--threshold", type=_probability, default=0.5, metavar="P", help="image score of tampering (0.5)"
    )
    parser.add_argument(
        "--mask-threshold", type=_probability, default=0.5, metavar="P", help="the same of a pixel (0.5)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: as each model was trained)")
    parser.add_argument("--template", help="zh, en or a template YAML (default: as each model was trained)")
    parser.add_argument("--language", choices=("zh", "en"), help="of the messages (default: the system's)")
    parser.set_defaults(handler=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.script is None:
        for option in ("out", "html", "data_root", "max_samples"):
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} goes with --script FILE")
        from finetune.inference.chat import chat_command

        return chat_command(arguments)
    if arguments.out is None:
        raise ConfigError("--script needs --out FILE, where the answers are written")
    from finetune.inference.chat_script import script_command

    return script_command(arguments)


# ---- merge ----


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="base model, or an adapter naming its base")
    parser.add_argument("--adapter", metavar="DIR", help="adapter to merge into --model")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; merge_report.json is in it")
    parser.add_argument(
        "--plain", action="store_true", help="plain Qwen2.5-VL (vLLM, transformers) with the heads beside it"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the stored weights (default: the base's)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder at --out once done")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weights file (default 5GB)")
    parser.set_defaults(handler=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from finetune.models.export import merge_command

    return merge_command(arguments)


# ---- evaluate ----


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON or JSONL of any format in data/README.md")
    parser.add_argument(
        "--data-root", metavar="DIR", help="image paths are relative to it (default: the data file's folder)"
    )
    parser.add_argument("--format", default="auto", help="reader to use (default: recognised from the records)")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="metrics.json, predictions.jsonl, report.html, masks/"
    )
    parser.add_argument(
        "--max-samples", type=_positive, metavar="N", help="evaluate N records, evenly spread over the file"
    )
    parser.add_argument("--no-baselines", action="store_true", help="leave out error-level analysis and noise variance")
    parser.add_argument("--baseline-data", metavar="FILE", help="data the baselines' thresholds are fitted on")
    parser.add_argument(
        "--report-samples", type=_positive, default=48, metavar="N", help="cards in the report (default 48)"
    )
    parser.set_defaults(handler=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from finetune.evaluation.evaluate import evaluate_command

    return evaluate_command(arguments)


# ---- doctor ----


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help="check every record of a data file")
    parser.add_argument("--data-root", metavar="DIR", help="image paths are relative to it")
    parser.add_argument("--format", default="auto", help="reader to use (default: recognised from the records)")
    parser.add_argument("--config", metavar="YAML", help="check a training configuration and its data")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for --config")
    parser.add_argument("--num-cls", type=_positive, default=1, metavar="N", help="cls tokens of the model (default 1)")
    parser.add_argument(
        "--num-mask", type=_positive, default=32, metavar="N", help="mask tokens of the model (default 32)"
    )
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.overrides and not arguments.config:
        raise ConfigError(f"override {arguments.overrides[0]!r} needs --config, the configuration it changes")
    from finetune.training.doctor import doctor_command

    return doctor_command(arguments)


# ---- preview ----


def _preview_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="data file or folder of any format in data/README.md")
    how = parser.add_argument_group("how records are rendered (default: no tokenizer, the default template)")
    how.add_argument("--config", metavar="YAML", help="as this training configuration does")
    how.add_argument("--model", metavar="DIR", help="as this trained folder was taught; no weights are read")
    how.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changes to --config or the defaults, e.g. data.template=en tokens.num_cls=32",
    )
    which = parser.add_argument_group("which records")
    which.add_argument("--num", type=_positive, default=3, metavar="N", help="draw N records at random (default 3)")
    which.add_argument("--id", nargs="+", metavar="ID", help="these records instead")
    which.add_argument("--seed", type=int, default=0, help="same seed, same records (default 0)")
    which.add_argument("--split", metavar="NAME", help="a split of the folder DATA, e.g. train")
    which.add_argument("--data-root", metavar="DIR", help="image paths are relative to it")
    which.add_argument("--format", default="auto", help="reader to use (default: recognised from the records)")
    which.add_argument(
        "--option", nargs="+", default=[], metavar="KEY=VALUE", help="of the reader, as `options` of a source"
    )
    where = parser.add_argument_group("where to")
    where.add_argument("--html", metavar="FILE", help="also write a page with larger pictures and the id of each token")
    where.add_argument("--width", type=_positive, metavar="N", help="columns (default: the terminal's)")
    where.add_argument("--no-color", action="store_true", help="marks instead of colours, as where output is piped")
    parser.set_defaults(handler=_preview)


def _preview(arguments: argparse.Namespace) -> int:
    from finetune.inference.preview import preview_command

    return preview_command(arguments)


# ---- audit ----


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", metavar="DATA", help="data file or folder; each is a split of its own")
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME=FILE", help="data of a named split; may be repeated"
    )
    parser.add_argument("--out", metavar="DIR", help="write audit.json and audit.html here")
    parser.add_argument("--data-root", metavar="DIR", help="image paths are relative to it")
    parser.add_argument("--format", default="auto", help="reader to use (default: recognised from the records)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the reader; may be repeated"
    )
    parser.add_argument(
        "--group-by", default="group", metavar="RULE", help="group, parent, path:REGEX or provenance.KEY (group)"
    )
    parser.add_argument("--config", metavar="YAML", help="training configuration: token lengths against its limit")
    parser.add_argument("--model", metavar="DIR", help="model folder whose tokenizer and tokens are meant")
    parser.add_argument("--max-length", type=_positive, metavar="N", help="limit in tokens (default: the config's)")
    parser.add_argument("--num-cls", type=_positive, default=1, metavar="N", help="cls tokens without a model (1)")
    parser.add_argument("--num-mask", type=_positive, default=32, metavar="N", help="mask tokens without a model (32)")
    parser.add_argument(
        "--leak-threshold",
        type=_probability,
        default=0.65,
        metavar="P",
        help="report a clue when the lower bound of its AUROC is above (0.65)",
    )
    parser.add_argument(
        "--hash-distance", type=_hash_distance, default=4, metavar="BITS", help="pictures this near look the same (4)"
    )
    parser.add_argument("--workers", type=_non_negative_int, default=0, metavar="N", help="processes; 0 = one per core")
    parser.set_defaults(handler=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from finetune.data.audit.command import audit_command

    arguments.options = {}
    if arguments.option:
        from finetune.inference.preview import reader_options

        arguments.options = reader_options(arguments.option)
    if not arguments.config and not arguments.model:
        if arguments.max_length is not None:
            raise ConfigError("--max-length needs --config YAML or --model DIR, whose tokenizer counts")
        return audit_command(arguments)
    from finetune.inference.token_lengths import token_counter

    count, limit, tokens = token_counter(arguments.config, arguments.model, arguments.max_length)
    arguments.num_cls, arguments.num_mask = tokens.num_cls, tokens.num_mask
    return audit_command(arguments, count, limit)


# ---- prepare ----


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="e.g. configs/data/prepare_folders.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. out_dir=data/processed/set splits.ratios.val=0"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="at a record that cannot be used; skipped ones go to rejected.jsonl (default: as configured, stop)",
    )
    parser.add_argument("--workers", type=_positive, metavar="N", help="processes (default: as configured, all cores)")
    parser.add_argument("--overwrite", action="store_true", help="make a finished set again; otherwise it is refused")
    parser.set_defaults(handler=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from finetune.data.preparation.command import prepare_command

    return prepare_command(arguments)


# ---- tiny ----


def _tiny_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0, help="initialises the weights (default 0)")
    parser.add_argument("--untied", action="store_true", help="separate lm_head, as the 7B checkpoint has")
    parser.set_defaults(handler=_tiny)


def _tiny(arguments: argparse.Namespace) -> int:
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import TinyShape, build_tiny

    path = build_tiny(
        arguments.out, tokenizer_corpus(), TinyShape(tie_word_embeddings=not arguments.untied), seed=arguments.seed
    )
    print(f"wrote a tiny Qwen2.5-VL to {path}")
    return 0


# ---- synth ----


def _synth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for images, masks, train.jsonl, eval.jsonl")
    parser.add_argument(
        "--config", metavar="YAML", help="e.g. configs/data/synth_instruct.yaml; options given here win"
    )
    parser.add_argument(
        "--photos", metavar="DIR", help="your own photographs (default: those shipped with scikit-image etc.)"
    )
    parser.add_argument("--num-train", type=int, metavar="N", help="training images (2000)")
    parser.add_argument("--num-val", type=int, metavar="N", help="further images of the training photographs (120)")
    parser.add_argument("--num-eval", type=int, metavar="N", help="held-out images, from other photographs (300)")
    parser.add_argument(
        "--scene-variation",
        type=_probability,
        metavar="P",
        help="share of training images whose scene is mixed, blurred, recoloured before the camera takes it (0)",
    )
    parser.add_argument("--language", choices=("zh", "en", "both"), help="of the answers (default zh)")
    parser.add_argument("--seed", type=int, help="same seed, same bytes (default 0)")
    parser.add_argument("--workers", type=int, help="processes; 0 = one per core")
    parser.add_argument("--overwrite", action="store_true", help="replace a non-empty --out")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. num_train=500 record_kinds.multi_turn=0.3"
    )
    parser.set_defaults(handler=_synth)


def _synth(arguments: argparse.Namespace) -> int:
    from finetune.data.synthesis.config import load_synth_config
    from finetune.data.synthesis.generator import synthesize

    given = {
        "photos_dir": arguments.photos,
        "num_train": arguments.num_train,
        "num_val": arguments.num_val,
        "num_eval": arguments.num_eval,
        "scene_variation": arguments.scene_variation,
        "language": arguments.language,
        "seed": arguments.seed,
        "workers": arguments.workers,
    }
    options = {key: value for key, value in given.items() if value is not None}
    config = load_synth_config(arguments.config, arguments.overrides, options)
    manifest = synthesize(config, arguments.out, overwrite=arguments.overwrite)
    for split, counts in manifest["counts"].items():
        kinds = ", ".join(f"{count} {name}" for name, count in counts["operations"].items())
        print(f"{split}: {counts['images']} images from {len(counts['groups'])} photographs: {kinds}")
        if more := {kind: count for kind, count in counts["records"].items() if kind != "single"}:
            print(f"{split}_instruct.jsonl: {', '.join(f'{count} {kind}' for kind, count in more.items())}")
    for photo in manifest["rejected_photos"]:
        print(f"left out {photo['name']}: {photo['reason']}", file=sys.stderr)
    print(f"wrote {arguments.out}")
    return 0


def _non_negative_int(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _hash_distance(text: str) -> int:
    if not text.isdecimal() or int(text) > 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of bits from 0 to 16")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
