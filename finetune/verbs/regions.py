"""Verbs of region candidates: samples, scan, prepare, build below `regions`. Layers are imported when they run."""

from __future__ import annotations

import argparse

from finetune.verbs.argument_types import VerbParser, override_arguments, positive


def regions_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=VerbParser)
    for name, summary, add_arguments in (
        ("samples", "draw surfaces with cracks, seepage and spalls and their label files", samples_arguments),
        ("scan", "count what the label files hold, and print a label_map to paste", scan_arguments),
        ("prepare", "divide images by folder and choose candidate regions", prepare_arguments),
        ("build", "write conversations about the candidates, ready to train on", build_arguments),
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
