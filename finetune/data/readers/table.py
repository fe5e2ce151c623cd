"""Format `table`: CSV or TSV with a header; rows are read one at a time. A row is an image with its targets (an
`annotation` object), and a conversation too where there is a column of questions or of messages as JSON text.

UTF-8 with or without BOM, GBK/GB18030 and UTF-16 with BOM are told apart by decoding the file once before it is read:
what is valid UTF-8 is UTF-8, else what is valid GB18030 is that. Other encodings need `options.encoding`.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.readers.annotation import ANNOTATION
from finetune.data.readers.common import Item, build_record, read_images, read_turns
from finetune.data.readers.options import Options
from finetune.errors import DataFormatError
from finetune.schema import Record, Turn
from finetune.special_tokens import IMAGE_PLACEHOLDER

TABLE_SUFFIXES = (".csv", ".tsv")
TABLE_OPTIONS = ("columns", "encoding", "delimiter", "label_map")
_DELIMITERS = (",", "\t", ";", "|")
_COLUMNS = {
    "image_path": (
        *("image_path", "image", "img", "img_path", "path", "file", "file_name", "filename"),
        *("图像", "图片", "图像路径", "图片路径"),
    ),
    "mask_path": ("mask_path", "mask", "gt", "gt_path", "掩膜", "掩码", "掩膜路径", "掩码路径"),
    "label": ("label", "labels", "标签"),
    "id": ("id", "image_id", "编号"),
    "group": ("group", "分组"),
    "evidence": ("evidence", "依据", "判断依据"),
    "messages": ("messages", "conversations", "对话"),
    "question": ("question", "prompt", "instruction", "问题", "提问", "指令"),
    "answer": ("answer", "output", "回答", "答案"),
}
_CONVERSATION = ("messages", "question", "answer")


@dataclass(frozen=True)
class _Table:
    """How one file is read.

    Args:
        header: column names as they stand.
        columns: field of a record -> index of its column.
        label_map: text in the label column -> 0 or 1.
    """

    header: list[str]
    columns: dict[str, int]
    label_map: dict[str, Any]


def read_table(path: Path, root: str, options: Options) -> Iterator[tuple[str, str, Record | DataFormatError]]:
    """(line, source, record or error) of every row; blank lines are skipped, a damaged row is an error in its place.

    Raises:
        DataFormatError: no file, unknown encoding, no usable header.
    """
    image_names = {*_COLUMNS["image_path"], str(options.mapping("columns").get("image_path", ""))}
    rows = iter_rows(path, options, image_names)
    header = next(rows, None)
    if header is None:
        return
    assert not isinstance(header[2], DataFormatError)
    table = _read_header(header[2], path.name, options)
    for line, source, row in rows:
        if isinstance(row, DataFormatError):
            yield line, source, row
            continue
        try:
            yield line, source, _read_row(row, table, f"{path.stem}:{line}", source, root)
        except DataFormatError as error:
            yield line, source, error


def iter_rows(
    path: Path, options: Options, image_names: Collection[str]
) -> Iterator[tuple[str, str, list[str] | DataFormatError]]:
    """(line, source, cells or what is wrong) of the header and then of every row that is not blank.

    Args:
        options: `encoding` and `delimiter` are read.
        image_names: columns of which the header has one, by which the delimiter is recognised.

    Raises:
        DataFormatError: no file, unknown encoding, a damaged header.
    """
    encoding = _encoding(path, options)
    with path.open(encoding=encoding, newline="") as stream:
        delimiter = _delimiter(path, stream.readline(), options, image_names)
        stream.seek(0)
        rows = _rows(csv.reader(stream, delimiter=delimiter, strict=True), path.name)
        header = next(rows, None)
        if header is None:
            return
        if isinstance(header[2], DataFormatError):
            raise header[2]
        yield header
        yield from rows


def check_width(row: Sequence[str], header: Sequence[str], record: str, source: str) -> None:
    """A row has a cell for every column of the header and nothing behind them.

    Raises:
        DataFormatError: it has not.
    """
    if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
        raise DataFormatError(
            f"row of {len(row)} cells under a header of {len(header)}",
            record=record,
            source=source,
            found=row,
            fix="put cells that hold the delimiter in double quotes, and write all of them",
        )


def text_encoding(path: Path) -> str:
    """Name of the encoding of a text file: UTF-8 with or without BOM, GB18030, or UTF-16 with BOM.

    Raises:
        DataFormatError: no file, or none of them.
    """
    return _encoding(path, Options({}, path.name))


def _encoding(path: Path, options: Options) -> str:
    """Name of the first encoding that decodes the whole file."""
    if not path.is_file():
        raise DataFormatError("data file not found", source=path.name, found=str(path), fix="check the path")
    try:
        chosen = options.text("encoding", "auto")
        with path.open("rb") as stream:
            start = stream.read(4)
        if chosen != "auto":
            candidates = [codecs.lookup(chosen).name]
        elif start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            candidates = ["utf-16"]
        else:
            candidates = ["utf-8-sig", "gb18030"]
        errors = [_decoding_error(path, candidate) for candidate in candidates]
    except LookupError as error:
        raise options.error("encoding", "auto, utf-8, gb18030 or another of Python's text encodings") from error
    except OSError as error:
        raise DataFormatError(f"data file cannot be read ({error.strerror})", source=path.name) from error
    for candidate, found in zip(candidates, errors, strict=True):
        if found is None:
            return candidate
    raise DataFormatError(
        f"neither {' nor '.join(candidates)}",
        source=path.name,
        found=errors[0],
        fix="save the file as UTF-8, or set options.encoding",
    )


def _decoding_error(path: Path, encoding: str) -> str | None:
    """Why a file is not in an encoding, read in pieces; None if it is."""
    try:
        with path.open(encoding=encoding, newline="") as stream:
            while stream.read(1 << 16):
                pass
    except UnicodeError as error:
        return str(error)[:100]
    return None


def _delimiter(path: Path, header: str, options: Options, image_names: Collection[str]) -> str:
    """The given one; a tab in .tsv; else the first that makes the header hold an image column."""
    given = options.text("delimiter", "")
    if given:
        if len(given) != 1 or given in '\r\n"':
            raise options.error("delimiter", "one character")
        return given
    if path.suffix.lower() == ".tsv":
        return "\t"
    for delimiter in _DELIMITERS:
        if {cell.strip().strip('"').lower() for cell in header.split(delimiter)} & {n.lower() for n in image_names}:
            return delimiter
    return ","


def _rows(reader: Any, name: str) -> Iterator[tuple[str, str, list[str] | DataFormatError]]:
    while True:
        line = str(reader.line_num + 1)  # where the row begins: a quoted cell may hold line breaks
        source = f"{name}:{line}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "repair the quotes of this row"
            yield line, source, DataFormatError(f"damaged row ({error})", source=source, fix=fix)
            continue
        if any(cell.strip() for cell in row):
            yield line, source, row


def _read_header(header: Sequence[str], name: str, options: Options) -> _Table:
    cells = [cell.strip() for cell in header]
    named = options.mapping("columns")
    columns: dict[str, int] = {}
    for field, column in named.items():
        if field not in _COLUMNS or not isinstance(column, str) or cells.count(column) != 1:
            raise DataFormatError(
                "option 'columns' names no single column",
                source=name,
                field=f"options.columns.{field}",
                found=column,
                expected=f"one of {cells} for one of {list(_COLUMNS)}",
            )
        columns[field] = cells.index(column)
    for field, names in _COLUMNS.items():
        found = [index for index, cell in enumerate(cells) if cell.lower() in names and index not in columns.values()]
        if field in named or not found:
            continue
        if len(found) > 1:
            raise DataFormatError(
                f"several columns could be '{field}'",
                source=name,
                found=[cells[index] for index in found],
                fix=f"set options.columns: {{{field}: NAME}}",
            )
        columns[field] = found[0]
    if "image_path" not in columns:
        raise DataFormatError(
            "no column of images",
            source=name,
            found=cells,
            expected="a header with image_path, and mask_path, label, id, group as known",
            fix="set options.columns: {image_path: NAME}",
        )
    targets = {field: names for field, names in _COLUMNS.items() if field not in (*columns, *_CONVERSATION)}
    missing = [each for names in targets.values() for each in names if each.isascii()]
    for index, cell in enumerate(cells):  # other columns are the user's own, but `lable` would lose the labels
        near = difflib.get_close_matches(cell.lower(), missing, n=1, cutoff=0.79)
        if index not in columns.values() and near and not named:
            raise DataFormatError(
                "unknown column", source=name, field=cell, fix=f"rename it to '{near[0]}', or set options.columns"
            )
    return _Table(cells, columns, options.mapping("label_map"))


def _read_row(row: list[str], table: _Table, default_id: str, source: str, root: str) -> Record:
    check_width(row, table.header, default_id, source)
    cells = {field: row[index].strip() for field, index in table.columns.items()}
    fields: dict[str, Any] = {field: cell for field, cell in cells.items() if cell}
    item = Item(fields, str(fields.get("id", default_id)), source, root)
    for field in ("image_path", "mask_path"):
        if field in fields:
            fields[field] = fields[field].replace("\\", "/")  # paths written on Windows
    if "image_path" not in fields:
        raise item.error("row without an image", field=table.header[table.columns["image_path"]], found=row)
    if "label" in fields:
        fields["label"] = _read_label(item, fields["label"], table)
    if not any(field in fields for field in _CONVERSATION):
        return ANNOTATION.read(item)
    images = read_images(item)
    return build_record(item, images, _read_turns(item, fields, len(images)), own_fields=_CONVERSATION)


def _read_turns(item: Item, fields: dict[str, Any], num_images: int) -> tuple[Turn, ...]:
    """The conversation of a row: its messages, or its question (with the image before it) and the answer."""
    if "messages" in fields:
        if "question" in fields or "answer" in fields:
            raise item.error("a row with messages and with a question or answer", fix="keep one of them")
        try:
            messages = json.loads(fields["messages"])
        except ValueError as error:
            expected = '[{"role": "user", "content": "<image>..."}, ...] as JSON text'
            raise item.error(
                f"messages are no JSON ({error})", field="messages", found=fields["messages"][:80], expected=expected
            ) from error
        own = Item({**fields, "messages": messages}, item.record_id, item.source, item.root)
        turns, inline_images = read_turns(own, "messages")
        if inline_images:
            raise item.error("images given twice", field="messages", fix="leave them to the column of images")
        return turns
    if "question" not in fields:
        raise item.error("an answer without a question", fix="give the row a question, or leave the answer empty")
    has_place = IMAGE_PLACEHOLDER in fields["question"]
    question = Turn("user", fields["question"] if has_place else IMAGE_PLACEHOLDER * num_images + fields["question"])
    return (question, Turn("assistant", fields["answer"])) if "answer" in fields else (question,)


def _read_label(item: Item, text: str, table: _Table) -> int | None:
    value = table.label_map.get(text, int(text) if text in ("0", "1") else text)
    if value is None or (type(value) is int and value in (0, 1)):
        return value
    raise item.error(
        "label is neither 0 nor 1",
        field=table.header[table.columns["label"]],
        found=text,
        expected="0 (real) or 1 (tampered), or empty where unknown",
        fix=f"correct it, or set options.label_map: {{{text}: 0 or 1}}",
    )
