"""A record written as JSON and read back is the same record, whatever is in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.readers import read_records
from finetune.data.storage.serialization import COLUMNS, json_text, record_to_json
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record, Turn

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
# File names of all kinds, those a reader might take for a size or a URL among them; no blank at the end.
name = st.one_of(
    st.sampled_from(
        ["a.jpg", "4x6", " 4 x 6", "data:x", "file:", "http:", " b.png", "~", "c#d.png", "中文.png", "..a"]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=8).filter(
        lambda s: s.strip() == s.rstrip() == s and s not in (".", "..")
    ),
)
coordinate = st.floats(-2, 5000, allow_nan=False)
points = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=6)
closed = points.map(lambda p: [*p, p[0]])
polygon = st.one_of(points, closed).map(tuple)
json_value: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def records(draw: st.DrawFn, root: str = "ROOT") -> Record:
    def path() -> str:
        folder = draw(st.sampled_from([root, f"{root}/images", f"{root}2", "/elsewhere", f"{root}/../x"]))
        return f"{folder}/{draw(name)}"

    def target() -> ImageTarget:
        kind = draw(st.sampled_from(["none", "path", "size"]))
        return ImageTarget(
            label=draw(st.sampled_from([0, 1, None])),
            mask_path=path() if kind == "path" else None,
            mask_size_hw=draw(st.tuples(st.integers(1, 9999), st.integers(1, 9999))) if kind == "size" else None,
            polygons=draw(st.none() | st.lists(polygon, max_size=3).map(tuple)),
            evidence=draw(st.none() | text),
        )

    def image() -> ImageInput:
        if draw(st.booleans()):
            return ImageInput(data=draw(st.binary(min_size=1, max_size=20)))
        return ImageInput(path=path())

    count = draw(st.integers(0, 3))
    roles = st.sampled_from(["system", "user", "assistant"])
    turns = draw(st.lists(st.builds(Turn, roles, text), min_size=int(count == 0), max_size=3))
    return Record(
        id=draw(text.filter(lambda s: s.strip())),
        images=tuple(image() for _ in range(count)),
        targets=tuple(target() for _ in range(count)),
        turns=tuple(turns),
        group=draw(text),
        provenance=draw(st.dictionaries(st.text(max_size=6), json_value, max_size=3)),
    )


@settings(max_examples=200, deadline=None)
@given(record=records())
def test_reading_back_gives_an_equal_record(tmp_path_factory: pytest.TempPathFactory, record: Record) -> None:
    folder = tmp_path_factory.getbasetemp() / "roundtrip"
    folder.mkdir(exist_ok=True)
    root = str(folder)
    record = replace(
        record,
        images=tuple(i if i.path is None else ImageInput(path=i.path.replace("ROOT", root)) for i in record.images),
        targets=tuple(
            t if t.mask_path is None else replace(t, mask_path=t.mask_path.replace("ROOT", root))
            for t in record.targets
        ),
    )
    fields = record_to_json(record, folder)
    assert tuple(fields) == COLUMNS
    file = folder / "train.jsonl"
    file.write_text(json_text(fields, record) + "\n", encoding="utf-8")
    (again,) = read_records(file)
    assert replace(again, source="") == record


def test_paths_are_relative_below_the_root_and_absolute_elsewhere(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set" / "images" / "a.jpg", tmp_path / "b.jpg"
    images = tuple(ImageInput(path=str(path)) for path in (inside, outside))
    record = Record("r", images, (ImageTarget(),) * 2)
    assert record_to_json(record, tmp_path / "set")["images"] == ["images/a.jpg", str(outside)]


def test_paths_relative_to_the_working_folder_stay_openable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = Record("r", (ImageInput(path="set/a.jpg"), ImageInput(path="b.jpg")), (ImageTarget(),) * 2)
    assert record_to_json(record, "set")["images"] == ["a.jpg", str(tmp_path / "b.jpg")]


def test_embedded_bytes_become_a_data_url_of_their_kind() -> None:
    record = Record("r", (ImageInput(data=b"\x89PNG\r\n\x1a\nrest"), ImageInput(data=b"?")), (ImageTarget(),) * 2)
    first, second = record_to_json(record, ".")["images"]
    assert first.startswith("data:image/png;base64,")
    assert second.startswith("data:application/octet-stream;base64,")


@pytest.mark.parametrize("path", ["/x/a.jpg ", "/x/a\udcff.jpg"])
def test_a_path_that_cannot_be_read_back_is_refused(path: str) -> None:
    record = Record("r", (ImageInput(path=path),), (ImageTarget(),), source="s:1")
    with pytest.raises(DataFormatError, match=r"record 'r' \(s:1\): path .*field 'images'.*rename the file"):
        record_to_json(record, "/x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_provenance_that_is_no_json_is_refused(value: Any) -> None:
    record = Record("r", (), (), (Turn("user", "x"),), provenance={"a": value})
    with pytest.raises(DataFormatError, match="record 'r': record cannot be written as JSON"):
        json_text(record_to_json(record, "."), record)


def test_lone_surrogates_in_provenance_survive() -> None:
    record = Record("r", (), (), (Turn("user", "真"),), provenance={"a": "\ud800"})
    line = json_text(record_to_json(record, "."), record)
    assert json.loads(line)["provenance"] == {"a": "\ud800"}
