"""Verbs that make and check data: synth, prepare, audit, preview. Their layers are imported when they run."""

from __future__ import annotations

import argparse
import sys

from finetune.errors import ConfigError
from finetune.verbs.argument_types import hash_distance, non_negative_int, positive, probability, reader_arguments


def synth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for images, masks, train.jsonl, eval.jsonl")
    parser.add_argument(
        "--config", metavar="YAML", help="e.g. configs/data/synth_instruct.yaml; options given here win"
    )
    parser.add_argument(
        "--photos", metavar="DIR", help="your own photographs (default: those shipped with scikit-image etc.)"
    )
    parser.add_argument(
        "--train-photos", metavar="DIR", help="further photographs to train on; those held out stay as they are"
    )
    parser.add_argument("--num-train", type=int, metavar="N", help="training images (2000)")
    parser.add_argument("--num-val", type=int, metavar="N", help="further images of the training photographs (120)")
    parser.add_argument("--num-eval", type=int, metavar="N", help="held-out images, from other photographs (300)")
    parser.add_argument(
        "--scene-variation",
        type=probability,
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
        "train_photos_dir": arguments.train_photos,
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


def prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="e.g. configs/data/prepare_folders.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="e.g. out_dir=data/processed/set splits.ratios.train=0.9 splits.ratios.val=0",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="at a record that cannot be used; skipped ones go to rejected.jsonl (default: as configured, stop)",
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: as configured, all cores)")
    parser.add_argument("--overwrite", action="store_true", help="make a finished set again; otherwise it is refused")
    parser.set_defaults(handler=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from finetune.data.preparation.command import prepare_command

    return prepare_command(arguments)


def audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", metavar="DATA", help="data file or folder; each is a split of its own")
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME=FILE", help="data of a named split; may be repeated"
    )
    parser.add_argument("--out", metavar="DIR", help="write audit.json and audit.html here")
    reader_arguments(parser)
    parser.add_argument(
        "--group-by", default="group", metavar="RULE", help="group, parent, path:REGEX or provenance.KEY (group)"
    )
    parser.add_argument("--config", metavar="YAML", help="training configuration: token lengths against its limit")
    parser.add_argument("--model", metavar="DIR", help="model folder whose tokenizer and tokens are meant")
    parser.add_argument("--max-length", type=positive, metavar="N", help="limit in tokens (default: the config's)")
    parser.add_argument("--num-cls", type=positive, default=1, metavar="N", help="cls tokens without a model (1)")
    parser.add_argument("--num-mask", type=positive, default=32, metavar="N", help="mask tokens without a model (32)")
    parser.add_argument(
        "--leak-threshold",
        type=probability,
        default=0.65,
        metavar="P",
        help="report a clue when the lower bound of its AUROC is above (0.65)",
    )
    parser.add_argument(
        "--hash-distance", type=hash_distance, default=4, metavar="BITS", help="pictures this near look the same (4)"
    )
    parser.add_argument("--workers", type=non_negative_int, default=0, metavar="N", help="processes; 0 = one per core")
    parser.set_defaults(handler=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from finetune.data.audit.command import audit_command

    if not arguments.config and not arguments.model:
        if arguments.max_length is not None:
            raise ConfigError("--max-length needs --config YAML or --model DIR, whose tokenizer counts")
        return audit_command(arguments)
    from finetune.inference.token_lengths import token_counter

    count, limit, tokens = token_counter(arguments.config, arguments.model, arguments.max_length)
    arguments.num_cls, arguments.num_mask = tokens.num_cls, tokens.num_mask
    return audit_command(arguments, count, limit)


def preview_arguments(parser: argparse.ArgumentParser) -> None:
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
    which.add_argument("--num", type=positive, default=3, metavar="N", help="draw N records at random (default 3)")
    which.add_argument("--id", nargs="+", metavar="ID", help="these records instead")
    which.add_argument("--seed", type=int, default=0, help="same seed, same records (default 0)")
    which.add_argument("--split", metavar="NAME", help="a split of the folder DATA, e.g. train")
    reader_arguments(which)
    where = parser.add_argument_group("where to")
    where.add_argument("--html", metavar="FILE", help="also write a page with larger pictures and the id of each token")
    where.add_argument("--width", type=positive, metavar="N", help="columns (default: the terminal's)")
    where.add_argument("--no-color", action="store_true", help="marks instead of colours, as where output is piped")
    parser.set_defaults(handler=_preview)


def _preview(arguments: argparse.Namespace) -> int:
    from finetune.inference.preview import preview_command

    return preview_command(arguments)
