"""What became of each source record, kept beside an unfinished set: which were rejected and why, what they picture.

A resumed run reads it again, so that rejected records are still listed and pictures of finished shards still compared.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.fingerprints import Fingerprint
from finetune.data.storage.atomic import write_atomically
from finetune.errors import DataFormatError, shorten

REJECTED_NAME = "rejected.jsonl"


@dataclass(frozen=True)
class Entry:
    """One record that was looked at.

    Args:
        index: its number among all source records, from 0.
        split: where it belongs; "" where that is not known.
        id, group: of the record.
        error: why it was rejected (the fields of a `DataFormatError`), None where it was written.
        prints: fingerprint of each image.
        stamp: `work.file_stamp` of the record when it was looked at, 0 where it had no files to look at.
    """

    index: int
    split: str
    id: str
    group: str = ""
    error: DataFormatError | dict[str, Any] | None = None
    prints: tuple[Fingerprint, ...] = ()
    stamp: int = 0


class Ledger:
    """An append-only file of entries.

    Args:
        path: the file; its folder is there.
        keep: which entries of an earlier run hold; the others belong to records that will be looked at again.
    """

    def __init__(self, path: Path, keep: Callable[[Entry], bool]) -> None:
        self.path = path
        kept = (entry for entry in read_ledger(path) if keep(entry)) if path.is_file() else iter(())
        write_atomically(path, (_line(entry).encode() for entry in kept), is_durable=False)
        self._stream = path.open("a", encoding="utf-8")

    def add(self, entry: Entry) -> None:
        """Append one; it outlives this process being killed."""
        self._stream.write(_line(entry))
        self._stream.flush()

    def close(self) -> None:
        """Close the file; it stays."""
        self._stream.close()


def read_ledger(path: Path) -> Iterator[Entry]:
    """The entries of a ledger in order; a last line that was cut off is left out (its record is looked at again)."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if not line.endswith("\n"):
                return
            fields = json.loads(line)
            prints = tuple(
                Fingerprint(bytes.fromhex(sha256), phash, base64.b64decode(thumbnail))
                for sha256, phash, thumbnail in fields.pop("prints")
            )
            yield Entry(**fields, prints=prints)


def write_rejected(path: Path, out_dir: Path) -> int:
    """Write `rejected.jsonl`, one line per rejected record in the order of the sources; returns how many there are.

    A line holds `index`, `id`, `split`, and of the error `problem`, `source` (file and line), `field`, `found`,
    `expected`, `fix` and the whole `message`. Without any there is no file.
    """
    rejected = sorted((entry for entry in read_ledger(path) if entry.error is not None), key=lambda entry: entry.index)
    target = out_dir / REJECTED_NAME
    target.unlink(missing_ok=True)
    if rejected:
        lines = (
            json.dumps({"index": e.index, "id": e.id, "split": e.split or None, **(e.error or {})}, ensure_ascii=False)  # type: ignore[dict-item]
            for e in rejected
        )
        write_atomically(target, ((line + "\n").encode() for line in lines))
    return len(rejected)


def described(error: DataFormatError) -> dict[str, Any]:
    """The fields of an error and its whole message, for JSON."""
    fields = {name: getattr(error, name) for name in ("problem", "source", "field", "expected", "fix")}
    found = None if error.found is None else shorten(error.found)
    return {**fields, "found": found, "message": str(error)}


def _line(entry: Entry) -> str:
    prints = [(p.sha256.hex(), p.phash, base64.b64encode(p.thumbnail).decode()) for p in entry.prints]
    error = described(entry.error) if isinstance(entry.error, DataFormatError) else entry.error
    fields = {"index": entry.index, "split": entry.split, "id": entry.id, "group": entry.group, "error": error}
    return json.dumps({**fields, "stamp": entry.stamp, "prints": prints}, ensure_ascii=False) + "\n"
