"""A set under construction: a hidden folder beside its final place and a journal of finished samples.

The folder is named by everything that decides its content, so that an interrupted run goes on where it stopped and
nothing of another run is mixed in. What a killed process left half done is found by the hashes in the journal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.data.synthesis.image_files import write_whole

logger = logging.getLogger(__name__)

_JOURNAL = "journal.jsonl"

Entry = dict[str, Any]
"""`{"record": ..., "sha256": {path relative to the set's folder: hash}}` of one finished sample."""


class PartialSet:
    """The folder and its journal.

    Args:
        out_dir: where the set will be.
        content: JSON that decides every byte of the set; its hash names the folder.
    """

    def __init__(self, out_dir: Path, content: object) -> None:
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        self._prefix = f".{out_dir.name}.partial-"
        self.root = out_dir.parent / f"{self._prefix}{digest}"
        self.out_dir = out_dir

    def open(self, ids: Sequence[str], folders: Sequence[str]) -> int:
        """Make the folder ready and say how many samples at the beginning of the set are finished.

        Folders of interrupted runs with another content are removed, with a message. Files that no finished sample owns
        are removed.

        Args:
            ids: of all samples in order.
            folders: to be made.
        """
        for other in sorted(self.out_dir.parent.glob(f"{self._prefix}*")):
            if other != self.root and (other / _JOURNAL).is_file():
                kept = sum(1 for _ in (other / _JOURNAL).open(encoding="utf-8"))
                logger.warning(
                    "removed %s: %d samples of an interrupted run with another configuration", other.name, kept
                )
                shutil.rmtree(other)
        for folder in folders:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        return self._keep_finished(ids, folders)

    def _keep_finished(self, ids: Sequence[str], folders: Sequence[str]) -> int:
        finished, owned = 0, {_JOURNAL}
        temporary = self.root / f"{_JOURNAL}.tmp"
        with temporary.open("w", encoding="utf-8") as kept:
            for entry in self.entries():
                if finished == len(ids) or entry["record"]["id"] != ids[finished] or not self._is_whole(entry):
                    break
                kept.write(_line(entry))
                owned |= set(entry["sha256"])
                finished += 1
        temporary.replace(self.root / _JOURNAL)
        for path in [*self.root.iterdir(), *(path for folder in folders for path in (self.root / folder).iterdir())]:
            if path.is_file() and path.relative_to(self.root).as_posix() not in owned:
                path.unlink()
        return finished

    def _is_whole(self, entry: Entry) -> bool:
        for name, expected in entry["sha256"].items():
            path = self.root / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                return False
        return True

    def entries(self) -> Iterator[Entry]:
        """The journal's samples in order, up to a line that was torn."""
        path = self.root / _JOURNAL
        if not path.is_file():
            return
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # the process was killed while it wrote this line
                    return

    def add(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """Note finished samples as they come, each at once."""
        with (self.root / _JOURNAL).open("a", encoding="utf-8") as journal:
            for entry in entries:
                journal.write(_line(entry))
                journal.flush()
                yield entry

    def write_lines(self, name: str, values: Iterator[object]) -> str:
        """Write a JSONL file and return its sha256."""
        digest = hashlib.sha256()
        with (self.root / name).open("wb") as file:
            for value in values:
                line = _line(value).encode()
                file.write(line)
                digest.update(line)
        return digest.hexdigest()

    def write_json(self, name: str, value: object) -> None:
        """Write an indented JSON file."""
        write_whole(self.root / name, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())

    def publish(self) -> None:
        """Put the finished set in its place; an earlier one there goes only once the new one is complete."""
        (self.root / _JOURNAL).unlink()
        old = self.out_dir.with_name(f".{self.out_dir.name}.old-{os.getpid()}")
        if self.out_dir.exists():
            self.out_dir.rename(old)
        self.root.rename(self.out_dir)
        for replaced in self.out_dir.parent.glob(f".{self.out_dir.name}.old-*"):  # also one whose removal was cut short
            shutil.rmtree(replaced)

    def drop_if_empty(self) -> int:
        """After an interruption: how many samples are kept; a folder without any is removed."""
        finished = sum(1 for _ in self.entries())
        if not finished:
            shutil.rmtree(self.root, ignore_errors=True)
        return finished


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
