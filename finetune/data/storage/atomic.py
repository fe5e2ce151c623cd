"""Files that appear whole or not at all: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, pieces: Iterable[bytes], *, is_durable: bool = True) -> None:
    """Write a file that readers see only once it is complete.

    Args:
        pieces: its bytes, in order.
        is_durable: wait until the disk has it; False for the many small files of a set.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left under either name.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            if is_durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if is_durable:
        flush_folder(path.parent)


def move_durably(temporary: Path, path: Path) -> None:
    """Give a complete file its final name, its bytes and its name flushed to the disk first and last.

    Raises:
        OSError: as `write_atomically`.
    """
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can (Windows cannot open folders)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    for piece in file_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def file_pieces(path: Path) -> Iterable[bytes]:
    """The bytes of a file, a megabyte at a time."""
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            yield piece
