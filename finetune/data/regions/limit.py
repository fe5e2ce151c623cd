"""Records about fewer candidates: at most N of them in training, all of them in several questions in evaluation.

Ids, boxes and wording stay as they are; list, positive ids and answer always speak of the same candidates. Which ones a
training record keeps is drawn by its id, abnormal and normal ones in the proportion it has: the list then tells nothing
that the whole one did not tell.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from finetune.data.regions.answers import Findings, Verdicts, edited_answers
from finetune.data.regions.text import POSITIVE_IDS, REGIONS, REGIONS_PLACEHOLDER, record_regions
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import Record

_TOO_MANY = "more candidates than may be asked about at once"
_FIX = "set data.max_regions (max_regions_per_image) to null, or build the record with forensics regions build"


class Limited(NamedTuple):
    """Records to train on, how many of them were shortened, and how many candidates that left out."""

    records: list[Record]
    shortened: int
    left_out: int


def limit_regions(records: Iterable[Record], max_regions: int | None) -> Limited:
    """Records with at most `max_regions` candidates each; None changes nothing.

    Raises:
        ConfigError: `max_regions` below 1. DataFormatError: as `keep_regions`.
    """
    _check(max_regions)
    found, shortened, left_out = [], 0, 0
    for record in records:
        regions = record_regions(record) if max_regions is not None else None
        if max_regions is not None and regions is not None and len(regions) > max_regions:
            shortened += 1
            left_out += len(regions) - max_regions
            record = keep_regions(record, drawn_ids(record, max_regions))
        found.append(record)
    return Limited(found, shortened, left_out)


def fitted_records(records: Iterable[Record], what: str, max_regions: int | None) -> list[Record]:
    """Records as a run takes them: those of `train` shortened, those of `eval` divided, so that none is left out.

    Raises:
        DataFormatError: as `keep_regions`.
    """
    if what == "train":
        return limit_regions(records, max_regions).records
    return [part for record in records for part in regions_in_chunks(record, max_regions)]


def regions_in_chunks(record: Record, max_regions: int | None) -> Iterator[Record]:
    """The record as it is, or several of its id with at most `max_regions` candidates each, every one of them once.

    The parts follow the order of the list and are as equal in size as can be.

    Raises:
        ConfigError: `max_regions` below 1. DataFormatError: as `keep_regions`.
    """
    _check(max_regions)
    regions = record_regions(record)
    if max_regions is None or regions is None or len(regions) <= max_regions:
        yield record
        return
    for part in np.array_split(np.arange(len(regions)), math.ceil(len(regions) / max_regions)):
        yield keep_regions(record, [regions[index][0] for index in part])


def drawn_ids(record: Record, max_regions: int) -> list[str]:
    """Ids of `max_regions` candidates of a record that has more, in its order; the same ones for the same record id.

    The number of abnormal ones is the proportional number, rounded up or down at random so that it is met on average.
    """
    names = [name for name, _ in record_regions(record) or ()]
    positive = set(_positive_ids(record))
    rng = np.random.default_rng(zlib.crc32(record.id.encode()))
    share = max_regions * len(positive) / len(names)
    num_positive = int(share) + int(rng.random() < share - int(share))
    kept: set[str] = set()
    for is_positive, count in ((True, num_positive), (False, max_regions - num_positive)):
        group = [name for name in names if (name in positive) == is_positive]
        kept.update(group[index] for index in rng.choice(len(group), min(count, len(group)), replace=False))
    return [name for name in names if name in kept]


def keep_regions(record: Record, ids: Sequence[str]) -> Record:
    """The record about these of its candidates only: list, positive ids, verdicts and findings of its answer.

    Raises:
        DataFormatError: the list is written out in the question, or an answer is not the JSON that can be shortened.
    """
    kept = frozenset(ids)

    def shorten(verdicts: Verdicts, findings: Findings) -> tuple[Verdicts, Findings]:
        return (
            {name: word for name, word in verdicts.items() if name in kept},
            [entry for entry in findings if entry["id"] in kept],
        )

    problem = f"{_TOO_MANY} ({_count(record)}), and an answer that cannot be shortened"
    turns = edited_answers(record, shorten, problem=problem, fix=_FIX)
    if turns and not any(REGIONS_PLACEHOLDER in turn.content for turn in turns if turn.role != "assistant"):
        raise _problem(record, f"no {REGIONS_PLACEHOLDER} in the question, so its list of candidates cannot be changed")
    provenance: dict[str, Any] = {
        **record.provenance,
        REGIONS: [entry for entry in record.provenance[REGIONS] if entry["id"] in kept],
        POSITIVE_IDS: [name for name in _positive_ids(record) if name in kept],
    }
    return replace(record, turns=turns, provenance=provenance)


def _check(max_regions: int | None) -> None:
    if max_regions is not None and max_regions < 1:
        raise ConfigError(f"data.max_regions is {max_regions}; expected at least 1, or null")


def _positive_ids(record: Record) -> list[str]:
    found = record.provenance.get(POSITIVE_IDS)
    if not isinstance(found, list):
        raise _problem(record, f"provenance.{POSITIVE_IDS} is no list of ids")
    return found


def _problem(record: Record, text: str) -> DataFormatError:
    return DataFormatError(
        f"{_TOO_MANY}, and {text}",
        record=record.id,
        source=record.source,
        found=_count(record),
        fix=_FIX,
    )


def _count(record: Record) -> str:
    return f"{len(record.provenance[REGIONS])} candidates"
