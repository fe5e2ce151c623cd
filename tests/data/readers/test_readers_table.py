"""Tables: headers are mapped, encodings recognised, every damaged row is named by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.data.readers import read_records, scan_records
from finetune.errors import DataFormatError


def write(folder: Path, text: str, name: str = "t.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataFormatError) as caught:
        read_records(path, options=options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
def test_encodings_are_recognised(tmp_path: Path, encoding: str) -> None:
    text = "图像,标签,分组,备注\n图片/证件照.jpg,1,甲,发际线\n图片/乙.jpg,,乙,\n"
    first, second = read_records(write(tmp_path, text, encoding=encoding))
    assert first.images[0].path == str(tmp_path / "图片/证件照.jpg")
    assert (first.id, first.source, first.label, first.group) == ("t:2", "t.csv:2", 1, "甲")
    assert (second.label, second.group) == (None, "乙")


def test_an_encoding_that_is_neither_is_refused_or_named_by_the_user(tmp_path: Path) -> None:
    path = write(tmp_path, "image,label\né.jpg,1\n", encoding="latin-1")
    assert "neither utf-8-sig nor gb18030" in error_of(path)
    assert read_records(path, options={"encoding": "latin-1"})[0].images[0].path == str(tmp_path / "é.jpg")
    assert "options.encoding" in error_of(path, encoding="klingon")
    assert "options.encoding" in error_of(path, encoding="base64")


@pytest.mark.parametrize(("name", "delimiter"), [("t.tsv", "\t"), ("t.csv", "\t"), ("t.csv", ";"), ("t.csv", "|")])
def test_delimiters(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [["image_path", "mask_path", "label"], ["a,1.jpg", "m/a.png", "1"], ["b.jpg", "4x6", "0"]]
    tampered, real = read_records(write(tmp_path, "\n".join(delimiter.join(row) for row in rows), name))
    assert tampered.images[0].path == str(tmp_path / "a,1.jpg")
    assert tampered.targets[0].mask_path == str(tmp_path / "m/a.png")
    assert real.targets[0].mask_size_hw == (4, 6)


def test_quotes_line_breaks_and_windows_paths(tmp_path: Path) -> None:
    text = 'id,image,label,note\r\nx,"a, b.jpg",1,"two\r\nlines"\r\n\r\ny,d\\e.jpg,0,\r\n'
    first, second = read_records(write(tmp_path, text))
    assert (first.id, first.source, first.images[0].path) == ("x", "t.csv:2", str(tmp_path / "a, b.jpg"))
    assert (second.source, second.images[0].path) == ("t.csv:5", str(tmp_path / "d/e.jpg"))


def test_columns_and_labels_by_option(tmp_path: Path) -> None:
    text = "Probe|ProbeMask|IsTarget|Base\nprobe/a.jpg|mask/a.png|Y|w1.jpg\nprobe/b.jpg||N|w2.jpg\n"
    options = {
        "columns": {"image_path": "Probe", "mask_path": "ProbeMask", "label": "IsTarget", "group": "Base"},
        "label_map": {"Y": 1, "N": 0},
    }
    first, second = read_records(write(tmp_path, text), options=options)
    assert (first.label, first.group, second.label, second.targets[0].mask_path) == (1, "w1.jpg", 0, None)
    assert "names no single column" in error_of(write(tmp_path, text), columns={"image_path": "probe"})


def test_damaged_rows_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    text = 'image,label\na.jpg,1\nb.jpg\nc.jpg,real\n../d.jpg,0\n"e"x.jpg,0\n,1\nf.jpg,0,7\ng.jpg,0,\n'
    records, errors = scan_records(write(tmp_path, text))
    assert [record.id for record in records] == ["t:2", "t:9"]
    messages = [str(error) for error in errors]
    assert [message.split("t.csv:")[1][0] for message in messages] == ["3", "4", "5", "6", "7", "8"]
    for message, part in zip(
        messages,
        [
            "1 cells under a header of 2",
            "found 'real'",
            "leaves the data folder",
            "quotes",
            "without an image",
            "3 cells",
        ],
        strict=True,
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("picture,label\na.jpg,1\n", "no column of images"),
        ("image,path\na,b\n", "several columns"),
        ("image,lable\na,b\n", "rename it to 'label'"),
        ("", "empty data set"),
        ("image,label\n", "empty data set"),
        ("id,image\n1,a\n1,b\n", "id used twice"),
        ('image,label\n"a.jpg,1\n', "damaged row"),
    ],
)
def test_unusable_tables(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path, text))


def test_unknown_options_are_named(tmp_path: Path) -> None:
    assert "write 'columns'" in error_of(write(tmp_path, "image\na\n"), colums={})
    assert "one character" in error_of(write(tmp_path, "image\na\n"), delimiter="::")
