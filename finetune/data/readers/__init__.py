"""Reads data sets in every accepted JSON format into `Record`s; the formats are documented in data/README.md.

To add a format: one module with a `Reader`, one `READERS` entry. Images and masks are not opened here.
"""

from __future__ import annotations

import os
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from finetune.data.readers.annotation import ANNOTATION
from finetune.data.readers.common import Item, Reader
from finetune.data.readers.conversations import CONVERSATIONS
from finetune.data.readers.instruction import INSTRUCTION
from finetune.data.readers.json_files import iter_objects
from finetune.data.readers.messages import MESSAGES
from finetune.errors import DataFormatError
from finetune.schema import Record

__all__ = ["READERS", "Item", "Reader", "detect_format", "read_records", "scan_records"]

# The order decides where a record has the keys of several formats: the more telling key first.
READERS: dict[str, Reader] = {
    "conversations": CONVERSATIONS,
    "instruction": INSTRUCTION,
    "annotation": ANNOTATION,
    "messages": MESSAGES,
}


def read_records(
    path: str | os.PathLike[str], format: str = "auto", root: str | os.PathLike[str] | None = None
) -> list[Record]:
    """All records of a .json or .jsonl file, in file order; never empty.

    Args:
        path: UTF-8 file, with or without BOM: a JSON list, an object holding one list, or one object per line.
        format: a key of `READERS`, or "auto" to decide record by record.
        root: folder that relative image and mask paths start from; the file's own folder by default.

    Raises:
        DataFormatError: the first thing in the file that cannot be used.
    """
    records, errors = scan_records(path, format, root)
    if errors:
        raise errors[0]
    return records


def scan_records(
    path: str | os.PathLike[str], format: str = "auto", root: str | os.PathLike[str] | None = None
) -> tuple[list[Record], list[DataFormatError]]:
    """Like `read_records`, but reads on after an error: the good records, and every error in file order."""
    path = Path(path)
    records: list[Record] = []
    errors: list[DataFormatError] = []
    first_source: dict[str, str] = {}
    try:
        root_dir = _root_dir(path, root)
        if format != "auto" and format not in READERS:
            raise DataFormatError(
                "unknown format", source=path.name, found=format, expected=f"auto, {', '.join(READERS)}"
            )
        for position, source, value in iter_objects(path):
            try:
                if isinstance(value, DataFormatError):
                    raise value
                record = _read_one(value, f"{path.stem}:{position}", source, root_dir, format)
                if record.id in first_source:
                    raise DataFormatError(
                        "id used twice",
                        record=record.id,
                        source=source,
                        found=f"also at {first_source[record.id]}",
                        fix="give every record its own id, or none",
                    )
                first_source[record.id] = source
                records.append(record)
            except DataFormatError as error:
                errors.append(error)
            except RecursionError:
                errors.append(DataFormatError("lists nested too deeply", source=source, fix="repair or remove it"))
        if not records and not errors:
            raise DataFormatError("empty data set", source=path.name, found=str(path), expected="at least one record")
    except DataFormatError as error:
        errors.append(error)
    return records, errors


def detect_format(item: Item) -> str:
    """The key of `READERS` whose required keys a raw record has.

    Raises:
        DataFormatError: none fits; names the nearest format and what it lacks.
    """
    keys = {key for key, value in item.fields.items() if value is not None}
    if {"messages", "conversations"} <= keys:
        raise item.error("both 'messages' and 'conversations'", fix="keep one of them")
    is_native = "messages" in keys  # `messages` beside `image_path` is a conversation about that image
    for name, reader in READERS.items():
        if not reader.missing(keys) and not (is_native and name == "annotation"):
            return name
    nearest = max(READERS, key=lambda name: _likeness(READERS[name], keys))
    raise item.error(
        "no known format has these fields",
        found=sorted(keys),
        expected=f"for the nearest one, '{nearest}': {READERS[nearest].example}",
        fix="add or rename the fields (data/README.md lists all formats)",
    )


def _likeness(reader: Reader, keys: set[str]) -> float:
    """How near the keys come to a format: best similarity of any key to each required one, averaged."""
    best = [
        max((SequenceMatcher(None, key.lower(), name).ratio() for key in keys for name in need.split("|")), default=0.0)
        for need in reader.required
    ]
    return sum(best) / len(best)


def _read_one(value: Any, default_id: str, source: str, root: str, format: str) -> Record:
    if not isinstance(value, dict):
        raise DataFormatError(
            "record is not an object",
            record=default_id,
            source=source,
            found=value,
            expected="{...}",
            fix="name the file .json if it is one list" if isinstance(value, list) else None,
        )
    item = Item(value, default_id, source, root)
    if value.get("id") is not None:
        raw_id = value["id"]
        if isinstance(raw_id, int) and not isinstance(raw_id, bool):
            raw_id = str(raw_id)
        if not item.text(raw_id, "id").strip():
            raise item.error("empty id", field="id", found=raw_id, fix="give a name, or leave the field out")
        item = Item(value, raw_id, source, root)
    name = detect_format(item) if format == "auto" else format
    missing = READERS[name].missing({key for key, entry in value.items() if entry is not None})
    if missing:
        raise item.error(f"format '{name}' needs '{missing[0]}'", found=sorted(value), expected=READERS[name].example)
    return READERS[name].read(item)


def _root_dir(path: Path, root: str | os.PathLike[str] | None) -> str:
    if root is None:
        return str(path.parent)
    if not Path(root).is_dir():
        raise DataFormatError("data root is not a folder", source=path.name, found=str(root), fix="check the path")
    return str(root)
