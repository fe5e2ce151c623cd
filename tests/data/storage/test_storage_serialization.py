"""A record written as JSON and read back is the same record, whatever is in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from record_strategies import records

from finetune.data.readers import read_records
from finetune.data.storage.serialization import COLUMNS, json_text, record_to_json
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record, Turn


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


@pytest.mark.parametrize("field", ["group", "turns", "targets"])
def test_half_a_character_is_refused_in_text(field: str) -> None:
    broken = {"group": "\ud800", "turns": (Turn("user", "\ud800"),), "targets": (ImageTarget(evidence="\ud800"),)}
    record = Record("r", (ImageInput(path="a.jpg"),), (ImageTarget(),))
    with pytest.raises(DataFormatError, match="record 'r': text holds half a character"):
        record_to_json(replace(record, **{field: broken[field]}), ".")
