"""`forensics reports infer`: images, lists, tables, stored sets; the truth only with --compare-gt; a page to look at.

The model is tiny and untrained; where a report must be readable, its words are put into its mouth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.data.readers import read_records
from finetune.data.reports.table import report_values
from finetune.data.synthesis.wall_photos import write_wall_reports
from finetune.inference.predictor import Predictor
from finetune.metrics.reports import level_metrics

LEVELS = ["轻微", "中等", "严重"]


@pytest.fixture(scope="module")
def walls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walls")
    write_wall_reports(folder, 12, seed=2)
    return folder


@pytest.fixture(scope="module")
def stored(walls: Path) -> Path:
    arguments = [
        "--csv",
        str(walls / "table.csv"),
        "--out",
        str(walls / "set"),
        "--format",
        "parquet",
        "--workers",
        "1",
    ]
    assert main(["reports", "prepare", *arguments, "--set", "splits.ratios={train: 1.0}"]) == 0
    return walls / "set"


def infer(model: Path, out: Path, *more: object) -> int:
    arguments = ["--model", str(model), "--out", str(out), "--max-new-tokens", "4", "--device", "cpu"]
    return main(["reports", "infer", *map(str, more), *arguments])


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text("utf-8"))


@pytest.fixture
def speaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], list[str]]:
    """`speaks(answer)`: the model's text for the query of an id; returns the prompts it was given."""

    def use(answer: Callable[[str], str]) -> list[str]:
        asked: list[str] = []

        def write(_self: Any, queries: Sequence[Any], images: Sequence[Any], **_: Any) -> list[str]:
            assert len(queries) == len(images)
            asked.extend("".join(turn.content for turn in query.turns) for query in queries)
            return [answer(query.id) for query in queries]

        monkeypatch.setattr(Predictor, "write", write)
        return asked

    return use


def test_images_lists_and_folders_get_a_report_each(tiny_dir: Path, walls: Path, tmp_path: Path) -> None:
    """The model itself writes here, whatever it says."""
    listed = walls / "list.txt"
    listed.write_text("# two\nimages/0003.jpg\n\nimages/none.jpg\n", "utf-8")
    out = tmp_path / "out"
    assert infer(tiny_dir, out, walls / "images" / "0001.jpg", listed) == 1  # one of them is not there
    found = results(out)
    assert [Path(each["id"]).name for each in found["reports"]] == ["0001.jpg", "0003.jpg", "none.jpg"]
    assert (found["num_reports"], found["num_failed"], found["metrics"]) == (3, 1, None)
    assert "list.txt:4" in found["reports"][2]["error"]
    assert all("truth" not in each for each in found["reports"])
    page = (out / "report.html").read_text("utf-8")
    assert page.count("<article") == 3
    assert page.count("data:image/jpeg") == 2


def test_the_same_stored_set_twice_gives_the_same_reports(tiny_dir: Path, stored: Path, tmp_path: Path) -> None:
    assert infer(tiny_dir, tmp_path / "a", stored / "train", "--batch-size", 5) == 0
    assert infer(tiny_dir, tmp_path / "b", stored / "train-00000.parquet", "--batch-size", 12) == 0
    texts = [[each["text"] for each in results(tmp_path / name)["reports"]] for name in ("a", "b")]
    assert texts[0] == texts[1]


def test_a_perfect_model_is_found_perfect_and_never_sees_the_truth(
    tiny_dir: Path, stored: Path, tmp_path: Path, speaks: Any
) -> None:
    true = {record.id: record for record in read_records(stored / "train")}
    asked = speaks(lambda name: true[name].turns[1].content)
    assert infer(tiny_dir, tmp_path, stored / "train", "--compare_gt") == 0
    metrics = results(tmp_path)["metrics"]
    level = metrics["level"]
    assert (level["accuracy"], level["macro_f1"], level["quadratic_kappa"], level["n"]) == (1.0, 1.0, 1.0, 12)
    assert metrics["form"] == {"exact_form": 1.0, "complete": 1.0, "n": 12}
    assert metrics["fields"]["风险描述"] == {"exact": 1.0, "rouge_l": 1.0, "chrf": 1.0, "n": 12}
    assert metrics["fields"]["位置信息"]["n"] == 0  # the table says nothing of it
    assert len(asked) == 12
    for question in asked:
        assert "**" not in question


def test_gaps_and_unreadable_images_count_as_wrong(
    tiny_dir: Path, walls: Path, tmp_path: Path, speaks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (walls / "table.csv").read_text("utf-8").splitlines()
    table = walls / "some.csv"
    table.write_text("\n".join([*lines[:5], lines[5].replace("images/0004.jpg", "images/bad.jpg")]) + "\n", "utf-8")
    (walls / "images" / "bad.jpg").write_bytes(b"\xff\xd8\xff no picture")
    true = {record.id: report_values(record) or {} for record in read_records(table, "reports")}
    answers = {
        "0": f"**风险等级**: {true['0']['风险等级']}",
        "1": "",
        "2": "**风险等级**: 很重",
        "3": "**风险等级**： 严重",
    }
    speaks(lambda name: answers[name])
    assert infer(tiny_dir, tmp_path, table, "--images", walls, "--compare-gt") == 1
    found = results(tmp_path)
    expected = level_metrics(["轻微", None, None, "严重", None], [true[name]["风险等级"] for name in true], LEVELS)
    assert found["metrics"]["level"] == expected
    assert expected["n_graded"] == 2
    assert found["metrics"]["fields"]["缺陷描述"]["exact"] == 0.0
    assert found["metrics"]["fields"]["缺陷描述"]["n"] == 5
    assert found["reports"][0]["missing"] == ["风险描述", "纠正和预防建议", "缺陷描述", "位置信息"]
    assert "record '4'" in found["reports"][4]["error"]
    assert "record '4'" in capsys.readouterr().err


def test_levels_are_compared_through_the_level_map(tiny_dir: Path, stored: Path, tmp_path: Path, speaks: Any) -> None:
    speaks(lambda name: "**风险等级**: 轻度")
    more = ("--compare-gt", "--set", "table.level_map={轻度: 轻微}")
    assert infer(tiny_dir, tmp_path, stored / "train", *more) == 0
    found = results(tmp_path)
    assert {each["level"] for each in found["reports"]} == {"轻微"}
    assert found["metrics"]["level"]["accuracy"] == pytest.approx(found["metrics"]["fields"]["风险等级"]["exact"])
    assert found["metrics"]["level"]["quadratic_kappa"] == 0.0


def test_what_a_model_writes_cannot_break_the_page(tiny_dir: Path, stored: Path, tmp_path: Path, speaks: Any) -> None:
    speaks(lambda name: "**风险描述**: <script>alert(1)</script>\n**风险等级**: <b>严重</b>")
    assert infer(tiny_dir, tmp_path, stored / "train", "--compare-gt", "--max-samples", 3) == 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<article") == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("none.jpg",), "does not exist"),
        (("none.csv",), "data file not found"),
        (("none.txt",), "list of images not found"),
        (("IMAGES", "--compare-gt"), "found no true report"),
        (("IMAGES", "--set", "table.template=report_xx"), "not built in"),
        (("IMAGES", "a.jpg", "--compare-gt"), "one table or stored set"),
        (("IMAGES", "--set", "table.colums=1"), "unknown key 'table.colums'"),
    ],
)
def test_mistakes_are_one_line(
    tiny_dir: Path,
    walls: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = [str(walls / "images") if each == "IMAGES" else each for each in more]
    assert infer(tiny_dir, tmp_path / "out", *named) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1]
    assert not (tmp_path / "out").exists()
