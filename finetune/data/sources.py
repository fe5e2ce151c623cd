"""Records of the files a run names: read, mixed by weight, thinned out, and divided where no validation file is given.

Nothing is decoded here. The division is by group, so that no picture is on both sides; `splits.py` divides data sets.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from finetune.config import SourceConfig
from finetune.data.readers import data_root, iter_records, read_records
from finetune.data.splits import GroupBy, rules_of
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import Record

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read_sources(sources: Sequence[SourceConfig], what: str) -> list[Record]:
    """Records of every source in order; a weight w repeats a source's records w times (the fraction by `spread`).

    Raises:
        ConfigError: no source. DataFormatError: see the readers.
    """
    return [record for own in _read_each(sources, what) for record in own]


def read_and_hold_back(
    sources: Sequence[SourceConfig], what: str, ratio: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """`read_sources`, divided by `hold_back`; groups without a name are relative to each source's data root.

    Raises:
        ConfigError, DataFormatError: as both.
    """
    each = _read_each(sources, what)
    roots = [(Path(source.path).stem, data_root(source.path, source.root)) for source in sources]
    rules = [rule for rule, own in zip(rules_of("group", roots), each, strict=True) for _ in own]
    return hold_back([record for own in each for record in own], ratio, seed, rules)


def begin_sources(sources: Sequence[SourceConfig]) -> None:
    """Open every source and read no further than its first record, or what is wrong with it, which is passed over.

    Raises:
        DataFormatError: a source that cannot be opened at all.
    """
    for source in sources:
        first = next(iter(iter_records(source.path, source.format, source.root, source.options)), None)
        if isinstance(first, DataFormatError) and first.record is None:
            raise first


def _read_each(sources: Sequence[SourceConfig], what: str) -> list[list[Record]]:
    """The records of each source, as often as its weight says."""
    if not sources:
        raise ConfigError(
            f"data.{what} is empty; give the path of a JSON or JSONL file, e.g. data.{what}=[train.jsonl]"
        )
    records: list[list[Record]] = []
    for source in sources:
        own = read_records(source.path, source.format, source.root, source.options)
        if problem := weight_problem(source, what):
            raise ConfigError(problem)
        wholes, rest = divmod(max(1, round(len(own) * source.weight)), max(1, len(own)))
        records.append([*own * wholes, *spread(own, rest)])
    return records


def weight_problem(source: SourceConfig, what: str) -> str:
    """What is wrong with a source's weight; "" where nothing is."""
    if source.weight > 0 and math.isfinite(source.weight):
        return ""
    return f"data.{what}: weight of {source.path} is {source.weight}; expected a number above 0"


def spread(records: Sequence[T], count: int) -> list[T]:
    """`count` records (or their numbers) in their order: one drawn from each of as many equal stretches.

    So an ordered file keeps its mixture, and so does one in which originals and tampered versions alternate, where
    equal distances would find one class alone. The same numbers give the same choice, in every process.
    """
    if count >= len(records):
        return list(records)
    draw = random.Random(0)
    edges = [i * len(records) // max(1, count) for i in range(count + 1)]
    return [records[draw.randrange(low, high)] for low, high in itertools.pairwise(edges)]


def hold_back(
    records: Sequence[Record], ratio: float, seed: int, rules: Sequence[GroupBy] | None = None
) -> tuple[list[Record], list[Record]]:
    """Whole groups of records set aside for validation, about `ratio` of them in all.

    Groups are taken in an order that the seed and their names decide, each if it brings the share nearer to `ratio`; at
    least one is taken and one left. A record that a weight has repeated is validated on once.

    Args:
        records: as `read_sources` gives them.
        ratio: in (0, 1).
        rules: where the group of each record comes from; default: its field, or its picture's path as it is given.

    Returns:
        Records to train on and to validate on, in their order.

    Raises:
        ConfigError: all records are of one group.
    """
    rules = rules or [GroupBy()] * len(records)
    keys = [rule.key(record) for rule, record in zip(rules, records, strict=True)]
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    if len(sizes) < 2:
        raise ConfigError(
            f"data.val_ratio divides by group, and all {len(records)} records are of one group "
            f"('{next(iter(sizes), '')}'); give a validation file in data.eval"
        )
    wanted, taken = ratio * len(records), 0
    chosen: set[str] = set()
    order = sorted(sizes, key=lambda key: hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest())
    for key in order:
        if abs(taken + sizes[key] - wanted) < abs(taken - wanted) and len(chosen) + 1 < len(sizes):
            chosen.add(key)
            taken += sizes[key]
    if not chosen:
        chosen.add(min(order, key=lambda key: sizes[key]))
    held = [record for record, key in zip(records, keys, strict=True) if key in chosen]
    kept = [record for record, key in zip(records, keys, strict=True) if key not in chosen]
    _warn_of_neighbours(kept, held)
    return kept, list({id(record): record for record in held}.values())


def _warn_of_neighbours(kept: Sequence[Record], held: Sequence[Record]) -> None:
    """What a division by group cannot see: records that name no group, and pictures that two groups share."""
    grouping = GroupBy()
    alone = sum(not grouping.named(record) for record in (*kept, *held))
    if alone:
        logger.warning(
            "data.val_ratio: %d of %d records name no group, so each picture is a group of its own, and an original "
            "and its tampered version may fall on both sides; give `group`, or a validation file in data.eval",
            alone, len(kept) + len(held),
        )  # fmt: skip
    if shared := shared_pictures(kept, held):
        logger.warning(
            "data.val_ratio: %d pictures are in training and in validation records, e.g. %s; give records that share a "
            "picture the same `group`",
            len(shared), shared[0],
        )  # fmt: skip


def shared_pictures(train: Sequence[Record], held: Sequence[Record]) -> list[str]:
    """Files that records of both sides show, sorted; pictures inside a stored set, and copies, are not looked at."""
    known = {os.path.abspath(image.path) for record in train for image in record.images if image.path}
    shown = {image.path for record in held for image in record.images if image.path}
    return sorted(path for path in shown if os.path.abspath(path) in known)


def shared_warning(train: Sequence[Record], held: Sequence[Record]) -> str:
    """What to say where training and evaluation records show the same files; "" where none does."""
    shared = shared_pictures(train, held)
    if not shared:
        return ""
    return (
        f"{len(shared)} pictures of data.eval are also in data.train, e.g. {shared[0]}: what is measured on them says "
        "nothing about new ones; divide the data by group (`forensics prepare`, data.val_ratio), `forensics audit` "
        "finds copies too"
    )
