"""Reads data sets in every accepted format into `Record`s, one at a time; the formats are documented in data/README.md.

To add a format: one module with a `Reader` (one JSON object, one record) and a `READERS` entry, or with a function over
a whole file or folder and a `FORMATS` entry. Images are not decoded here, except masks that must become polygons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from finetune.data.readers.annotation import ANNOTATION
from finetune.data.readers.coco import COCO_OPTIONS, is_coco, read_coco
from finetune.data.readers.common import Item, Reader
from finetune.data.readers.conversations import CONVERSATIONS
from finetune.data.readers.file_tree import iter_files
from finetune.data.readers.folder import FOLDER_OPTIONS, read_folder, read_layout
from finetune.data.readers.instruction import INSTRUCTION
from finetune.data.readers.json_files import JSON_SUFFIXES, iter_objects, load_json, top_level
from finetune.data.readers.labelme import LABELME_OPTIONS, is_labelme, read_labelme, read_labelme_folder
from finetune.data.readers.mask_options import MaskOptions, read_mask_options
from finetune.data.readers.messages import MESSAGES
from finetune.data.readers.options import COMMON_OPTIONS, Options
from finetune.data.readers.pairs import PAIRS, is_pair
from finetune.data.readers.table import TABLE_OPTIONS, TABLE_SUFFIXES, read_table
from finetune.errors import DataFormatError
from finetune.schema import Record

__all__ = [
    "FORMATS",
    "READERS",
    "Item",
    "Reader",
    "data_root",
    "detect_format",
    "iter_records",
    "read_records",
    "scan_records",
]

Entries = Iterator[tuple[str, str, Record | DataFormatError]]
"""(position, source, record or what is wrong there)"""

# The order decides where a record has the keys of several formats: the more telling key first.
READERS: dict[str, Reader] = {
    "conversations": CONVERSATIONS,
    "instruction": INSTRUCTION,
    "annotation": ANNOTATION,
    "pairs": PAIRS,
    "messages": MESSAGES,
}


REPORT_OPTIONS = (
    *("id_column", "image_column", "group_column", "fields", "optional", "level_field", "levels", "level_map"),
    *("template", "encoding", "delimiter"),
)
"""Those of `finetune.data.reports.settings.ReportSettings`, which imports the readers (a test holds them together)."""


@dataclass(frozen=True)
class Format:
    """A format that is a whole file or folder.

    Args:
        read: from path, data root and options.
        options: those it takes beside `COMMON_OPTIONS`.
    """

    read: Callable[[Path, str, Options], Entries]
    options: tuple[str, ...] = ()


def _read_coco(path: Path, root: str, options: Options) -> Entries:
    return read_coco(load_json(path), path, root, options)


def _read_labelme(path: Path, root: str, options: Options) -> Entries:
    if path.is_dir():
        return read_labelme_folder(path, root, options)
    return read_labelme(load_json(path), path, root, options)


def _read_folder(path: Path, root: str, options: Options) -> Entries:
    if not path.is_dir():
        raise DataFormatError("not a folder", source=path.name, found=str(path), fix="check the path")
    return read_folder(path, read_layout(path, options))


def _read_stored(path: Path, root: str, options: Options) -> Entries:
    from finetune.data.storage import iter_stored  # imports the readers

    return iter_stored(path)


def _read_reports(path: Path, root: str, options: Options) -> Entries:
    from finetune.data.reports.table import read_reports  # imports the readers

    return read_reports(path, root, options)


FORMATS: dict[str, Format] = {
    "table": Format(read_table, TABLE_OPTIONS),
    "coco": Format(_read_coco, COCO_OPTIONS),
    "labelme": Format(_read_labelme, LABELME_OPTIONS),
    "folder": Format(_read_folder, FOLDER_OPTIONS),
    "stored": Format(_read_stored),
    "reports": Format(_read_reports, REPORT_OPTIONS),
}


def iter_records(
    path: str | os.PathLike[str],
    format: str = "auto",
    root: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    formats: set[str] | None = None,
) -> Iterator[Record | DataFormatError]:
    """Every record of a file or folder, or the error in its place, in file order; at least one of either.

    Lines of a .jsonl or .csv file, entries of a .json list and stored sets are read one by one: memory holds one record
    and an 8-byte hash of each id.

    Args:
        path: .json, .jsonl, .ndjson, .csv, .tsv or .parquet, a folder, or a stored set's `FOLDER/SPLIT`.
        format: a key of `READERS` or `FORMATS`, or "auto".
        root: folder that relative image and mask paths start from; the file's own folder by default.
        options: of the format, see data/README.md.
        formats: receives the key of `READERS` or `FORMATS` of what was read, several where a JSON file mixes them; a
            recognised public set as `folder: casia2`.
    """
    path = Path(path)
    given = Options(options or {}, path.name)
    first_position: dict[int, str] = {}
    is_empty = True
    try:
        entries, masks = _open(path, format, root, given, set() if formats is None else formats)
        for position, source, record in entries:
            is_empty = False
            if isinstance(record, DataFormatError):
                yield record
                continue
            first = first_position.setdefault(hash(record.id), position)
            if first != position:
                yield DataFormatError(
                    "id used twice",
                    record=record.id,
                    source=source,
                    found=f"also at {first.join(source.rsplit(position, 1)) if position in source else first}",
                    fix="give every record its own id, or none",
                )
                continue
            try:
                result: Record | DataFormatError = masks.apply(record)
            except DataFormatError as error:
                result = error
            yield result
        if is_empty:
            raise DataFormatError("empty data set", source=path.name, found=str(path), expected="at least one record")
    except OSError as error:
        yield DataFormatError(f"data set cannot be read ({error.strerror})", source=path.name, found=str(path))
    except DataFormatError as error:
        yield error


def read_records(
    path: str | os.PathLike[str],
    format: str = "auto",
    root: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Record]:
    """All records of a file or folder, in file order; never empty. Arguments as for `iter_records`.

    Raises:
        DataFormatError: the first thing that cannot be used.
    """
    records = []
    for record in iter_records(path, format, root, options):
        if isinstance(record, DataFormatError):
            raise record
        records.append(record)
    return records


def scan_records(
    path: str | os.PathLike[str],
    format: str = "auto",
    root: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Record], list[DataFormatError]]:
    """Like `read_records`, but reads on after an error: the good records, and every error in file order."""
    records: list[Record] = []
    errors: list[DataFormatError] = []
    for record in iter_records(path, format, root, options):
        if isinstance(record, DataFormatError):
            errors.append(record)
        else:
            records.append(record)
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


def _open(
    path: Path, format: str, root: str | os.PathLike[str] | None, options: Options, formats: set[str]
) -> tuple[Entries, MaskOptions]:
    """The entries of a data set, not yet read, and what is done to their masks; `formats` receives what they are."""
    if format != "auto" and format not in READERS and format not in FORMATS:
        expected = f"auto, {', '.join((*READERS, *FORMATS))}"
        raise DataFormatError("unknown format", source=path.name, found=format, expected=expected)
    root_dir = data_root(path, root)
    value = None  # of a .json file that had to be parsed to know what it is
    kind = format
    if format == "auto":
        kind, value = _kind(path, options)
    own = FORMATS[kind].options if kind in FORMATS else ()
    options.check_names((*COMMON_OPTIONS, *own), kind if kind in FORMATS else "JSON objects")
    masks = read_mask_options(options)
    if kind in FORMATS and kind != "folder":
        formats.add(kind)
    if kind == "folder" and path.is_dir():  # a public set's own convention, unless the user says otherwise
        layout = read_layout(path, options)
        formats.add(f"folder: {layout.preset}" if layout.preset else "folder")
        masks = replace(masks, convention=masks.convention or layout.mask_convention)
        if "mask_pixels" not in options.values:
            masks = replace(masks, pixels=layout.mask_pixels)
    if value is not None and kind in ("coco", "labelme"):
        read = read_coco if kind == "coco" else read_labelme
        return read(value, path, root_dir, options), masks
    if kind in FORMATS:
        return FORMATS[kind].read(path, root_dir, options), masks
    return _read_objects(path, root_dir, kind, formats), masks


def _kind(path: Path, options: Options) -> tuple[str, Any]:
    """The key of `FORMATS` a path calls for, or "auto" where each JSON object tells its own format; the file's value
    if it had to be parsed."""
    suffix = path.suffix.lower()
    if "preset" in options.values:
        return "folder", None
    if suffix in TABLE_SUFFIXES:
        return "table", None
    if path.is_file() and suffix in JSON_SUFFIXES:
        if suffix == ".json" and top_level(path) == "{":
            value = load_json(path)
            return "coco" if is_coco(value) else "labelme" if is_labelme(value) else "auto", value
        return "auto", None
    from finetune.data.storage import is_stored  # imports the readers

    if is_stored(path):
        return "stored", None
    if not path.is_dir():
        return "auto", None
    first_json = next(iter_files(path, (".json",)), None)
    return "labelme" if first_json and _is_labelme_file(path / first_json) else "folder", None


def _is_labelme_file(path: Path) -> bool:
    try:
        return top_level(path) == "{" and is_labelme(load_json(path))
    except DataFormatError:  # damaged: the folder reader says what it expects instead
        return False


def _read_objects(path: Path, root: str, format: str, formats: set[str]) -> Entries:
    for position, source, value in iter_objects(path):
        try:
            if isinstance(value, DataFormatError):
                raise value
            name, record = _read_one(value, f"{path.stem}:{position}", source, root, format)
            formats.add(name)
            yield position, source, record
        except DataFormatError as error:
            yield position, source, error
        except RecursionError:
            yield position, source, DataFormatError("lists nested too deeply", source=source, fix="repair or remove it")


def _read_one(value: Any, default_id: str, source: str, root: str, format: str) -> tuple[str, Record]:
    """The key of `READERS` that fits, and the record."""
    if is_pair(value) and format in ("auto", "pairs"):
        return "pairs", PAIRS.read(Item({"pair": value}, default_id, source, root))
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
    return name, READERS[name].read(item)


def data_root(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> str:
    """The folder that a data set's relative paths start from: `root`, else the set's own folder.

    Raises:
        DataFormatError: `root` is no folder.
    """
    path = Path(path)
    if root is None:
        return str(path if path.is_dir() else path.parent)
    if not Path(root).is_dir():
        raise DataFormatError("data root is not a folder", source=path.name, found=str(root), fix="check the path")
    return str(root)
