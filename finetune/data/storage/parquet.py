"""One Parquet file of records with their images inside: written row group by row group, read without the image bytes.

Images and masks are structs {bytes, path} as `datasets.Image` stores them, and the schema carries the metadata by which
`datasets.load_dataset` decodes them. Row groups are small, so that one sample is read without its whole file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.containers import container_path, first_line
from finetune.data.storage.serialization import COLUMNS, SIZE_TEXT
from finetune.errors import DataFormatError

FEATURES: dict[str, Any] = {
    "id": {"dtype": "string", "_type": "Value"},
    "group": {"dtype": "string", "_type": "Value"},
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    "labels": {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"},
    "masks": {"feature": {"_type": "Image"}, "_type": "List"},
    "polygons": {
        "feature": {
            "feature": {
                "feature": {"feature": {"dtype": "float64", "_type": "Value"}, "_type": "List"},
                "_type": "List",
            },
            "_type": "List",
        },
        "_type": "List",
    },
    "evidence": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "messages": {
        "feature": {
            "role": {"dtype": "string", "_type": "Value"},
            "content": {"dtype": "string", "_type": "Value"},
        },
        "_type": "List",
    },
    "provenance": {"_type": "Json"},
}
"""The columns as `datasets.Features` writes them; provenance is JSON text (Parquet's logical type JSON)."""

_MADE_BY = "make the file again with `forensics prepare`"


def arrow_schema() -> Any:
    """The `pyarrow.Schema` of a stored file."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    points = pa.list_(pa.list_(pa.list_(pa.list_(pa.float64()))))
    types = {
        "id": pa.string(),
        "group": pa.string(),
        "images": pa.list_(image),
        "labels": pa.list_(pa.int64()),
        "masks": pa.list_(image),
        "polygons": points,
        "evidence": pa.list_(pa.string()),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        "provenance": pa.json_(),
    }
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.schema([(name, types[name]) for name in COLUMNS], metadata=metadata)


class ParquetFileWriter:
    """Streams rows into one file; at most one row group is held in memory.

    Args:
        path: written from the start; the caller gives it its final name.
        group_rows, group_bytes: a row group ends with the row that reaches either.
    """

    def __init__(self, path: Path, group_rows: int, group_bytes: int) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._limits = (group_rows, group_bytes)
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0
        self._schema = arrow_schema()
        self._stream: BinaryIO = path.open("wb")
        # No statistics: they would repeat whole images in the footer. No dictionaries: every value occurs once.
        self._writer = pq.ParquetWriter(
            self._stream,
            self._schema,
            compression="snappy",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def add(self, row: dict[str, Any], num_bytes: int) -> None:
        """Append one row of `arrow_schema`; `num_bytes` is about its size."""
        self._rows.append(row)
        self._num_bytes += num_bytes
        if len(self._rows) >= self._limits[0] or self._num_bytes >= self._limits[1]:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer.

        Raises:
            OSError: the disk is full.
        """
        self._flush()
        self._writer.close()
        self._stream.close()

    def abort(self) -> None:
        """Throw the file away."""
        self._writer.is_open = False  # or its destructor would write a footer into the closed stream
        with contextlib.suppress(OSError):  # writes out what is buffered, which fails again on a full disk
            self._stream.close()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), len(self._rows))
            self._rows, self._num_bytes = [], 0


def iter_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataFormatError]]:
    """(row number, native object whose images are container paths, or the error of that row) of a file, in order.

    One row group is in memory at a time, without its image bytes.

    Raises:
        DataFormatError: not a Parquet file, or without the columns of `COLUMNS`; names the file and the column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataFormatError("data file not found", source=path.name, found=str(path), fix="check the path")
    try:
        file = pq.ParquetFile(path, memory_map=False, pre_buffer=False, page_checksum_verification=True)
        leaves = [file.schema.column(index).path for index in range(len(file.schema))]
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(
            f"Parquet file is truncated or damaged ({first_line(error)})",
            source=path.name,
            found=str(path),
            fix="copy or make the file again",
        ) from error
    with file:
        _check_columns(schema, path)
        wanted = [leaf for leaf in leaves if _column_of(leaf) in COLUMNS and not _is_image_bytes(leaf)]
        first = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            columns = _read_columns(file, group, wanted)
            for row in range(num_rows):
                yield first + row, _native(columns, row, first + row, path)
            first += num_rows


def _read_columns(file: Any, group: int, leaves: list[str]) -> dict[str, Any]:
    """Column name to its values in a row group, or to the error that reading it gave."""
    import pyarrow as pa

    try:
        table = file.read_row_group(group, columns=leaves, use_threads=False)
        return {name: table.column(name) for name in COLUMNS}
    except (pa.ArrowException, OSError):  # find out which column it is
        columns: dict[str, Any] = {}
        for name in COLUMNS:
            own = [leaf for leaf in leaves if _column_of(leaf) == name]
            try:
                columns[name] = file.read_row_group(group, columns=own, use_threads=False).column(name)
            except (pa.ArrowException, OSError) as error:
                columns[name] = error
        return columns


def _native(columns: Mapping[str, Any], row: int, number: int, path: Path) -> dict[str, Any] | DataFormatError:
    """The native object of one row, or what is wrong with it."""
    source = f"{path.name}#{number}"
    fields: dict[str, Any] = {}
    for name, column in columns.items():
        try:
            if isinstance(column, Exception):
                raise column
            fields[name] = column[row].as_py()
            if name == "provenance":
                fields[name] = json.loads(fields[name] or "{}")
        except (ValueError, OSError, RecursionError) as error:  # ArrowInvalid, UnicodeDecodeError, damaged JSON
            return DataFormatError(
                f"cell cannot be read ({first_line(error)})",
                source=source,
                field=name,
                found=str(path),
                fix="copy or make the file again",
            )
    file = os.path.abspath(path)
    images = fields["images"]
    if any(image is None for image in images or []):
        return DataFormatError("image missing", source=source, field="images", found=images, fix=_MADE_BY)
    fields["images"] = [container_path(file, number, "images", index) for index in range(len(images or []))]
    fields["masks"] = [
        _mask_entry(mask, container_path(file, number, "masks", index))
        for index, mask in enumerate(fields["masks"] or [None] * len(fields["images"]))
    ]
    return fields


def _mask_entry(mask: dict[str, Any] | None, embedded_path: str) -> str | None:
    """`HxW` where the struct's path is that (its picture is all zero), else the container path."""
    if mask is None:
        return None
    text = mask.get("path")
    return text if text and SIZE_TEXT.fullmatch(text) else embedded_path


def _column_of(leaf: str) -> str:
    return leaf.split(".", 1)[0]


def _is_image_bytes(leaf: str) -> bool:
    return _column_of(leaf) in ("images", "masks") and leaf.endswith(".bytes")


def _check_columns(schema: Any, path: Path) -> None:
    expected = arrow_schema()
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise DataFormatError(
            f"column '{missing[0]}' is missing",
            source=path.name,
            field=missing[0],
            found=schema.names,
            expected=f"the columns {', '.join(COLUMNS)}",
            fix=_MADE_BY,
        )
    for name in COLUMNS:
        found = schema.field(name).type
        if not _fits(found, expected.field(name).type):
            raise DataFormatError(
                f"column '{name}' has another type",
                source=path.name,
                field=name,
                found=str(found),
                expected=str(expected.field(name).type),
                fix=_MADE_BY,
            )


def _fits(found: Any, expected: Any) -> bool:
    """Whether a column can be read as the expected one: other widths of integers, strings and lists are no matter."""
    import pyarrow as pa

    kinds = pa.types
    if isinstance(expected, pa.BaseExtensionType):  # JSON text, which other writers may call a string
        expected = expected.storage_type
    if isinstance(found, pa.BaseExtensionType):
        found = found.storage_type
    if kinds.is_null(found):
        return True
    if kinds.is_list(expected):
        is_list = kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
        return is_list and _fits(found.value_type, expected.value_type)
    if kinds.is_struct(expected):
        if not kinds.is_struct(found):
            return False
        names = [field.name for field in found]
        return all(field.name in names and _fits(found.field(field.name).type, field.type) for field in expected)
    if kinds.is_string(expected):
        return kinds.is_string(found) or kinds.is_large_string(found) or kinds.is_string_view(found)
    if kinds.is_binary(expected):
        return kinds.is_binary(found) or kinds.is_large_binary(found) or kinds.is_binary_view(found)
    if kinds.is_floating(expected):
        return kinds.is_floating(found) or kinds.is_integer(found)
    return kinds.is_integer(found)
