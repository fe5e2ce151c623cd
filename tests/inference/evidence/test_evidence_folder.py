"""The output folder of an inspection: belongs to one run, survives a kill at any byte, opens in a spreadsheet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.errors import ConfigError, DataFormatError
from finetune.inference import run_folder
from finetune.inference.evidence.folder import (
    CSV_COLUMNS,
    EvidenceFolder,
    failed_row,
    file_stamp,
    file_stem,
    picture_name,
)
from finetune.inference.evidence.inspection import named_images

IDENTITY = {"settings": {"heatmap_threshold": 0.5}, "model": {"heads.safetensors": "ab"}}


def row(name: str, explanation: str = '第一行\n第二行, "引号"', error: str | None = None) -> dict[str, Any]:
    filled = failed_row(name, f"photos/{name}", [3, 4], error or "")
    return {**filled, "label": 1, "score": 0.75, "boxes": [[0, 1, 2, 3]], "explanation": explanation, "prompt": "p"}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def begun(folder: Path, names: list[str], **options: Any) -> EvidenceFolder:
    out = EvidenceFolder(folder / "r.csv", folder / "evidence", options.pop("identity", IDENTITY), **options)
    with out:
        for name in names:
            out.write(row(name))
    return out


def test_rows_are_in_the_csv_as_they_come_and_excel_can_read_it(tmp_path: Path) -> None:
    begun(tmp_path, ["a.jpg", "b.jpg"])
    assert (tmp_path / "r.csv").read_bytes().startswith(b"\xef\xbb\xbfid,")
    rows = read_csv(tmp_path / "r.csv")
    assert [r["id"] for r in rows] == ["a.jpg", "b.jpg"]
    assert rows[0]["explanation"] == '第一行\n第二行, "引号"'
    assert rows[0]["boxes"] == "[[0, 1, 2, 3]]"
    assert tuple(rows[0]) == CSV_COLUMNS


def test_a_run_goes_on_from_any_byte_of_its_journal(tmp_path: Path) -> None:
    begun(tmp_path, ["a", "b", "c"])
    journal = tmp_path / "evidence" / "results.jsonl"
    whole = journal.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    stamps = {name: [3, 4] for name in "abcd"}
    for cut in (*range(0, len(whole), 97), *ends):
        journal.write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends)
        out = EvidenceFolder(tmp_path / "r.csv", tmp_path / "evidence", IDENTITY)
        assert out.is_resumed
        todo = out.pending(stamps)
        assert todo == list("abcd")[complete:]
        with out:
            for name in todo:
                out.write(row(name))
        assert [r["id"] for r in read_csv(tmp_path / "r.csv")] == list("abcd")


def test_failed_and_changed_images_are_tried_again(tmp_path: Path) -> None:
    begun(tmp_path, ["a", "changed"])
    out = EvidenceFolder(tmp_path / "r.csv", tmp_path / "evidence", IDENTITY)
    with out:
        out.write(row("bad", error="image is truncated"))
    again = EvidenceFolder(tmp_path / "r.csv", tmp_path / "evidence", IDENTITY)
    assert again.pending({"a": [3, 4], "bad": [3, 4], "changed": [3, 5]}) == ["bad", "changed"]
    with again:
        again.write(row("bad"))
    assert [(r["id"], r["error"]) for r in read_csv(tmp_path / "r.csv")] == [("a", ""), ("bad", "")]


def test_another_runs_folder_is_refused_and_overwrite_removes_what_it_wrote(tmp_path: Path) -> None:
    out = begun(tmp_path, ["a"])
    with out:
        out.save_pictures("a", np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.float32))
    (tmp_path / "evidence" / "notes.txt").write_text("mine")
    other = {"settings": {"heatmap_threshold": 0.6}, "model": {"heads.safetensors": "ab"}}
    with pytest.raises(ConfigError) as error:
        EvidenceFolder(tmp_path / "r.csv", tmp_path / "evidence", other)
    for word in ("another run", "settings.heatmap_threshold was 0.5, now it is 0.6", "--overwrite"):
        assert word in str(error.value)
    assert len(read_csv(tmp_path / "r.csv")) == 1
    begun(tmp_path, ["b"], identity=other, overwrite=True)
    assert [r["id"] for r in read_csv(tmp_path / "r.csv")] == ["b"]
    assert not list((tmp_path / "evidence" / "overlays").iterdir())
    assert (tmp_path / "evidence" / "notes.txt").read_text() == "mine"


def test_a_run_that_goes_on_does_not_write_over_another_table(tmp_path: Path) -> None:
    begun(tmp_path, ["a", "b"])
    for name, text in {"mine.csv": "id,score\na,1\n", "cut.csv": ""}.items():
        (tmp_path / name).write_text(text)
    other = tmp_path / "other"
    begun(other, ["c"])
    for path in (tmp_path / "mine.csv", other / "r.csv"):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match="holds nothing of the run"):
            EvidenceFolder(path, tmp_path / "evidence", IDENTITY)
        assert path.read_bytes() == before
    for name in ("r.csv", "new.csv", "cut.csv"):
        with EvidenceFolder(tmp_path / name, tmp_path / "evidence", IDENTITY):
            pass
        assert [r["id"] for r in read_csv(tmp_path / name)] == ["a", "b"]


def test_files_that_are_of_no_run_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"r\.csv, which exists and is of no run"):
        EvidenceFolder(tmp_path / "r.csv", tmp_path / "evidence", IDENTITY)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_text("mine")
    with pytest.raises(ConfigError, match=r"files that are of no vision inference, e\.g\. a\.jpg"):
        EvidenceFolder(tmp_path / "new.csv", folder, IDENTITY)
    assert [path.name for path in folder.iterdir()] == ["a.jpg"]
    with pytest.raises(ConfigError, match="is a file"):
        EvidenceFolder(tmp_path / "new.csv", tmp_path / "r.csv", IDENTITY)


def test_a_journal_that_is_damaged_in_its_middle_is_not_gone_on_from(tmp_path: Path) -> None:
    begun(tmp_path, ["a", "b"])
    journal = tmp_path / "evidence" / "results.jsonl"
    journal.write_bytes(b"\0\0" + journal.read_bytes())
    with pytest.raises(DataFormatError, match=r"results\.jsonl:1"):
        EvidenceFolder(tmp_path / "r.csv", tmp_path / "evidence", IDENTITY)


def test_file_names_are_unique_and_do_not_depend_on_other_images() -> None:
    ids = ["a.jpg", "a.png", "x/a.jpg", "x__a.jpg", "图 1.jpg", "图_1.jpg", "../a.jpg", "a" * 300, "a" * 301, "..", ""]
    more = ["a.jpg.png", "a.PNG", "x/a.png", "x__a.png", "y.z.png", "y.z"]
    pictures = [picture_name(name) for name in (*ids, *more)]
    assert len({name.lower() for name in pictures}) == len(ids) + len(more)
    assert pictures[:2] == ["a.jpg.png", "a.png"]
    assert all(name.endswith(".png") for name in pictures)
    stems = [file_stem(name) for name in ids]
    assert len(set(stems)) == len(ids)
    assert stems[0] == "a.jpg"
    assert all(0 < len(stem) < 120 and "/" not in stem and not stem.startswith(".") for stem in stems)


def test_the_stamp_of_a_file_changes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "a"
    assert file_stamp(str(file)) is None
    file.write_text("1")
    before = file_stamp(str(file))
    file.write_text("12")
    assert file_stamp(str(file)) != before


def test_a_folder_of_weights_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it lies, and for large files too, of which only a sample is read."""
    monkeypatch.setattr(run_folder, "_WHOLE_BYTES", 1 << 20)
    weights = np.random.default_rng(0).bytes(6 << 20)
    for name, data in (("a", weights), ("b", weights), ("c", weights[:-9] + b"123456789"), ("d", weights[1:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
        (tmp_path / name / "config.json").write_text("{}")
    found = {name: run_folder.folder_identity(tmp_path / name) for name in "abcd"}
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]
    assert found["a"] != found["d"]
    assert str(found["a"]["model.safetensors"]).startswith("sample:")
    assert run_folder.folder_identity("Qwen/Qwen2.5-VL-3B-Instruct") == {"name": "Qwen/Qwen2.5-VL-3B-Instruct"}
    assert run_folder.folder_identity(None) is None


def test_rows_of_another_folder_are_not_replaced(tmp_path: Path) -> None:
    """Names such as 0001.jpg are in every folder; a folder that was moved is the same one."""
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def opened() -> EvidenceFolder:
        return EvidenceFolder(tmp_path / "r.csv", tmp_path / "evidence", IDENTITY)

    with opened() as out:
        for name, path in out.named_as_before(named_images([a, b])).items():
            out.write({**row(name), "image_path": path, "stamp": file_stamp(path)})
    ids = {"1.jpg": f"{a}/1.jpg", "2.jpg": f"{a}/2.jpg", f"{b}/1.jpg": f"{b}/1.jpg"}
    for given in ([a, b], [b, a], [b], [f"{a}/../b"]):  # in any order, under any name
        again = opened()
        found = again.named_as_before(named_images(given))
        assert {name: Path(path).resolve() for name, path in found.items()}.items() <= {
            name: Path(path).resolve() for name, path in ids.items()
        }.items()
        assert again.pending({name: file_stamp(path) for name, path in found.items()}) == []
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.jpg").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"holds the results of .*a/1\.jpg under the id '1\.jpg', which .*c/1\.jpg"):
        opened().named_as_before(named_images([str(tmp_path / "c")]))
    both = opened().named_as_before(named_images([str(tmp_path / "c"), a]))
    assert both == {f"{tmp_path}/c/1.jpg": f"{tmp_path}/c/1.jpg", "1.jpg": f"{a}/1.jpg", "2.jpg": f"{a}/2.jpg"}
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = opened()
    found = moved.named_as_before(named_images([str(tmp_path / "moved")]))
    assert moved.pending({name: file_stamp(path) for name, path in found.items()}) == []
