"""Makes one stored data set from any sources: read, check, divide, encode with all cores, write, compare the splits.

The order of everything written is that of the sources, whatever the number of workers. An interrupted run leaves
finished shards, and the next one goes on behind them.
"""

from __future__ import annotations

import copy
import time
from array import array
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2

from finetune.data.duplicates import WHAT, ImageIndex, assert_disjoint, describe
from finetune.data.parallel import ordered_map
from finetune.data.preparation.config import PrepareConfig, PrepareSource, check
from finetune.data.preparation.ledger import Entry, Ledger, read_ledger, write_rejected
from finetune.data.preparation.sources import Survey, iter_items, survey, with_synthesis
from finetune.data.preparation.work import file_stamp, work_on
from finetune.data.splits import SplitReport
from finetune.data.storage import SplitWriter, open_writer
from finetune.errors import ConfigError, DataFormatError
from finetune.progress import progress_bar
from finetune.schema import Record

_LEDGER_NAME = "ledger.jsonl"


@dataclass(frozen=True)
class Prepared:
    """What came of a preparation.

    Args:
        out_dir: the stored set.
        splits: realised division of what was read.
        written: records per split, over all runs of a resumed preparation.
        rejected: records that were left out; they stand in rejected.jsonl.
        overlaps: one line for everything that is in several splits.
        num_done_before: records an interrupted run had written.
        seconds: of this run.
    """

    out_dir: Path
    splits: SplitReport
    written: dict[str, int]
    rejected: int
    overlaps: tuple[str, ...]
    num_done_before: int
    seconds: float

    def lines(self) -> list[str]:
        """For the terminal: what was read and divided, what was wrong, what was written."""
        told = [*self.splits.lines(), *(f"warning: {warning}" for warning in self.splits.warnings)]
        told += [f"warning: in several splits: {overlap}" for overlap in self.overlaps[:10]]
        if len(self.overlaps) > 10:
            told.append(f"warning: and {len(self.overlaps) - 10} more in several splits")
        if self.rejected:
            told.append(
                f"warning: {self.rejected} records rejected; each with its reason in {self.out_dir / 'rejected.jsonl'}"
            )
        before = f", {self.num_done_before} of them by the interrupted run" if self.num_done_before else ""
        parts = ", ".join(f"{split} {count}" for split, count in self.written.items())
        told.append(
            f"{sum(self.written.values())} records written to {self.out_dir} ({parts}){before}; {self.seconds:.1f} s"
        )
        return told


def prepare(config: PrepareConfig, *, overwrite: bool = False, progress: bool = True) -> Prepared:
    """Make the set a configuration describes, or finish it where an earlier run was interrupted.

    With more than one worker the caller's script needs the usual `if __name__ == "__main__":` (processes are spawned).

    Args:
        config: what to make.
        overwrite: make splits again that are there already.
        progress: show bars on stderr.

    Raises:
        ConfigError: the configuration, or an output folder that holds something else.
        DataFormatError: with `on_error: stop` the first record that cannot be used; splits that are not disjoint; image
            or mask files of finished records that changed since the run that is continued.
    """
    start = time.monotonic()
    check(config)
    out_dir = Path(config.out_dir)
    sources = with_synthesis(config, progress)
    found = survey(config, sources, progress)
    if config.on_error == "stop" and found.first_error is not None:
        raise found.first_error
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                open_writer(
                    out_dir,
                    split,
                    config.storage,
                    config.images,
                    info=found.info,
                    shard_bytes=config.shard_megabytes * 2**20,
                    resume=not overwrite,
                    overwrite=overwrite,
                )
            )
            for split in config.splits.ratios
        }
        done_before = sum(writer.counts.records for writer in writers.values())
        ledger_path = out_dir / ".writing" / _LEDGER_NAME
        if all(writer.is_complete for writer in writers.values()):
            raise ConfigError(f"{out_dir} is complete already; pass --overwrite to make it again")
        with closing(Ledger(ledger_path, keep=lambda entry: _is_settled(entry, writers))) as ledger:
            _refuse_changed_files(config, sources, found, ledger_path)
            _write_all(config, sources, found, writers, ledger, progress)
        overlaps = _overlaps(config, ledger_path)
    rejected = write_rejected(ledger_path, out_dir)
    written = _written(writers)
    if sum(written.values()) + rejected != found.num_items:
        raise AssertionError(f"{found.num_items} records read, {sum(written.values())} written, {rejected} rejected")
    ledger_path.unlink()
    ledger_path.parent.rmdir()
    return Prepared(out_dir, found.report, written, rejected, overlaps, done_before, time.monotonic() - start)


def _write_all(
    config: PrepareConfig,
    sources: list[PrepareSource],
    found: Survey,
    writers: dict[str, SplitWriter],
    ledger: Ledger,
    progress: bool,
) -> None:
    """Work on every item that no finished shard accounts for, and write in order."""
    items = (item for item in iter_items(sources, found.splitter) if not _is_done(item.index, item.split, writers))
    work = partial(work_on, options=config.images)
    outcomes = ordered_map(work, items, config.workers, initializer=cv2.setNumThreads, initargs=(1,))
    with progress_bar(total=found.num_items, desc="prepare", unit="rec", disable=not progress) as bar:
        for outcome in outcomes:
            item = outcome.item
            bar.update(item.index + 1 - bar.n)  # those between, an interrupted run had done
            if outcome.error is not None:
                if config.on_error == "stop":
                    raise outcome.error
                ledger.add(Entry(item.index, item.split, item.id, error=outcome.error, stamp=outcome.stamp))
                continue
            assert isinstance(item.record, Record)
            ledger.add(Entry(item.index, item.split, item.id, item.record.group, None, outcome.prints, outcome.stamp))
            writers[item.split].write(item.record, outcome.payload, item.index)
        bar.update(found.num_items - bar.n)


def _refuse_changed_files(
    config: PrepareConfig, sources: list[PrepareSource], found: Survey, ledger_path: Path
) -> None:
    """The files of records that an interrupted run settled are those it looked at, by size and time of change.

    Without this a resumed set would mix old and new pictures in silence. Costs a look at each such file, and 8 bytes a
    record; nothing where nothing was settled.

    Raises:
        DataFormatError: some are not; says how many and names the first few.
    """
    stamps = array("q", bytes(8 * found.num_items))
    for entry in read_ledger(ledger_path):
        stamps[entry.index] = entry.stamp
    if not any(stamps):
        return
    changed: list[str] = []
    count = 0
    for item in iter_items(sources, copy.deepcopy(found.splitter)):
        if stamps[item.index] and isinstance(item.record, Record) and stamps[item.index] != file_stamp(item.record):
            count += 1
            changed += [f"{item.id} ({item.record.source})"] if len(changed) < 3 else []
    if count:
        raise DataFormatError(
            f"image or mask files of {count} finished records changed since the interrupted run (size or time of "
            f"change): {', '.join(changed)}{', ...' if count > len(changed) else ''}",
            source=Path(config.out_dir).name,
            expected="the files the run was begun with",
            fix="put them back with their times (cp -p, rsync -t), or pass --overwrite to start anew",
        )


def _is_done(index: int, split: str, writers: dict[str, SplitWriter]) -> bool:
    """Whether an item's record is in a finished shard, or was passed over before one."""
    return split in writers and (writers[split].is_complete or index < writers[split].next_source)


def _is_settled(entry: Entry, writers: dict[str, SplitWriter]) -> bool:
    """Whether an entry of an interrupted run holds: its record will not be looked at again."""
    return _is_done(entry.index, entry.split, writers)


def _written(writers: dict[str, SplitWriter]) -> dict[str, int]:
    return {split: writer.counts.records for split, writer in writers.items()}


def _overlaps(config: PrepareConfig, ledger_path: Path) -> tuple[str, ...]:
    """What is in several splits, in words; raises where that is an error (finished shards then stay for a resume)."""
    index = ImageIndex()
    for entry in read_ledger(ledger_path):
        for print_ in entry.prints:
            index.add(entry.id, entry.split, entry.group, print_)
    if config.splits.on_overlap == "error":
        assert_disjoint(index, config.splits.max_hash_distance)
    overlaps = index.overlaps(config.splits.max_hash_distance)
    return tuple(f"{WHAT[overlap.kind]}: {describe(index, overlap)}" for overlap in overlaps)
