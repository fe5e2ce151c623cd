"""`forensics regions evaluate`: the threshold comes from validation records only, the test file waits until it stands.

The model is tiny and untrained; where verdicts must be good, their scores are put in its place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.cli import main
from finetune.config import HeadsConfig, LoraConfig, ModelConfig
from finetune.data.regions.wording import RegionFinding, parse_answer, write_answer
from finetune.data.synthesis.surface_defects import write_surface_samples
from finetune.evaluation.regions.sets import region_labels
from finetune.inference.regions.predictor import RegionPredictor, WrittenAnswer
from finetune.models.adapters import set_trainable
from finetune.models.loading import load_bundle, save_bundle
from finetune.schema import Record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, val and test.jsonl about drawn surfaces; read only."""
    folder = tmp_path_factory.mktemp("regions")
    write_surface_samples(folder / "raw", scenes=9, per_scene=1, side=96)
    config = (
        f"abnormal_dir={folder}/raw/abnormal", f"normal_dir={folder}/raw/normal", f"out_dir={folder}/set",
        "train_ratio=0.34", "val_ratio=0.33", "test_ratio=0.33",
    )  # fmt: skip
    assert main(["regions", "prepare", "--set", *config]) == 0
    assert main(["regions", "build", "--template", "en", "--set", *config]) == 0
    return folder / "set"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def evaluate(model: Path, out: Path, *more: object) -> int:
    arguments = ("--model", model, "--out", out, "--max-new-tokens", 4, "--device", "cpu", *more)
    return main(["regions", "evaluate", *map(str, arguments)])


def both(data: Path) -> tuple[object, ...]:
    return ("--val", data / "val.jsonl", "--test", data / "test.jsonl")


Knows = Callable[[Callable[[str, bool], float], Callable[[dict[str, str | None]], str]], list[str]]


@pytest.fixture
def knows(monkeypatch: pytest.MonkeyPatch) -> Knows:
    """`knows(score, answer)`: scores by (region id, is abnormal), answers by the true types; returns records seen."""

    def use(score: Callable[[str, bool], float], answer: Callable[[dict[str, str | None]], str]) -> list[str]:
        asked: list[str] = []

        def sample(self: Any, record: Record, picture: Any, verdicts: Any = None) -> Any:
            made = original(self, record, picture, verdicts)
            made.truth = region_labels(record)
            return made

        def read(_self: Any, samples: Sequence[Any], ids: Sequence[Sequence[str]]) -> list[dict[str, float]]:
            assert [list(each.truth) for each in samples] == [list(names) for names in ids]
            asked.extend(each.record_id for each in samples)
            return [{name: score(name, kind is not None) for name, kind in each.truth.items()} for each in samples]

        def write(self: Any, samples: Sequence[Any], verdicts: Any) -> list[WrittenAnswer]:
            texts = [(answer(each.truth), list(each.truth)) for each in samples]
            return [WrittenAnswer(text, parse_answer(text, names), True) for text, names in texts]

        original = RegionPredictor.region_sample
        monkeypatch.setattr(RegionPredictor, "read_verdicts", read)
        monkeypatch.setattr(RegionPredictor, "region_sample", sample)
        monkeypatch.setattr(RegionPredictor, "write_answers", write)
        return asked

    return use


def true_answer(types: dict[str, str | None], confidence: float = 0.75) -> str:
    findings = [RegionFinding(name, kind, confidence, "seen") for name, kind in types.items() if kind is not None]
    return write_answer({name: kind is not None for name, kind in types.items()}, findings)


def test_the_model_itself_from_files_to_files(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(tiny_dir, out, *both(data), "--max-regions", 2) == 0
    assert "a model that was not trained on it" in capsys.readouterr().err
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    chosen = json.loads((out / "threshold.json").read_text("utf-8"))
    assert metrics["threshold"]["value"] == chosen["value"]
    assert 0.4 <= chosen["value"] <= 0.8
    assert len(chosen["images"]) == len(lines(data / "val.jsonl"))
    test = lines(data / "test.jsonl")
    regions = {(row["id"], region["id"]): region for row in test for region in row["provenance"]["regions"]}
    found = lines(out / "predictions.jsonl")
    assert [(row["record"], row["id"]) for row in found] == list(regions)
    for row in found:
        region = regions[row["record"], row["id"]]
        assert row["box_xyxy"] == region["box_xyxy"]  # pixels of the original image
        assert (row["label"], row["true_type"]) == (int(region["type"] is not None), region["type"])
        assert 0 < row["probability"] < 1
        assert row["verdict"] == ("abnormal" if row["probability"] >= chosen["value"] else "normal")
    assert metrics["test"]["roi"]["n"] == len(found)
    assert metrics["test"]["num_images"] == len(test)
    assert metrics["test"]["answers"]["n"] > len(test)  # several questions about some images
    assert metrics["run"]["versions"]["torch"] == torch.__version__
    assert len((out / "sweep.csv").read_text("utf-8-sig").splitlines()) == 22
    page = (out / "report.html").read_text("utf-8")
    assert page.count("<article") == len(test)
    assert page.count("data:image/jpeg") == len(test)
    assert "http" not in page.replace("http-equiv", "")


def test_a_model_that_knows_is_found_to_know(
    tiny_dir: Path, data: Path, tmp_path: Path, knows: Knows, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = knows(lambda name, is_abnormal: 0.7 if is_abnormal else 0.52, true_answer)
    assert evaluate(tiny_dir, tmp_path / "out", *both(data)) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text("utf-8"))
    assert metrics["threshold"]["value"] == 0.54  # the lowest that leaves the normal ones alone
    for part in (metrics["val"], metrics["test"]):
        assert (part["roi"]["f1"], part["roi"]["auroc"], part["image"]["f1"]) == (1.0, 1.0, 1.0)
        form = part["answers"]
        assert form == {"exact": 1.0, "parsed": 1.0, "finished": 1.0, "n": part["num_images"]}
        assert all(
            found == {"regions": found["regions"], "recall": 1.0, "named": 1.0} for found in part["types"].values()
        )
        positive, n = part["roi"]["n_positive"], part["roi"]["n"]
        calibration = part["calibration"]
        assert calibration["token"]["ece"] == pytest.approx((0.3 * positive + 0.52 * (n - positive)) / n)
        assert calibration["written"] == {"ece": 0.25, "token_ece": pytest.approx(0.3), "n": positive}
        assert part["intervals"]["roi.f1"] == [1.0, 1.0]
    assert len(asked) == len(lines(data / "val.jsonl")) + len(lines(data / "test.jsonl"))
    assert "warning" not in capsys.readouterr().err
    rows = [row for row in lines(tmp_path / "out/predictions.jsonl") if row["label"]]
    assert {(row["confidence"], row["reason"]) for row in rows} == {(0.75, "seen")}
    assert all(row["type"] == row["true_type"] for row in rows)


def test_what_is_chosen_on_validation_is_fixed_for_test(
    tiny_dir: Path, data: Path, tmp_path: Path, knows: Knows
) -> None:
    """Scores whose best threshold is another one on the test file."""
    test = {row["id"] for row in lines(data / "test.jsonl")}
    seen: list[str] = []

    def score(name: str, is_abnormal: bool) -> float:
        is_test = len(seen) > len(lines(data / "val.jsonl"))
        return (0.45 if is_abnormal else 0.41) if is_test else (0.7 if is_abnormal else 0.6)

    seen = asked = knows(score, true_answer)
    assert evaluate(tiny_dir, tmp_path / "out", *both(data)) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text("utf-8"))
    assert metrics["threshold"]["value"] == 0.62
    assert metrics["test"]["threshold"] == 0.62
    assert metrics["test"]["roi"]["recall"] == 0.0
    assert metrics["test"]["roi"]["auroc"] == 1.0
    assert test <= set(asked)


def test_the_test_file_is_read_when_the_threshold_stands(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A test file that is no JSON is noticed only then."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{no json\n", "utf-8")
    assert evaluate(tiny_dir, tmp_path / "out", "--val", data / "val.jsonl", "--test", broken) == 2
    assert "broken.jsonl" in capsys.readouterr().err
    assert (tmp_path / "out/threshold.json").is_file()
    assert not (tmp_path / "out/metrics.json").exists()
    missing = ("--val", data / "val.jsonl", "--test", tmp_path / "none.jsonl")
    assert evaluate(tiny_dir, tmp_path / "other", *missing) == 2
    assert not (tmp_path / "other").exists()  # whether it is there can be asked without reading it


def test_files_of_another_split_are_refused(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, test, train = (data / f"{name}.jsonl" for name in ("val", "test", "train"))
    assert evaluate(tiny_dir, tmp_path / "a", "--val", test, "--test", val) == 2
    error = capsys.readouterr().err
    assert "provenance.split: test" in error
    assert "a threshold is never chosen on test records" in error
    assert not (tmp_path / "a").exists()
    assert evaluate(tiny_dir, tmp_path / "b", "--threshold", 0.5, "--test", train) == 2
    assert "provenance.split: train" in capsys.readouterr().err
    assert evaluate(tiny_dir, tmp_path / "c", "--threshold", 0.5, "--test", train, "--any-split") == 0
    assert "holds records of train" not in capsys.readouterr().err
    assert evaluate(tiny_dir, tmp_path / "d", "--val", train, "--test", test) == 0
    assert "holds records of train" in capsys.readouterr().err


def test_images_and_groups_in_both_files_are_refused(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, test = lines(data / "val.jsonl"), lines(data / "test.jsonl")
    first = val[0]
    copy = tmp_path / "copy.jpg"
    shutil.copyfile(data / first["images"][0], copy)
    provenance = {**first["provenance"], "split": "test"}
    as_copy = {**first, "id": "copied", "group": "", "images": [str(copy)], "provenance": provenance}
    for row in test:
        row["images"] = [str(data / row["images"][0])]
    same_image = write_lines(tmp_path / "image.jsonl", [*test, as_copy])
    assert evaluate(tiny_dir, tmp_path / "a", "--val", data / "val.jsonl", "--test", same_image) == 2
    error = capsys.readouterr().err
    assert "record 'copied'" in error
    assert "copy.jpg" in error
    same_group = write_lines(tmp_path / "group.jsonl", [{**test[0], "group": first["group"]}, *test[1:]])
    found = tmp_path / "a/threshold.json"
    assert evaluate(tiny_dir, tmp_path / "b", "--threshold-from", found, "--test", same_group) == 2
    assert f"group '{first['group']}'" in capsys.readouterr().err


def test_a_threshold_of_an_earlier_evaluation(
    tiny_dir: Path, tiny_untied_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tiny_dir, tmp_path / "a", *both(data)) == 0
    later = ("--threshold-from", tmp_path / "a/threshold.json", "--test", data / "test.jsonl")
    assert evaluate(tiny_dir, tmp_path / "b", *later) == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text("utf-8")) for name in ("a", "b")]
    assert metrics[0]["test"] == metrics[1]["test"]
    assert metrics[1]["val"] is None
    assert "was chosen with another model" not in capsys.readouterr().err
    assert evaluate(tiny_untied_dir, tmp_path / "c", *later) == 0
    assert "was chosen with another model" in capsys.readouterr().err
    (tmp_path / "wrong.json").write_text('{"value": 3}', "utf-8")
    wrong = ("--threshold-from", tmp_path / "wrong.json", "--test", data / "test.jsonl")
    assert evaluate(tiny_dir, tmp_path / "d", *wrong) == 2
    assert "expected a number between 0 and 1" in capsys.readouterr().err


def test_records_that_cannot_be_used_are_named_and_counted(
    tiny_dir: Path, data: Path, tmp_path: Path, knows: Knows, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lines(data / "test.jsonl")
    for row in rows:
        row["images"] = [str(data / row["images"][0])]
    bad = next(row for row in rows if row["provenance"]["positive_region_ids"])
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no picture")
    bad["images"] = [str(tmp_path / "bad.jpg")]
    without = {**rows[0], "id": "unlabelled", "provenance": {"regions": rows[0]["provenance"]["regions"]}}
    confused = {**rows[0], "id": "confused"}
    confused["provenance"] = {**rows[0]["provenance"], "positive_region_ids": ["R99"]}
    path = write_lines(tmp_path / "test.jsonl", [*rows, without, confused])
    knows(lambda name, is_abnormal: 0.9 if is_abnormal else 0.1, true_answer)
    assert evaluate(tiny_dir, tmp_path / "out", "--threshold", 0.5, "--test", path) == 1
    errors = capsys.readouterr().err
    for words in (f"record '{bad['id']}'", "'unlabelled'", "'confused'", "R99"):
        assert words in errors
    found = json.loads((tmp_path / "out/metrics.json").read_text("utf-8"))["test"]
    assert (found["num_images"], found["num_failed"], found["num_rejected"]) == (len(rows), 1, 2)
    positive = sum(len(row["provenance"]["positive_region_ids"]) for row in rows)
    missed = len(bad["provenance"]["positive_region_ids"])
    assert found["roi"]["recall"] == pytest.approx((positive - missed) / positive)
    assert found["calibration"]["token"]["n"] == found["roi"]["n"] - len(bad["provenance"]["regions"])
    predictions = [row for row in lines(tmp_path / "out/predictions.jsonl") if row["record"] == bad["id"]]
    assert len(predictions) == len(bad["provenance"]["regions"])
    assert all(row["verdict"] is None and "bad.jpg" in row["error"] for row in predictions)
    assert [row["record"] for row in lines(tmp_path / "out/answers.jsonl")][-2:] == ["unlabelled", "confused"]
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert "bad.jpg" in page


def test_a_validation_file_without_an_abnormal_region(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in lines(data / "val.jsonl") if not row["provenance"]["positive_region_ids"]]
    for row in rows:
        row["images"] = [str(data / row["images"][0])]
    quiet = write_lines(tmp_path / "quiet.jsonl", rows)
    assert evaluate(tiny_dir, tmp_path / "out", "--val", quiet, "--test", data / "test.jsonl") == 2
    assert "no positive region" in capsys.readouterr().err


def test_an_output_folder_belongs_to_one_evaluation(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--threshold", 0.5, "--test", data / "test.jsonl", "--max-samples", 1)
    assert evaluate(tiny_dir, tmp_path / "out", *given) == 0
    assert evaluate(tiny_dir, tmp_path / "out", *given) == 2
    assert "add --overwrite" in capsys.readouterr().err
    own = tmp_path / "out/threshold.json"
    again = ("--threshold-from", own, "--test", data / "test.jsonl", "--max-samples", 1, "--overwrite")
    assert evaluate(tiny_dir, tmp_path / "out", *again) == 0
    assert json.loads(own.read_text("utf-8"))["value"] == 0.5


def test_a_merged_model_says_what_its_adapter_said(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """Text only, with LoRA on the language model, as the phases of region training leave it."""
    bundle = load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32"), heads=HeadsConfig(enabled=False))
    bundle = set_trainable(bundle, ["lm_lora"], LoraConfig(r=4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    save_bundle(bundle, tmp_path / "adapter")
    assert main(["merge", "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    given = ("--threshold", 0.5, "--test", data / "test.jsonl")
    assert evaluate(tmp_path / "adapter", tmp_path / "a", *given) == 0
    assert evaluate(tmp_path / "merged", tmp_path / "b", *given) == 0
    assert evaluate(tiny_dir, tmp_path / "c", *given, "--adapter", tmp_path / "adapter") == 0
    assert evaluate(tiny_dir, tmp_path / "d", *given) == 0
    odds = {}
    for name in "abcd":
        scores = np.array([row["probability"] for row in lines(tmp_path / name / "predictions.jsonl")])
        odds[name] = np.log(scores) - np.log1p(-scores)
    np.testing.assert_allclose(odds["b"], odds["a"], atol=1e-3)
    np.testing.assert_allclose(odds["c"], odds["a"], atol=1e-5)
    assert np.abs(odds["d"] - odds["a"]).max() > 0.1  # the adapter does something
