"""Runs an audit: reads the sources once, examines records on all cores, and asks every check about the facts.

Memory holds the facts (about 1 kB an image), never the records or their pixels.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.audit.checks import (
    balance_findings,
    copy_findings,
    count_table,
    fault_findings,
    mask_findings,
    text_findings,
)
from finetune.data.audit.facts import Examiner, Job
from finetune.data.audit.findings import MAX_EXAMPLES, SEVERITIES, Audit, Example, Finding
from finetune.data.audit.leak_table import leak_findings, leak_table
from finetune.data.audit.table import Table
from finetune.data.fingerprints import MAX_DISTANCE
from finetune.data.parallel import ordered_map
from finetune.data.readers import iter_records
from finetune.data.splits import GroupBy
from finetune.data.storage import is_stored, stored_splits
from finetune.errors import ConfigError, DataFormatError
from finetune.progress import progress_bar
from finetune.schema import Record
from finetune.special_tokens import SpecialTokens

_FEW = 64
CountTokens = Callable[[Record], int]


@dataclass(frozen=True)
class Source:
    """One data file or folder and the split its records belong to."""

    path: str
    split: str
    format: str = "auto"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditSettings:
    """How strict an audit is.

    Args:
        group_by: see `finetune.data.splits.GroupBy`.
        leak_threshold: a leak is reported when the lower bound of its AUROC is above, in [0.5, 1].
        max_distance: bits of 64 up to which two pictures look the same.
        max_length: tokens a record may have; read only when tokens are counted.
        num_cls, num_mask: the model's forensic tokens.
        workers: processes, 0 for one per core.
    """

    group_by: str = "group"
    leak_threshold: float = 0.65
    max_distance: int = MAX_DISTANCE
    max_length: int | None = None
    num_cls: int = 1
    num_mask: int = 32
    workers: int = 0


def find_sources(
    data: Sequence[str],
    named: Sequence[tuple[str, str]] = (),
    format: str = "auto",
    root: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Source]:
    """Sources of paths as a user gives them: each its own split, named after the file; a stored set brings its splits.

    Args:
        data: paths of files or folders.
        named: (split, path); several may have one split.
        format, root, options: of the reader, for all of them.

    Raises:
        ConfigError: nothing given. DataFormatError: damaged manifest.
    """
    given = dict(options or {})
    sources = []
    for path in data:
        folder = Path(path)
        if folder.is_dir() and is_stored(folder):
            sources += [Source(str(folder / name), name, format, root, given) for name in stored_splits(folder)]
        else:
            sources.append(Source(path, folder.stem or folder.name, format, root, given))
    taken = [source.split for source in sources]
    for number, source in enumerate(sources):
        if taken.count(source.split) > 1:  # files of one name in several folders stay apart
            parent = Path(source.path).resolve().parent.name
            sources[number] = Source(source.path, f"{parent}/{source.split}", format, root, given)
    sources += [Source(path, name, format, root, given) for name, path in named]
    if not sources:
        raise ConfigError("no data given; name a data file or folder, or use --split NAME=FILE")
    return sources


def run_audit(
    sources: Sequence[Source],
    settings: AuditSettings | None = None,
    count_tokens: CountTokens | None = None,
    progress: bool = True,
) -> Audit:
    """Everything about the sources that can be found without a model.

    With more than one worker the caller's script needs the usual `if __name__ == "__main__":` (processes are spawned).

    Args:
        count_tokens: length of a record's token sequence; may raise `DataFormatError`.
        progress: show a bar on stderr, or lines where that is no terminal.

    Raises:
        ConfigError: a rule or an option that cannot be used.
        DataFormatError: a source that cannot be read at all. Problems of rows are findings.
    """
    settings = settings or AuditSettings()
    start = time.monotonic()
    reading = _Reading(sources, settings, count_tokens)
    table = Table()
    examine = Examiner(SpecialTokens(settings.num_cls, settings.num_mask))
    jobs = reading.jobs()
    head = list(itertools.islice(jobs, _FEW + 1))
    workers = settings.workers if len(head) > _FEW else 1  # starting processes takes longer than a few images
    facts = ordered_map(examine, itertools.chain(head, jobs), workers)
    for one in progress_bar(facts, total=None, desc="audit", unit="record", disable=not progress):
        table.add(one)
    leaks = leak_table(table)
    findings = [
        *reading.findings(table),
        *fault_findings(table),
        *copy_findings(table, settings.max_distance),
        *leak_findings(table, leaks, settings.leak_threshold),
        *balance_findings(table),
        *mask_findings(table),
        *text_findings(table),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    counts = count_table(table) | {"unreadable_records": len(reading.errors), "tokens": reading.token_counts()}
    return Audit(
        sources=[{"path": source.path, "split": source.split} for source in sources],
        settings=asdict(settings),
        counts=counts,
        leaks=leaks,
        findings=findings,
        seconds=round(time.monotonic() - start, 2),
    )


def records_by_number(sources: Sequence[Source], numbers: set[int]) -> dict[int, Record]:
    """The records that examples name by their number, read again; ends once all are found."""
    found: dict[int, Record] = {}
    if not numbers:
        return found
    readable = (
        item
        for source in sources
        for item in iter_records(source.path, source.format, source.root, source.options)
        if isinstance(item, Record)
    )
    for number, record in enumerate(readable):
        if number in numbers:
            found[number] = record
            if len(found) == len(numbers):
                break
    return found


class _Reading:
    """The sources as a stream of jobs; keeps what the stream itself shows: errors and lengths."""

    def __init__(self, sources: Sequence[Source], settings: AuditSettings, count_tokens: CountTokens | None) -> None:
        self.sources, self.settings, self.count_tokens = sources, settings, count_tokens
        self.rules = [GroupBy(settings.group_by, source.root or str(Path(source.path).parent)) for source in sources]
        self.errors: list[DataFormatError] = []
        self.lengths = array("q")
        self.length_errors: list[tuple[int, str]] = []
        self.ungrouped: list[int] = []

    def jobs(self) -> Iterator[Job]:
        """One for each record that can be read; raises where a source as a whole cannot."""
        number = 0
        for source, rule in zip(self.sources, self.rules, strict=True):
            first_number, first_error = number, len(self.errors)
            for item in iter_records(source.path, source.format, source.root, source.options):
                if isinstance(item, DataFormatError):
                    self.errors.append(item)
                    continue
                if self.count_tokens is not None:
                    self._count(number, item)
                group = rule.named(item)
                if not group:
                    self.ungrouped.append(number)
                yield Job(item, source.split, group, rule.key(item))
                number += 1
            only = self.errors[first_error:]
            if number == first_number and len(only) == 1 and only[0].record is None:
                raise only[0]  # no such file, format or option: a mistake in the command, not a row

    def findings(self, table: Table) -> Iterator[Finding]:
        """Records that cannot be read, and those that are too long or cannot be rendered."""
        if self.errors:
            examples = tuple(Example(error.record or "", note=str(error)) for error in self.errors[:MAX_EXAMPLES])
            yield Finding("unreadable_record", "error", len(self.errors), examples=examples)
        if self.ungrouped and self.settings.group_by != "group":  # a rule that was asked for
            examples = tuple(Example(table.record_ids[n], n) for n in self.ungrouped[:MAX_EXAMPLES])
            details = {"rule": self.settings.group_by, "total": table.num_records}
            yield Finding("ungrouped", "warning", len(self.ungrouped), examples=examples, details=details)
        if self.count_tokens is None:
            return
        has_fault = {number for number, _, _ in table.faults}
        other = [(number, message) for number, message in self.length_errors if number not in has_fault]
        if other:
            examples = tuple(Example(table.record_ids[n], n, note=message) for n, message in other[:MAX_EXAMPLES])
            yield Finding("not_rendered", "error", len(other), examples=examples)
        limit = self.settings.max_length
        lengths = np.array(self.lengths)
        too_long = np.flatnonzero(lengths > limit) if limit is not None else np.array([], dtype=np.int64)
        if len(too_long):
            longest = too_long[np.argsort(-lengths[too_long], kind="stable")][:MAX_EXAMPLES].tolist()
            examples = tuple(Example(table.record_ids[n], n, note=f"{lengths[n]} tokens") for n in longest)
            yield Finding(
                "too_long",
                "error",
                len(too_long),
                examples=examples,
                details={"limit": limit, "max": int(lengths.max())},
            )

    def token_counts(self) -> dict[str, float] | None:
        """Minimum, median, 95th percentile, maximum of the lengths and the limit; None when none were counted."""
        lengths = np.array(self.lengths)
        lengths = lengths[lengths >= 0]
        if not len(lengths):
            return None
        low, middle, high, largest = np.percentile(lengths, [0, 50, 95, 100])
        limit = self.settings.max_length
        counts = {"min": int(low), "median": float(middle), "p95": float(high), "max": int(largest)}
        return counts if limit is None else {**counts, "limit": limit}

    def _count(self, number: int, record: Record) -> None:
        assert self.count_tokens is not None
        try:
            self.lengths.append(self.count_tokens(record))
        except DataFormatError as error:
            self.lengths.append(-1)
            self.length_errors.append((number, str(error)))
