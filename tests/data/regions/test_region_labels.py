"""Label lines of any spelling give the boxes that were meant; each problem names file, line, column and value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.regions.labels import parse_line, read_labels
from finetune.data.regions.settings import RegionsConfig
from finetune.errors import ConfigError, DataFormatError

CONFIG = RegionsConfig()
TWO = [(1190.0, 206.0, 1712.0, 377.0), (1813.0, 555.0, 1866.0, 636.0)]
FULL_WIDTH = str.maketrans({chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)})


def boxes(line: str, config: RegionsConfig = CONFIG) -> list[tuple[float, ...]]:
    found = parse_line(line, "a.txt:1", config, "a")
    assert found.problems == []
    return [box.box_xyxy for box in found.boxes]


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg ; 1190；206；1712；377  1813；555；1866；636 ; 裂缝",  # as the specification has it
        "a.jpg；1190；206；1712；377；1813；555；1866；636；裂缝",
        "a.jpg;1190,206,1712,377;1813,555,1866,636;裂缝",
        "a.jpg；1190，206，1712，377，1813，555，1866，636；裂缝",
        "a.jpg ; 1190、206、1712、377 1813、555、1866、636 ; 裂缝 ;",
        "a.jpg;１１９０，２０６，１７１２，３７７　１８１３，５５５，１８６６，６３６;裂缝",
        "a.jpg;1190.0, 206., 1712 ,377\t1813 555 1866 636;裂缝",
        "some/folder/a.JPG;1190 206 1712 377;1813 555 1866 636;裂缝",
        "a;1190;206;1712;377;1813;555;1866;636;裂缝",
    ],
)
def test_every_spelling_of_two_boxes(line: str) -> None:
    found = parse_line(line, "a.txt:1", CONFIG, "a")
    assert found.problems == []
    assert [box.box_xyxy for box in found.boxes] == TWO
    assert {box.defect_type for box in found.boxes} == {"裂缝"}


def test_types_keep_their_wording() -> None:
    for kind in ("裂缝（竖向）", "2级裂缝", "3", "裂缝;渗水", "crack; level 3", "no. 4"):
        (box,) = parse_line(f"a.jpg;1,2,30,40;{kind}", "a.txt:1", CONFIG, "a").boxes
        assert box.defect_type == kind


def test_centre_and_size_by_configuration() -> None:
    assert boxes("a.jpg;50,40,20,10;x", RegionsConfig(coords_are_xyxy=False)) == [(40, 35, 60, 45)]


def test_other_column_separators() -> None:
    config = RegionsConfig(column_delim="|", inner_coord_delims=",")
    assert boxes("a.jpg | 1,2,30,40 | x", config) == [(1, 2, 30, 40)]
    assert boxes("a.jpg\t1,2,30,40\tx", RegionsConfig(column_delim="\t")) == [(1, 2, 30, 40)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.jpg", ["line of 1 columns", "a.jpg", "column_delim"]),
        ("a.jpg;1,2,30,40", ["line of 2 columns", "filename ; coords ; defect_type"]),
        ("a.jpg;1;2;30;40", ["3 numbers make no boxes", "field 'coords'", "1;2;30", "third column"]),
        ("a.jpg;1,2o,30,40;x", ["not a number", "field 'coords'", "'2o'"]),
        ("a.jpg;1；2o；30；40；x", ["not a number", "'2o'"]),
        ("a.jpg;1,2,30,40,50;x", ["5 numbers make no boxes", "x1, y1, x2, y2"]),
        ("a.jpg;;x", ["0 numbers make no boxes"]),
        ("a.jpg;1,2,30,40; ", ["no defect type", "field 'defect_type'"]),
        ("b.jpg;1,2,30,40;x", ["line about another image", "field 'filename'", "'b.jpg'", "a.*"]),
        ("a.jpg;30,2,1,40;x", ["box without an area", "'30, 2, 1, 40'", "x1 < x2", "coords_are_xyxy"]),
        ("a.jpg;١,2,30,40;x", ["not a number"]),
    ],
)
def test_a_problem_names_line_column_and_value(line: str, expected: list[str]) -> None:
    (problem,) = parse_line(line, "a.txt:7", CONFIG, "a").problems
    assert "a.txt:7" in str(problem)
    for part in expected:
        assert part in str(problem)


def write(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path = folder / "a.txt"
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    found = read_labels(write(tmp_path, "a.jpg；1，2，30，40；裂缝", encoding=encoding), (100, 100), CONFIG)
    assert [(box.box_xyxy, box.defect_type) for box in found.boxes] == [((1, 2, 30, 40), "裂缝")]


def test_what_is_cut_left_out_or_written_twice_is_said(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jpg;-5,10,50,120;x",
        "",
        "a.jpg;10,10,14,60;x",
        "a.jpg;60,60,90,90 60,60,90,90;x",
        "a.jpg;300,10,350,40;x",
        "a.jpg;60,60,90,90;y",
    )
    found = read_labels(path, (100, 200), CONFIG)
    assert [box.box_xyxy for box in found.boxes] == [(0, 10, 50, 100), (60, 60, 90, 90)]
    assert found.too_small == [(10, 10, 14, 60)]
    assert found.num_lines == 5
    notes = "\n".join(map(str, found.notes))
    for part in (
        "a.txt:1): box cut at the edge of 200x100 to 0, 10, 50, 100",
        "a.txt:3): box too small",
        "a.txt:4): box already",
    ):
        assert part in notes
    problems = "\n".join(map(str, found.problems))
    for part in ("a.txt:5): box outside the image", "a.txt:6): one box of two types: x (a.txt:4) and y"):
        assert part in problems


def test_a_file_without_lines_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="label file without a line"):
        read_labels(write(tmp_path, " ", ""), (10, 10), CONFIG)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"column_delim": ""}, "column_delim is empty"),
        ({"inner_coord_delims": [".", ","]}, "may not hold digits"),
        ({"val_ratio": 0.5}, "add up to 1"),
        ({"max_boxes_per_image": 0}, "max_boxes_per_image is 0"),
        ({"label_map": {"x": "normal"}}, "sends 'x' to 'normal'"),
        ({"normal_decoys_per_image": -1}, "normal_decoys_per_image is -1"),
    ],
)
def test_settings_that_cannot_be_used(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RegionsConfig(**values)


NUMBERS = st.one_of(st.integers(0, 5000), st.integers(0, 50000).map(lambda n: n / 10))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_separators_and_widths_give_the_same_boxes(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4))
    wanted = [(float(x), float(y), float(x + w + 1), float(y + h + 1)) for x, y, w, h in drawn]
    separator = st.text(st.sampled_from("；;，,、 　\t"), min_size=1, max_size=3)
    column = st.sampled_from((";", "；", " ; ", " ； ", "　;"))
    kind = data.draw(st.sampled_from(("裂缝", "渗水", "spall 2", "3", "Ｘ")))
    numbers = [f"{number:g}" if number == int(number) else repr(number) for box in wanted for number in box]
    numbers = [text.translate(FULL_WIDTH) if data.draw(st.booleans()) else text for text in numbers]
    coords = numbers[0] + "".join(data.draw(separator) + number for number in numbers[1:])
    line = f"a.jpg{data.draw(column)}{coords}{data.draw(column)}{kind}"
    found = parse_line(line, "a.txt:1", CONFIG, "a")
    assert found.problems == []
    assert [box.box_xyxy for box in found.boxes] == wanted
    assert {box.defect_type for box in found.boxes} == {kind}


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("a.jpg;；,，、 　\t0１2-+x裂缝|()"), max_size=40))
def test_any_line_gives_boxes_or_a_problem(line: str) -> None:
    found = parse_line(line, "a.txt:1", CONFIG)
    assert bool(found.boxes) or bool(found.problems)
    assert all(box.box_xyxy[0] < box.box_xyxy[2] and box.defect_type for box in found.boxes) or found.problems
