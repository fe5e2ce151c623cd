"""What `forensics regions scan|prepare|build` print and return; the work is in the modules beside this one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.data.regions.build import build_sft
from finetune.data.regions.prepare import REPORT_NAME, candidates_name, prepare_regions
from finetune.data.regions.scan import STATS_NAME, scan
from finetune.data.regions.settings import SPLITS, load_regions_config
from finetune.data.regions.survey import decode_images, survey
from finetune.errors import ConfigError, DataFormatError

MAX_LISTED = 20


def scan_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics regions scan`; exit status 1 where labels have problems, else 0."""
    config = load_regions_config(arguments.config, arguments.overrides)
    found = scan(config)
    stats = found.stats
    print(
        f"{stats['abnormal_images']} abnormal and {stats['normal_images']} normal images in {stats['groups']} folders, "
        f"{stats['lines']} lines, {stats['boxes']} boxes"
    )
    for kind, counts in stats["types"].items():
        print(f"  {kind}: {counts['boxes']} boxes on {counts['images']} images")
    _list("note", found.notes, f"all in {STATS_NAME}")
    _list("error", found.problems, f"all in {STATS_NAME}")
    print(f"wrote {Path(config.out_dir) / STATS_NAME}; to paste into the configuration:\n{found.pasteable}")
    return 1 if found.problems else 0


def prepare_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics regions prepare`; exit status 1 where problems were listed instead, else 0."""
    config = load_regions_config(arguments.config, arguments.overrides)
    there = [name for split in SPLITS if (Path(config.out_dir) / (name := candidates_name(split))).exists()]
    if there and not arguments.overwrite:
        raise ConfigError(f"{config.out_dir} holds {', '.join(there)} already; give --overwrite to replace them")
    images = list(survey(config))
    decode_images(images)
    problems = [problem for image in images for problem in image.problems]
    if problems and arguments.on_error == "stop":
        _list("error", problems, "forensics regions scan writes all of them down")
        num_bad = sum(bool(image.problems) for image in images)
        print(
            f"error: {num_bad} of {len(images)} images cannot be used, nothing was written; correct them, or pass "
            "--on-error skip to leave them out (each is then listed in rejected.jsonl)",
            file=sys.stderr,
        )
        return 1
    done = prepare_regions(config, images)
    _list("note", done.notes, f"all in {REPORT_NAME}")
    for split, facts in done.report["splits"].items():
        print(
            f"{split}: {facts['images']} images ({facts['abnormal_images']} abnormal) of {facts['groups']} folders, "
            f"{facts['regions']} regions, {facts['positive_regions']} with a defect"
        )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if done.rejected:
        print(f"warning: {done.rejected} images rejected; reasons in {config.out_dir}/rejected.jsonl", file=sys.stderr)
    return 0


def build_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics regions build`."""
    config = load_regions_config(arguments.config, arguments.overrides)
    for built in build_sft(
        config.out_dir, arguments.template, copy_images=arguments.copy_images, overwrite=arguments.overwrite
    ):
        print(f"{built.path}: {built.records} records, {built.regions} regions, {built.positive_regions} with a defect")
    return 0


def _list(word: str, found: Sequence[DataFormatError], rest: str) -> None:
    for each in found[:MAX_LISTED]:
        print(f"{word}: {each}", file=sys.stderr)
    if len(found) > MAX_LISTED:
        print(f"{word}: and {len(found) - MAX_LISTED} more; {rest}", file=sys.stderr)
