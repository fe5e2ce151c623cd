"""Container paths: an image or mask embedded in a Parquet file, named by an ordinary path string.

`/data/train-00000.parquet#12/images/0` is the first image of row 12 (rows and indices from 0); masks likewise. Nothing
is decoded here and nothing is written (storage/ does that). pyarrow is imported when the first container is opened.
"""

from __future__ import annotations

import bisect
import os
import re
import threading
from collections import OrderedDict
from typing import Any, Literal

from finetune.errors import DataFormatError

Kind = Literal["images", "masks"]

_MAX_OPEN_FILES = 4
_PATH = re.compile(r"(.+\.parquet)#([0-9]+)/(images|masks)/([0-9]+)", re.DOTALL | re.IGNORECASE)
_local = threading.local()


def is_embedded(path: str) -> bool:
    """Whether a path names an image or mask inside a container file."""
    return _PATH.fullmatch(path) is not None


def backing_file(path: str) -> str:
    """The file on disk that holds what `path` names: the container of a container path, else the path itself."""
    match = _PATH.fullmatch(path)
    return path if match is None else match[1]


def container_path(file: str | os.PathLike[str], row: int, kind: Kind, index: int) -> str:
    """The path of the `index`-th image or mask in a row of a Parquet file."""
    return f"{os.fspath(file)}#{row}/{kind}/{index}"


def read_embedded(path: str) -> bytes:
    """The encoded bytes that a container path names.

    A few files and their last row group stay open per process and thread, so nearby rows cost no second read. A process
    that was forked, and a file that was replaced, are noticed.

    Raises:
        DataFormatError: no such file, row or image, or a damaged file; names neither record nor field, the caller does.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"not a container path: {path!r}")
    file, row, kind, index = match[1], int(match[2]), match[3], int(match[4])
    import pyarrow as pa

    try:
        opened = _open_container(file)
        data = opened.read(row, kind, index)
    except FileNotFoundError as error:
        raise DataFormatError("Parquet file not found", found=path, fix="check the path") from error
    except LookupError as error:
        raise DataFormatError(
            f"no such image in the Parquet file ({error.args[0]})", found=path, fix="read the data set again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(
            f"Parquet file is truncated or damaged ({first_line(error)})",
            found=path,
            fix="copy or make the file again",
        ) from error
    if data is None:
        raise DataFormatError("no bytes are embedded here", found=path, fix="make the file again with its images")
    return data


def first_line(error: Exception) -> str:
    """The first line of an error's text, cut to fit into another message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class _Container:
    """One open Parquet file, where its row groups start, and the row group that was read last."""

    def __init__(self, file: str) -> None:
        import pyarrow.parquet as pq

        # Not memory-mapped: pages of the map would count as this process's memory. Checksums find flipped bits.
        self.file = pq.ParquetFile(file, memory_map=False, pre_buffer=False, page_checksum_verification=True)
        metadata = self.file.metadata
        self.ends: list[int] = []
        total = 0
        for group in range(metadata.num_row_groups):
            total += metadata.row_group(group).num_rows
            self.ends.append(total)
        self.group = -1
        self.table: Any = None

    def read(self, row: int, kind: str, index: int) -> bytes | None:
        """Bytes of one struct {bytes, path}; None where nothing is embedded. LookupError past the end."""
        group = bisect.bisect_right(self.ends, row)
        if group == len(self.ends):
            raise LookupError(f"row {row} of {self.ends[-1] if self.ends else 0}")
        if group != self.group:
            # use_threads=False: Arrow's thread pool does not survive a fork, and DataLoader workers are forked.
            table = self.file.read_row_group(group, columns=["images", "masks"], use_threads=False)
            self.group, self.table = group, table
        if kind not in self.table.column_names:
            raise LookupError(f"no column '{kind}'")
        cells = self.table.column(kind)[row - (self.ends[group] - self.table.num_rows)].values
        if cells is None or index >= len(cells):
            raise LookupError(f"{kind}[{index}] of {0 if cells is None else len(cells)}")
        cell = cells[index].as_py()
        if cell is None:
            return None
        if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes | None):
            raise LookupError(f"column '{kind}' holds no bytes")
        return cell.get("bytes")


def _open_container(file: str) -> _Container:
    """The open file from this thread's cache of the last few."""
    status = os.stat(file)
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if getattr(_local, "pid", None) != os.getpid():  # never use a handle inherited through a fork
        _local.pid, _local.files = os.getpid(), OrderedDict()
    files: OrderedDict[str, tuple[tuple[int, int, int], _Container]] = _local.files
    if file in files and files[file][0] == stamp:
        files.move_to_end(file)
        return files[file][1]
    files.pop(file, None)
    opened = _Container(file)
    files[file] = (stamp, opened)
    while len(files) > _MAX_OPEN_FILES:
        files.popitem(last=False)
    return opened
