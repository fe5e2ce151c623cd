"""Rows of an inspection table become records; everything wrong with a row is said, by row and column."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.readers import FORMATS, scan_records
from finetune.data.reports.settings import ReportSettings
from finetune.data.reports.table import report_values
from finetune.data.reports.template import load_report_template
from finetune.errors import ConfigError, DataFormatError

HEADER = "image_id,image_path,data_风险,data_纠正和预防建议,data_风险等级,data_缺陷描述"
SPEC_ROW = "0,images/001.jpg,厨房用水易溅入墙体造成墙体发霉,建议透底处补刷防水涂料,轻微,厨房墙面防水涂料透底"
ANSWER = (
    "**风险描述**: 厨房用水易溅入墙体造成墙体发霉\n**风险等级**: 轻微\n**纠正和预防建议**: 建议透底处补刷防水涂料\n"
    "**缺陷描述**: 厨房墙面防水涂料透底\n**位置信息**: 未知"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("001.jpg", "002.jpg"):
        Image.new("RGB", (40, 30), "gray").save(tmp_path / "images" / name)
    return tmp_path


def write(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def errors_of(path: Path, **options: object) -> list[str]:
    return [str(error) for error in scan_records(path, "reports", options=options)[1]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16"])
def test_the_table_of_the_specification_loads_as_it_stands(folder: Path, encoding: str) -> None:
    records, errors = scan_records(write(folder, HEADER, SPEC_ROW, encoding=encoding), "reports")
    assert errors == []
    (record,) = records
    assert record.id == "0"
    assert record.images[0].path == str(folder / "images" / "001.jpg")
    assert [turn.role for turn in record.turns] == ["user", "assistant"]
    assert record.turns[0].content.count("<image>") == 1
    assert record.turns[1].content == ANSWER
    assert report_values(record) == {
        "风险描述": "厨房用水易溅入墙体造成墙体发霉",
        "风险等级": "轻微",
        "纠正和预防建议": "建议透底处补刷防水涂料",
        "缺陷描述": "厨房墙面防水涂料透底",
    }
    assert record.label is None
    assert record.group == "image:images/001.jpg"  # wherever the folder lies: splits go by it


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("7,images/none.jpg,a,b,轻微,c", ["table.csv:3", "record '7'", "image file does not exist", "images/none.jpg"]),
        ("7,,a,b,轻微,c", ["table.csv:3", "row without an image", "image_path"]),
        ("7,../x.jpg,a,b,轻微,c", ["table.csv:3", "leaves the data folder"]),
        ("7,images/002.jpg,,b,轻微,c", ["table.csv:3", "empty cell", "data_风险"]),
        ("7,images/002.jpg,a,b,一般,c", ["table.csv:3", "unknown risk level", "一般", "轻微, 中等, 严重", "level_map"]),
        ("7,images/002.jpg,a,b,轻微", ["table.csv:3", "row of 5 cells under a header of 6"]),
        ("7,images/002.jpg,a **风险等级**: 严重,b,轻微,c", ["table.csv:3", "could not be read back"]),
        (
            "7,images/no.jpg,,b,重度,c",
            ["table.csv:3", "3 problems", "empty cell in column 'data_风险'", "unknown risk level '重度'", "no.jpg"],
        ),
        ("0,images/002.jpg,a,b,轻微,c", ["table.csv:3", "id used twice"]),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(folder: Path, row: str, expected: list[str]) -> None:
    path = write(folder, HEADER, SPEC_ROW, row, SPEC_ROW.replace("0,", "9,", 1))
    records, errors = scan_records(path, "reports")
    assert [record.id for record in records] == ["0", "9"]
    (message,) = map(str, errors)
    assert "\n" not in message
    for words in expected:
        assert words in message


@pytest.mark.parametrize(
    ("renamed", "advice"),
    [
        (("image_id", "Image_ID"), "table.id_column: Image_ID"),  # not the nearest in letters, image_path
        (("data_风险等级", "风险等级"), "table.fields.风险等级: 风险等级"),  # data_风险 is another field's
        (("data_缺陷描述", "remarks"), "table.fields.缺陷描述: NAME"),
    ],
)
def test_a_missing_column_is_told_what_it_may_be_called(folder: Path, renamed: tuple[str, str], advice: str) -> None:
    records, errors = scan_records(write(folder, HEADER.replace(*renamed), SPEC_ROW), "reports")
    assert records == []
    assert advice in str(errors[0])


def test_other_columns_levels_and_a_template_of_ones_own(folder: Path) -> None:
    template = folder / "mine.yaml"
    template.write_text(
        "questions: ['Inspect <image>']\nunknown: n/a\nanswer: 'Severity: {severity} / Defect: {defect}'\n", "utf-8"
    )
    path = folder / "own.tsv"
    rows = [["photo", "grade", "what", "house"], ["images\\002.jpg", "HIGH", "crack", "h1"]]
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows(rows)
    options = {
        "id_column": None,
        "image_column": "photo",
        "group_column": "house",
        "fields": {"severity": "grade", "defect": "what"},
        "optional": [],
        "level_field": "severity",
        "levels": ["low", "high"],
        "level_map": {"HIGH": "high"},
        "template": str(template),
    }
    (record,), errors = scan_records(path, "reports", options=options)
    assert errors == []
    assert (record.id, record.group) == ("own:2", "h1")
    assert record.turns[1].content == "Severity: high / Defect: crack"


def test_images_may_name_the_folder_that_the_paths_begin_with(folder: Path) -> None:
    path = write(folder, HEADER, SPEC_ROW)
    (record,), errors = scan_records(path, "reports", root=folder / "images")
    assert errors == []
    assert Path(record.images[0].path or "").name == "001.jpg"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "photo"}, "column not in the table"),
        ({"id_column": "image_ID"}, "set table.id_column: image_id"),
        ({"fields": {"风险等级": "data_风险等级"}, "optional": []}, "unknown placeholder"),
        ({"level_field": "等级"}, "level_field is '等级'"),
        ({"levels": ["轻微"]}, "at least two"),
        ({"optional": ["x"]}, "optional names 'x'"),
        ({"level_map": {"轻度": "轻"}}, "level_map"),
        ({"template": "report_xx"}, "not built in"),
        ({"colums": {}}, "image_column"),
        ({"levels": "轻微"}, "expected a list"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(folder: Path, options: dict[str, object], words: str) -> None:
    (message,) = errors_of(write(folder, HEADER, SPEC_ROW), **options)
    assert words in message
    assert "\n" not in message


def test_a_column_of_an_optional_field_may_be_there(folder: Path) -> None:
    path = write(folder, HEADER + ",data_位置信息", SPEC_ROW + ",三楼厨房", SPEC_ROW.replace("0,", "1,", 1) + ",")
    records, errors = scan_records(path, "reports")
    assert errors == []
    assert [record.turns[1].content.rsplit(": ", 1)[1] for record in records] == ["三楼厨房", "未知"]


def test_options_of_the_format_are_the_settings() -> None:
    assert set(FORMATS["reports"].options) == set(ReportSettings.__dataclass_fields__)


# ---- template ----


def test_a_report_is_read_back_in_any_order_and_its_gaps_are_named() -> None:
    template = load_report_template("report_zh", list(ReportSettings().fields))
    exact = template.parse(ANSWER)
    assert exact.is_exact
    assert exact.missing == ()
    assert template.render(exact.fields) == ANSWER
    loose = template.parse("**缺陷描述**： 透底\n多一行\n**风险等级**:严重")
    assert loose.fields == {"缺陷描述": "透底\n多一行", "风险等级": "严重"}
    assert loose.missing == ("风险描述", "纠正和预防建议", "位置信息")
    assert not loose.is_exact
    assert template.parse("").fields == {}
    assert template.parse("**风险等级**: 轻微\n**风险等级**: 严重").fields["风险等级"] == "轻微"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("A: {a}", "{b} is missing"),
        ("A: {a} B: {b} C: {c}", "unknown placeholder {c}"),
        ("A: {a} B: {b} C: {a}", "stands twice"),
        ("A: {a}{b}", "no words before {b}"),
        ("{a} B: {b}", "no words before {a}"),
        ("x: {a}\nsize x: {b}", "also stand before"),
        ("A: {a} B: {b} {", "single brace"),
    ],
)
def test_a_template_that_cannot_be_filled_or_read_back_is_refused(tmp_path: Path, answer: str, words: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(f"questions: ['<image>?']\nunknown: '-'\nanswer: {answer!r}\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_report_template(str(path), ["a", "b"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "questions: [x]\nunknown: y\nanswer: z", "a: {", "questions: 1"])
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError):
        load_report_template(str(path), ["a"])


def test_reading_the_truth_of_another_record_gives_none(folder: Path) -> None:
    (record,) = scan_records(write(folder, "image_path,label", "images/001.jpg,0"))[0]
    assert report_values(record) is None
    assert isinstance(scan_records(folder / "none.csv", "reports")[1][0], DataFormatError)
