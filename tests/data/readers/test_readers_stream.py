"""JSON entries are read one at a time: same values as the standard library's, places of the whole file, flat memory."""

from __future__ import annotations

import io
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.readers import iter_records, json_stream, read_records, scan_records
from finetune.data.readers.json_stream import TextStream, iter_list
from finetune.errors import DataFormatError
from finetune.schema import Record

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def entries(data: bytes, chunk: int) -> list[Any]:
    json_stream.CHUNK, old = chunk, json_stream.CHUNK
    try:
        stream = TextStream(io.BytesIO(data), "f.json")
        assert stream.skip_space() == "["
        return list(iter_list(stream))
    finally:
        json_stream.CHUNK = old


@settings(max_examples=70, deadline=None)
@given(
    values=st.lists(JSON, max_size=5),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 1, 40]),
    is_ascii=st.booleans(),
)
def test_a_list_read_in_pieces_is_the_list(values: list[Any], chunk: int, indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    assert entries(text.encode("utf-8", "replace"), chunk) == json.loads(text.encode("utf-8", "replace"))


@settings(max_examples=70, deadline=None)
@given(values=st.lists(JSON, max_size=4), chunk=st.integers(1, 30), data=st.data())
def test_damage_is_found_wherever_the_pieces_end(values: list[Any], chunk: int, data: st.DataObject) -> None:
    text = bytearray(json.dumps(values).encode())
    at = data.draw(st.integers(1, len(text) - 1)) if len(text) > 1 else 1
    text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        expected = json.loads(bytes(text).decode("utf-8"))
    except (ValueError, UnicodeDecodeError):
        with pytest.raises(DataFormatError):
            entries(bytes(text), chunk)
    else:
        assert entries(bytes(text), chunk) == expected or isinstance(expected, (dict, str, int, float, type(None)))


@pytest.mark.parametrize("padding", [0, 70_000, 200_000])
def test_damage_is_placed_in_the_whole_file(tmp_path: Path, padding: int) -> None:
    path = tmp_path / "a.json"
    good = json.dumps({"image_path": "a.jpg", "note": "图" * padding}, ensure_ascii=False)
    path.write_text(f'[{good},\n {good},\n  {{"image_path": }}, {good}]', encoding="utf-8")
    records, errors = scan_records(path)
    assert [record.id for record in records] == ["a:0", "a:1"]
    assert "damaged JSON at line 3, column 18: Expecting value" in str(errors[0])
    path.write_bytes(b'[{"image_path": "' + b"a" * padding + b"\xff" + b'.jpg"}]')
    assert f"not UTF-8 at byte {18 + padding}" in str(scan_records(path)[1][0])


def test_records_come_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    for name, begin, separator in (("a.json", "[", ",\n"), ("a.jsonl", "", "\n"), ("a.csv", "image,label\n", "\n")):
        path = tmp_path / name
        rows = [f"{k}.jpg,0" if name == "a.csv" else f'{{"id": "{k}", "image_path": "{k}.jpg"}}' for k in range(9000)]
        path.write_text(begin + separator.join(rows) + separator + '{"damaged, "cut off')
        first = list(itertools.islice(iter_records(path), 3))
        assert all(isinstance(record, Record) for record in first)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        path = tmp_path / name
        with path.open("w", encoding="utf-8") as stream:
            stream.write({"a.json": "[", "a.jsonl": "", "a.csv": "image,label,id\n"}[name])
            for k in range(count):
                note = "x" * 400
                row = json.dumps({"id": f"r{k}", "image_path": f"i/{k}.jpg", "label": k % 2, "note": note})
                stream.write(f"i/{k}{note}.jpg,{k % 2},r{k}\n" if name == "a.csv" else row)
                stream.write({"a.json": ",\n" if k < count - 1 else "]", "a.jsonl": "\n", "a.csv": ""}[name])
        tracemalloc.start()
        assert sum(isinstance(record, Record) for record in iter_records(path)) == count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)  # imports
    small, large = peak(1000), peak(4000)
    assert large - small < 3000 * 200  # of about 480 bytes in the file: the hash of its id and its place remain


def test_errors_stand_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"image_path": "a"}\n{"label": 0}\n{"image_path": "b"}\n{"id": "a:1", "image_path": "c"}\n')
    kinds = [type(record).__name__ for record in iter_records(path)]
    assert kinds == ["Record", "DataFormatError", "Record", "DataFormatError"]
    assert "id used twice" in str(list(iter_records(path))[3])
    assert "also at a.jsonl:1" in str(list(iter_records(path))[3])
    with pytest.raises(DataFormatError, match=r"a\.jsonl:2"):
        read_records(path)
