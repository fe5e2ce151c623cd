"""predict, evaluate and chat on heads that read the vision tower: calibrated scores, no figures without a mask head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, logit

from finetune.cli import build_parser, main
from finetune.config import HeadsConfig, LoraConfig, ModelConfig
from finetune.errors import ConfigError
from finetune.inference.chat.contestants import contestants
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query
from finetune.metrics.calibration import Calibration
from finetune.models.adapters import set_trainable
from finetune.models.loading import load_bundle, save_bundle
from finetune.schema import ImageInput

TEMPERATURE = 4.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, two of them tampered with a mask, and their list `e.json`."""
    folder = tmp_path_factory.mktemp("general")
    entries = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (84, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        mask = np.zeros((84, 112), np.uint8)
        mask[20:60, 30:80] = 255
        Image.fromarray(mask).save(folder / f"{number}_mask.png")
        is_tampered = number % 2
        mask_path = f"{number}_mask.png" if is_tampered else "84x112"
        entries.append({"image_path": f"{number}.png", "mask_path": mask_path, "label": is_tampered})
    (folder / "e.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def calibrated(vision_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The heads of a stage with the calibration that a run writes beside them."""
    folder = tmp_path_factory.mktemp("calibrated") / "best"
    shutil.copytree(vision_parts, folder)
    Calibration(method="temperature", temperature=TEMPERATURE).save(folder / "calibration.json")
    return folder


@pytest.fixture(scope="module")
def stage_a(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads without a map, as stage A leaves them."""
    heads = HeadsConfig(source="vision", vision_layers=[0, 2], hidden_size=16, num_layers=1, num_heads=2, mask="none")
    folder = tmp_path_factory.mktemp("stage_a") / "best"
    save_bundle(load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32"), heads=heads), folder)
    return folder


@pytest.fixture(scope="module")
def talking(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with heads on the tower and LoRA of the language, and a calibration."""
    heads = HeadsConfig(source="vision", vision_layers=[0, 2], hidden_size=16, num_layers=1, num_heads=2)
    bundle = load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32", language="load"), heads=heads)
    folder = tmp_path_factory.mktemp("talking") / "adapter"
    save_bundle(set_trainable(bundle, ["neck", "cls_head", "mask_head", "lm_lora"], LoraConfig(r=2)), folder)
    Calibration(method="temperature", temperature=TEMPERATURE).save(folder / "calibration.json")
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


def evaluate(model: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    arguments = ["--model", str(model), "--data", str(data / "e.json"), "--out", str(out), "--device", "cpu", *more]
    assert main(["evaluate", *arguments]) == 0
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text("utf-8"))
    return metrics


def test_predict_gives_calibrated_scores_unless_told_otherwise(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(data / "0.png"), "--model", str(calibrated), "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "as_said")]) == 0
    assert "(uncalibrated 0." in capsys.readouterr().out
    assert main([*command, str(tmp_path / "own"), "--no-calibration"]) == 0
    assert "uncalibrated" not in capsys.readouterr().out
    (line,), (own,) = lines_of(tmp_path / "as_said"), lines_of(tmp_path / "own")
    assert own["score"] == own["raw_score"] == line["raw_score"] != line["score"]
    assert line["score"] == pytest.approx(expit(logit(line["raw_score"]) / TEMPERATURE), abs=1e-5)


def test_evaluate_measures_both(calibrated: Path, data: Path, tmp_path: Path) -> None:
    """The same calibrated figures as `vision evaluate`, and the heads' own beside them."""
    metrics = evaluate(calibrated, data, tmp_path / "as_said", "--no-baselines")
    own = evaluate(calibrated, data, tmp_path / "own", "--no-calibration", "--no-baselines")
    assert "image_uncalibrated" not in own
    assert metrics["image_uncalibrated"] == {name: own["image"][name] for name in metrics["image_uncalibrated"]}
    assert metrics["image"]["ece"] != own["image"]["ece"]
    config = {
        "head_checkpoint": str(calibrated), "ann_eval": str(data / "e.json"), "inference_output": str(tmp_path / "v"),
        "device": "cpu",
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["vision", "evaluate", "--config", str(tmp_path / "c.json")]) == 0
    vision = json.loads((tmp_path / "v" / "metrics.json").read_text("utf-8"))
    for section in ("image", "image_uncalibrated"):
        assert vision[section] == pytest.approx(metrics[section])
    assert [line["score"] for line in lines_of(tmp_path / "v")] == pytest.approx(
        [line["score"] for line in lines_of(tmp_path / "as_said")], abs=1e-5
    )


def test_chat_speaks_with_the_calibrated_score(talking: Path, data: Path) -> None:
    found = []
    for more in ((), ("--no-calibration",)):
        arguments = build_parser().parse_args(["chat", "--model", str(talking), "--device", "cpu", *more])
        models = contestants(arguments)
        speaker: Predictor = models.speaker(models.default)
        query = Query("q", (ImageInput(path=str(data / "0.png")),), ())
        ((prediction,),) = speaker.predict([query], with_text=False)
        found.append(prediction)
    assert found[0].raw_score == pytest.approx(found[1].score)
    assert found[0].score == pytest.approx(expit(logit(found[1].score) / TEMPERATURE), abs=1e-5)


def test_heads_alone_do_not_talk(calibrated: Path) -> None:
    models = contestants(build_parser().parse_args(["chat", "--merged", str(calibrated), "--device", "cpu"]))
    with pytest.raises(ConfigError, match=r"cannot talk; forensics vision infer IMAGE --chat"):
        models.speaker(models.default)


def test_without_a_mask_head_no_pixel_is_judged(
    stage_a: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pixel F1 of 0 would say that it marks nothing; it is said that it has no map."""
    metrics = evaluate(stage_a, data, tmp_path / "out")
    for section in ("localization", "authentic"):
        own = dict(metrics[section])
        assert own.pop("absent") == "no mask head"
        assert own.pop("n") == 0
        assert set(own.values()) == {None}
    assert "localization.f1" not in metrics["intervals"]
    assert metrics["baselines"]["ela"]["localization"]["n"] == 2
    printed = capsys.readouterr().out
    assert "Localisation (tampered images): no mask head, not measured" in printed
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "no mask head, not measured" in page
    assert "模型没有掩膜头" in page
    assert all(line["mask_path"] is None for line in lines_of(tmp_path / "out"))
