"""Verbs of inspection reports: samples, prepare, infer below `reports`. Their layers are imported when they run."""

from __future__ import annotations

import argparse

from finetune.errors import ConfigError
from finetune.verbs.argument_types import VerbParser, override_arguments, positive
from finetune.verbs.inference import loading_arguments


def reports_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=VerbParser)
    for name, summary, add_arguments in (
        ("samples", "draw walls with defects and the table of their reports, to try the others on", samples_arguments),
        ("prepare", "a table of inspection photographs to a stored set that can be trained on", prepare_arguments),
        ("infer", "write reports for images or a stored set, and compare them with the true ones", infer_arguments),
    ):
        add_arguments(verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))


def samples_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for table.csv and images/")
    parser.add_argument("--num", type=positive, default=600, metavar="N", help="pictures (600)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier table")
    parser.set_defaults(handler=_samples)


def _samples(arguments: argparse.Namespace) -> int:
    from finetune.data.synthesis.wall_photos import write_wall_reports

    table = write_wall_reports(arguments.out, arguments.num, arguments.seed, overwrite=arguments.overwrite)
    print(f"wrote {table}: {arguments.num} rows")
    return 0


def prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="TABLE", help=".csv or .tsv with a header; UTF-8, GBK, ... are recognised")
    parser.add_argument("--images", metavar="DIR", help="image paths are relative to it (default: the table's folder)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the stored set; train, val and test in it")
    parser.add_argument(
        "--format", choices=("jsonl", "parquet"), default="jsonl", help="image files beside the records, or inside"
    )
    parser.add_argument(
        "--config", metavar="YAML", help="columns, fields, levels, splits: see configs/data/reports.yaml"
    )
    override_arguments(parser, "changes to --config or the defaults, e.g. table.id_column=null splits.ratios.val=0.2")
    parser.add_argument(
        *("--image-quality", "--image_quality"), type=_quality, default=85, metavar="Q", help="of the stored JPEGs (85)"
    )
    parser.add_argument(
        *("--max-image-size", "--max_image_size"),
        type=positive,
        nargs=2,
        default=(1024, 1024),
        metavar=("WIDTH", "HEIGHT"),
        help="larger images are made smaller, aspect ratio kept (1024 1024)",
    )
    parser.add_argument("--keep-images", action="store_true", help="store every file byte for byte instead")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="at rows that cannot be used; skipped ones go to rejected.jsonl (default: as configured, stop)",
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: as configured, all cores)")
    parser.add_argument("--overwrite", action="store_true", help="make a finished set again; otherwise it is refused")
    parser.add_argument(
        "--preview",
        type=positive,
        nargs="?",
        const=3,
        metavar="N",
        help="show the first N stored records (3); without --csv those of the set in --out",
    )
    parser.set_defaults(handler=_prepare)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 100")
    return int(text)


def _prepare(arguments: argparse.Namespace) -> int:
    from finetune.data.reports.command import prepare_command

    return prepare_command(arguments)


def infer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, folders, a .txt list of images, or a table or stored set (.csv, .jsonl, .parquet, FOLDER/SPLIT)",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="trained folder, or what forensics merge wrote")
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder to put on --model")
    parser.add_argument("--out", required=True, metavar="DIR", help="results.json and report.html")
    parser.add_argument(
        *("--compare-gt", "--compare_gt"),
        action="store_true",
        help="compare with the true reports of a table or stored set, field by field",
    )
    parser.add_argument("--images", metavar="DIR", help="image paths of a table are relative to it")
    parser.add_argument("--config", metavar="YAML", help="fields, levels and template: see configs/data/reports.yaml")
    override_arguments(parser, "changes to --config or the defaults, e.g. table.template=my_report.yaml")
    loading_arguments(parser)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images per forward pass (8)")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="limit of a report (512)")
    parser.add_argument("--max-samples", type=positive, metavar="N", help="take N inputs, evenly spread")
    parser.add_argument("--report-samples", type=positive, default=60, metavar="N", help="cards in report.html (60)")
    parser.set_defaults(handler=_infer)


def _infer(arguments: argparse.Namespace) -> int:
    if len(arguments.inputs) > 1 and arguments.compare_gt:
        raise ConfigError("--compare-gt takes one table or stored set; give one INPUT")
    from finetune.evaluation.reports import infer_command

    return infer_command(arguments)
