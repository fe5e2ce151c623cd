"""One part of a JSONL set: a line per record, its image and mask files beside it, and a list of their hashes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from finetune.data.storage.atomic import TEMPORARY_SUFFIX, file_sha256, write_atomically

LIST_SUFFIX = ".sha256"


class JsonlPartWriter:
    """Streams lines into one file and writes the files they name.

    Args:
        path: of the lines, NAME.jsonl.tmp; the hashes go to NAME.sha256.tmp, as `sha256sum` writes them.
        out_dir: folder of the set, which file names are relative to.
    """

    def __init__(self, path: Path, out_dir: Path) -> None:
        self.path, self.list_path = path, path.with_suffix("").with_suffix(LIST_SUFFIX + TEMPORARY_SUFFIX)
        self._out_dir = out_dir
        self._folders: set[Path] = set()
        self._lines: BinaryIO = path.open("wb")
        self._list: BinaryIO = self.list_path.open("wb")

    def add(self, line: str, files: Sequence[tuple[str, bytes]]) -> None:
        """Write the files (name relative to the set, bytes), then the line that names them."""
        for name, data in files:
            path = self._out_dir / name
            if path.parent not in self._folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders = {path.parent, *list(self._folders)[:8]}
            write_atomically(path, [data], is_durable=False)
            self._list.write(f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode())
        self._lines.write(line.encode() + b"\n")

    def close(self) -> None:
        """Finish both files.

        Raises:
            OSError: the disk is full.
        """
        self._lines.close()
        self._list.close()

    def abort(self) -> None:
        """Throw both files away; image files of unfinished parts are removed when the set is continued."""
        for stream, path in ((self._lines, self.path), (self._list, self.list_path)):
            with contextlib.suppress(OSError):  # writes out what is buffered, which fails again on a full disk
                stream.close()
            path.unlink(missing_ok=True)


def wrong_files(list_path: Path, out_dir: Path, *, use_hashes: bool) -> Iterator[str]:
    """Names in a list of hashes whose file is gone or, with `use_hashes`, has other bytes."""
    with list_path.open(encoding="utf-8") as stream:
        for line in stream:
            digest, _, name = line.rstrip("\n").partition("  ")
            path = out_dir / name
            if not path.is_file() or (use_hashes and file_sha256(path) != digest):
                yield name or list_path.name
