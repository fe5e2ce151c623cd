"""`forensics reports prepare`: a table and its photographs to a stored set, and a look at what was stored.

A thin door to `finetune.data.preparation`: the table is a source of format `reports`. Before anything is written every
row that cannot be used is listed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from finetune.data.preparation.config import PrepareConfig, PrepareSource
from finetune.data.preparation.prepare import prepare
from finetune.data.readers import iter_records
from finetune.data.reports.settings import ReportsConfig, load_reports_config
from finetune.data.storage import ImageOptions, iter_stored, stored_splits
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import Record

MAX_LISTED = 20


def prepare_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics reports prepare`; exit status 1 where rows were listed instead of written, else 0.

    Raises:
        ForensicsError: see `finetune.data.preparation.prepare.prepare`.
    """
    if arguments.csv is None:
        if arguments.preview is None:
            raise ConfigError("nothing to do: give --csv TABLE to prepare it, or --preview to look at the set in --out")
        preview_stored(arguments.out, arguments.preview)
        return 0
    config = load_reports_config(arguments.config, arguments.overrides)
    for name in ("on_error", "workers"):
        if (value := getattr(arguments, name)) is not None:
            setattr(config, name, value)
    plan = prepare_config(
        config, arguments.csv, arguments.images, arguments.out, arguments.format, image_options(arguments)
    )
    if config.on_error == "stop" and _list_bad_rows(plan.sources[0]):
        return 1
    done = prepare(plan, overwrite=arguments.overwrite)
    print("\n".join(done.lines()))
    if arguments.preview is not None:
        preview_stored(arguments.out, arguments.preview)
    return 0


def image_options(arguments: argparse.Namespace) -> ImageOptions:
    """How images are stored: `--keep-images` byte for byte, else JPEG of `--image-quality` and `--max-image-size`."""
    if arguments.keep_images:
        return ImageOptions()
    width, height = arguments.max_image_size
    return ImageOptions("reencode", "jpeg", arguments.image_quality, (height, width))


def prepare_config(
    config: ReportsConfig, table: str, images_dir: str | None, out_dir: str, storage: str, images: ImageOptions
) -> PrepareConfig:
    """The preparation of one table.

    Args:
        images_dir: what image paths are relative to; default: the table's folder.
        storage: jsonl or parquet.
    """
    source = PrepareSource(path=table, format="reports", root=images_dir, options=asdict(config.table))
    return PrepareConfig(
        out_dir=out_dir,
        seed=config.seed,
        sources=[source],
        storage="parquet" if storage == "parquet" else "jsonl",
        shard_megabytes=config.shard_megabytes,
        images=images,
        splits=config.splits,
        on_error=config.on_error,
        workers=config.workers,
        audit=False,  # its checks are about labels real and tampered, which reports have not
    )


def preview_stored(folder: str, num: int) -> None:
    """Print the first `num` records of a stored set's split `train`, or its first one, with each image's size.

    Of a Parquet file only the footer, the columns without images of its first row group, and the images shown are read.

    Raises:
        DataFormatError: no stored set in the folder, or a damaged one.
    """
    from finetune.data.images import image_size_hw

    filled = [name for name, files in stored_splits(folder).items() if files]
    split = "train" if "train" in filled else next(iter(filled), None)
    if split is None:
        raise DataFormatError("stored set without records", source=Path(folder).name, found=folder)
    print(f"{folder}/{split}, first {num}:")
    for _, source, record in islice(iter_stored(Path(folder) / split), num):
        if isinstance(record, DataFormatError):
            raise record
        height, width = image_size_hw(record.images[0], record.id, source)
        print(f"\n{record.id}  ({source}; {width}x{height} px)")
        for turn in record.turns:
            print("\n".join(f"  {'> ' if turn.role == 'user' else '  '}{line}" for line in turn.content.splitlines()))


def _list_bad_rows(source: PrepareSource) -> bool:
    """Say of every row that cannot be used why; whether there is one.

    Raises:
        DataFormatError: the table as a whole cannot be used.
    """
    num_rows = num_bad = 0
    for entry in iter_records(source.path, source.format, source.root, source.options):
        num_rows += 1
        if isinstance(entry, Record):
            continue
        if entry.record is None and entry.source == Path(source.path).name:
            raise entry  # the table as a whole, none of its rows
        num_bad += 1
        if num_bad <= MAX_LISTED:
            print(f"error: {entry}", file=sys.stderr)
    if num_bad > MAX_LISTED:
        print(f"error: and {num_bad - MAX_LISTED} more", file=sys.stderr)
    if num_bad:
        print(
            f"error: {num_bad} of {num_rows} rows cannot be used, nothing was written; correct them, or pass "
            "--on-error skip to leave them out (each is then listed in rejected.jsonl)",
            file=sys.stderr,
        )
    return num_bad > 0
