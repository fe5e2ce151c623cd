"""Nothing that a user made, or that is being read, is written over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.cli import main
from finetune.errors import ConfigError
from finetune.inference.output import PredictionWriter
from finetune.inference.replacing import begins_with_key, is_page, refuse_foreign
from finetune.inference.visualization import is_marked, save_mask_png
from finetune.schema import Prediction

FAST = ("--device", "cpu", "--no-text")


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    """A set of the layout authentic/ tampered/ masks/ with two images of each class."""
    rng = np.random.default_rng(0)
    for folder in ("authentic", "tampered", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for name in ("a", "b"):
        for kind in ("authentic", "tampered"):
            pixels = rng.integers(0, 255, (56, 84, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / kind / f"{name}{kind[0]}.png")
        mask = np.zeros((56, 84), np.uint8)
        mask[10:30, 20:50] = 255
        Image.fromarray(mask).save(tmp_path / "set" / "masks" / f"{name}t.png")
    return tmp_path / "set"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_true_masks_are_not_replaced(own_set: Path, saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once they were, silently, and the next evaluation found a pixel F1 of 1."""
    before = contents(own_set)
    model = ["--model", str(saved_model), *FAST]
    assert main(["evaluate", "--data", str(own_set), "--out", str(own_set), *model, "--no-baselines"]) == 2
    assert "is read here, and" in capsys.readouterr().err
    assert main(["predict", str(own_set / "tampered"), "--out", str(own_set), *model]) == 2
    assert "no run wrote it" in capsys.readouterr().err
    assert contents(own_set) == before


def test_a_prediction_goes_over_earlier_ones_and_not_into_an_evaluation(
    own_set: Path, saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(saved_model), *FAST]
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["predict", str(own_set / "tampered"), "--out", str(out), *model]) == 0
    (out / "predictions.jsonl").write_text("")  # as a killed run leaves it
    assert main(["predict", str(own_set / "tampered"), "--out", str(out), *model]) == 0
    evaluated = tmp_path / "evaluated"
    evaluate = ["evaluate", "--data", str(own_set), "--out", str(evaluated), *model, "--no-baselines"]
    assert main(evaluate) == 0
    capsys.readouterr()
    assert main(["predict", str(own_set / "tampered"), "--out", str(evaluated), *model]) == 2
    assert "holds an evaluation" in capsys.readouterr().err
    assert len((evaluated / "predictions.jsonl").read_text().splitlines()) == 4
    (own_set / "masks" / "at.png").write_bytes(b"damaged")
    assert main(evaluate) == 2  # found before anything is touched
    assert (evaluated / "metrics.json").is_file()


def test_figures_of_an_earlier_evaluation_do_not_stand_beside_other_predictions(
    own_set: Path, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = ["evaluate", "--data", str(own_set), "--out", str(tmp_path / "e"), "--model", str(saved_model), *FAST]
    assert main([*evaluate, "--no-baselines"]) == 0

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.evaluation.evaluate.report_sample", stop)
    main([*evaluate, "--no-baselines"])
    left = {path.name for path in (tmp_path / "e").iterdir()}
    assert "predictions.jsonl" in left
    assert not left & {"metrics.json", "report.html"}


def test_only_marked_or_listed_pictures_are_replaced(tmp_path: Path) -> None:
    found = Prediction("a", "a", 1, 0.75, np.zeros((5, 7), np.float32), (), "", False, (5, 7))
    (tmp_path / "masks").mkdir()
    Image.new("L", (7, 5)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(ConfigError, match=r"a\.png would be replaced"), PredictionWriter(tmp_path) as writer:
        writer.write(found)
    line = json.dumps({"id": "a", "mask_path": "masks/a.png"})
    (tmp_path / "predictions.jsonl").write_text(line + "\n")  # of a version whose pictures had no mark
    with PredictionWriter(tmp_path) as writer:
        writer.write(found)
    assert is_marked(tmp_path / "masks" / "a.png")
    (tmp_path / "predictions.jsonl").unlink()
    with PredictionWriter(tmp_path) as writer:
        writer.write(found)
    save_mask_png(np.zeros((4, 4)), tmp_path / "b.png")
    assert is_marked(tmp_path / "b.png")
    assert not is_marked(tmp_path / "predictions.jsonl")
    assert not is_marked(tmp_path / "nothing.png")


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_a_script_of_dialogues_is_not_replaced_by_its_answers(
    option: str, photo_records: Path, saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    shutil.copy(photo_records, data)
    command = ["chat", "--model", str(saved_model), "--script", str(data), "--data-root", str(photo_records.parent)]
    outputs = {"--out": str(tmp_path / "answers.jsonl"), "--html": str(tmp_path / "page.html")}
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "mine"}\n')
    for target, words in ((data, "is read here and would be replaced"), (other, "exists and is no")):
        before = target.read_bytes()
        given = [part for name, path in (outputs | {option: str(target)}).items() for part in (name, path)]
        assert main([*command, *given]) == 2
        assert words in capsys.readouterr().err
        assert target.read_bytes() == before


def test_a_page_of_records_does_not_replace_them(
    photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    shutil.copy(photo_records, data)
    root = ["--data-root", str(photo_records.parent), "--num", "1"]
    assert main(["preview", str(data), "--html", str(data), *root]) == 2
    assert "is read here" in capsys.readouterr().err
    assert data.read_bytes() == photo_records.read_bytes()
    for _ in range(2):  # its own page again
        assert main(["preview", str(data), "--html", str(tmp_path / "p.html"), *root]) in (0, 1)


def test_how_files_are_known(tmp_path: Path) -> None:
    assert is_page("<!DOCTYPE html>\n<html>")
    assert not is_page("mine")
    assert begins_with_key('{"turns": []}\n{"x"', "turns")
    assert begins_with_key('{"id": "a", "turns": [' + "1, " * 40_000, "turns")  # cut off within the first line
    for other in ("", "[]", '{"id": 1}', "turns"):
        assert not begins_with_key(other, "turns")
    (tmp_path / "empty").write_text("")
    refuse_foreign(tmp_path / "empty", "--out", is_page, "page")
    refuse_foreign(tmp_path / "none", "--out", is_page, "page")
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        refuse_foreign(tmp_path, "--out", is_page, "page")


def test_an_empty_path_is_not_the_working_directory(saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "", "--model", str(saved_model)]) == 2
    assert "an image with an empty path" in capsys.readouterr().err
