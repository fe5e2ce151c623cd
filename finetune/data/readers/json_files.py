"""Splits a .json or .jsonl file into raw objects with their place; knows nothing about what the objects mean.

Lines and lists are read entry by entry; only a .json file that is one object at its top is loaded whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.readers.json_stream import KEEP_ONE, RepeatedKeyError, TextStream, iter_list, not_utf8, once, repair
from finetune.errors import DataFormatError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


def iter_objects(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield (position, source, parsed value or DataFormatError) for every entry of a file, in order.

    Position is the 1-based line of a .jsonl file and the 0-based index of a .json list. A damaged line is yielded as
    its error, so that the lines after it are read too.

    Raises:
        DataFormatError: the file cannot be opened, or (after the entries before it) a .json file is damaged.
    """
    if path.suffix.lower() not in JSON_SUFFIXES:
        _check_is_file(path)
        raise DataFormatError(
            "unknown kind of data file", source=path.name, found=str(path), expected=" or ".join(JSON_SUFFIXES)
        )
    _check_is_file(path)
    try:
        if path.suffix.lower() == ".json":
            yield from _from_json(path)
        else:
            yield from _from_lines(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def load_json(path: Path) -> Any:
    """The one value of a .json file.

    Raises:
        DataFormatError: the file cannot be read or parsed.
    """
    _check_is_file(path)
    try:
        return _parse(_decode(path.read_bytes(), path.name), path.name)
    except OSError as error:
        raise _unreadable(path, error) from error


def top_level(path: Path) -> str:
    """First character of a JSON file that is no white space, "" if there is none.

    Raises:
        DataFormatError: the file cannot be read.
    """
    _check_is_file(path)
    try:
        with path.open("rb") as stream:
            return TextStream(stream, path.name).skip_space()
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise DataFormatError("data file not found", source=path.name, found=str(path), fix="check the path")


def _unreadable(path: Path, error: OSError) -> DataFormatError:
    return DataFormatError(f"data file cannot be read ({error.strerror})", source=path.name, found=str(path))


def _from_lines(path: Path) -> Iterator[tuple[str, str, Any]]:
    with path.open("rb") as stream:  # bytes, so that only "\n" ends a line and one bad line does not spoil the next
        for number, line in enumerate(stream, start=1):
            source = f"{path.name}:{number}"
            try:
                text = _decode(line.rstrip(b"\r\n"), source)
                value = _parse(text, source) if text.strip() else None
            except DataFormatError as error:
                yield str(number), source, error
                continue
            if value is not None or text.strip():
                yield str(number), source, value


def _from_json(path: Path) -> Iterator[tuple[str, str, Any]]:
    with path.open("rb") as file:
        stream = TextStream(file, path.name)
        first = stream.skip_space()
        entries = iter_list(stream) if first == "[" else iter(())
        for index, entry in enumerate(entries):
            yield str(index), f"{path.name}[{index}]", entry
    if first and first != "[":
        for index, entry in enumerate(_entries(load_json(path), path.name)):
            yield str(index), f"{path.name}[{index}]", entry


def _entries(value: Any, source: str) -> list[Any]:
    """The list in a .json file that is an object: the one list of objects inside it, or the object as one record."""
    if not isinstance(value, dict):
        raise DataFormatError("no list of records", source=source, found=value, expected="[{...}, {...}]")
    if "conversations" in value or "messages" in value:
        return [value]
    if len(value) == 1 and [] in value.values():
        return []
    lists = [
        key
        for key, inner in value.items()
        if isinstance(inner, list) and any(isinstance(entry, dict) for entry in inner)
    ]
    if len(lists) > 1:
        raise DataFormatError(
            "several lists of records in one file", source=source, found=lists, fix="save the one that is meant alone"
        )
    return list(value[lists[0]]) if lists else [value]


def _decode(data: bytes, source: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataFormatError("file is UTF-16", source=source, fix="save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, 0, source) from error


def _parse(text: str, source: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=once)
    except RepeatedKeyError as error:
        raise DataFormatError(f"damaged JSON: {error}", source=source, fix=KEEP_ONE) from error
    except json.JSONDecodeError as error:
        line = "" if ".jsonl:" in source or ".ndjson:" in source else f"line {error.lineno}, "
        is_lines = error.msg == "Extra data" and error.lineno > 1
        raise DataFormatError(
            f"damaged JSON at {line}column {error.colno}: {error.msg}",
            source=source,
            found=text[max(0, error.pos - 30) : error.pos + 30],
            fix="name the file .jsonl, it holds one object per line"
            if is_lines
            else repair(error.msg, text, error.pos),
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested thousands deep
        raise DataFormatError(f"damaged JSON: {str(error)[:100]}", source=source, fix="repair or remove it") from error
