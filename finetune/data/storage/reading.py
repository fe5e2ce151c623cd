"""Reads stored sets back: a Parquet file, several by a pattern, or a split of a folder with a manifest.

`prepared/train.jsonl` is an ordinary data file; `prepared/train-*.parquet` and `prepared/train` are understood here.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.storage.atomic import file_sha256
from finetune.data.storage.manifest import read_manifest
from finetune.data.storage.parquet import iter_rows
from finetune.errors import DataFormatError
from finetune.schema import Record

_SUFFIXES = (".parquet", ".jsonl")


def is_stored(path: str | os.PathLike[str]) -> bool:
    """Whether `iter_stored` is the reader for a path: see `stored_files`; an existing .jsonl file is not meant."""
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        return True
    if path.exists():
        return path.is_dir() and read_manifest(path) is not None
    if glob.has_magic(str(path)):
        return path.suffix.lower() in _SUFFIXES
    return _split_of_parent(path) is not None


def stored_splits(folder: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """The splits of a stored set and their files, in the manifest's order.

    Raises:
        DataFormatError: no manifest in the folder, or a damaged one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataFormatError(
            "no stored data set", source=folder.name, found=str(folder), expected="a folder with manifest.json"
        )
    return {
        name: [folder / str(shard["file"]) for shard in entry["shards"]] for name, entry in manifest["splits"].items()
    }


def stored_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files a path stands for.

    A file stands for itself and a pattern for what it matches, sorted; FOLDER/SPLIT for that split of a stored set, and
    FOLDER for its only split. A folder of several splits is refused, since training on all of them would include the
    test images.

    Raises:
        DataFormatError: nothing there, or a folder whose splits must be named.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        splits = stored_splits(path)
        if len(splits) != 1:
            raise DataFormatError(
                "folder holds several splits",
                source=path.name,
                found=str(path),
                expected=", ".join(splits),
                fix=f"name one of them, e.g. {path / next(iter(splits), 'train')}",
            )
        return next(iter(splits.values()))
    files = _split_of_parent(path)
    if files is None and glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path))) if Path(name).is_file()] or None
    if files is None:
        raise DataFormatError("data file not found", source=path.name, found=str(path), fix="check the path")
    return files


def stored_hash(path: str | os.PathLike[str]) -> str:
    """One SHA-256 of the files a path stands for; that of Parquet shards is taken from the manifest.

    Raises:
        DataFormatError: as `stored_files`.
    """
    digest = hashlib.sha256()
    for file in stored_files(path):
        manifest = read_manifest(file.parent) or {"splits": {}}
        shards = [shard for entry in manifest["splits"].values() for shard in entry["shards"]]
        known = {(shard["file"], shard["bytes"]): str(shard["sha256"]) for shard in shards}
        found = (
            known.get((file.name, file.stat().st_size)) if file.suffix == ".parquet" else None
        )  # JSONL may be edited
        digest.update((found or file_sha256(file)).encode())
    return digest.hexdigest()


def iter_stored(path: str | os.PathLike[str]) -> Iterator[tuple[str, str, Record | DataFormatError]]:
    """(position, source, record or the error of that row) of everything `stored_files(path)` names, in order.

    The position, like the source, is FILE#ROW or FILE:LINE, since the shards of a set have the same row numbers. Memory
    does not grow with the number of records. Images of Parquet files are container paths (containers.py).

    Raises:
        DataFormatError: a file is missing, damaged as a whole, or has other columns.
    """
    from finetune.data.readers.json_files import iter_objects  # here: the readers import this module

    for file in stored_files(path):
        if file.suffix.lower() == ".parquet":
            values = _rows(file)
        else:
            values = ((source, value) for _, source, value in iter_objects(file))
        for source, value in values:
            yield source, source, _record(value, source, str(file.parent))


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    for number, row in iter_rows(file):
        yield f"{file.name}#{number}", row


def _record(value: Any, source: str, root: str) -> Record | DataFormatError:
    """A native object by the rules of the `messages` reader, so that both storages are held to the same."""
    from finetune.data.readers.common import Item
    from finetune.data.readers.messages import MESSAGES

    if isinstance(value, DataFormatError):
        return value
    if not isinstance(value, dict):
        return DataFormatError("record is not an object", source=source, found=value, expected="{...}")
    record_id = value.get("id")
    if not isinstance(record_id, str) or not record_id.strip():
        return DataFormatError("stored record without an id", source=source, found=record_id)
    try:
        return MESSAGES.read(Item(value, record_id, source, root))
    except DataFormatError as error:
        return error


def _split_of_parent(path: Path) -> list[Path] | None:
    """The files of FOLDER/SPLIT; None where that is no split of a stored set."""
    if not path.name or not path.parent.is_dir() or read_manifest(path.parent) is None:
        return None
    return stored_splits(path.parent).get(path.name)
