"""The main job in small: tiny model, synthetic data, training through the entry script, evaluation, prediction."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A folder as `script/quickstart.sh` leaves it, from few images and steps; read only."""
    out = tmp_path_factory.mktemp("run")
    assert main(["tiny", "--out", str(out / "tiny")]) == 0
    synth = ["synth", "--out", str(out / "data"), "--num-train", "16", "--num-val", "6", "--num-eval", "6"]
    assert main([*synth, "--workers", "1"]) == 0
    overrides = [
        f"output_dir={out}",
        f"model.path={out}/tiny",
        f"data.train={out}/data/train.jsonl",
        f"data.eval={out}/data/val.jsonl",
        "train.max_steps=3",
        "train.eval_steps=2",
        "train.logging_steps=1",
        "train.batch_size=4",
        "train.eval_batch_size=4",
        "data.num_workers=0",
    ]
    result = subprocess.run(
        [sys.executable, "sft_llm.py", "--config", "configs/train/quickstart.yaml", *overrides],
        cwd=repo_root,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (out / "train.log").write_text(result.stdout)
    return out


def test_training_leaves_a_model_its_record_and_its_curves(run_dir: Path) -> None:
    assert (run_dir / "best" / "model.safetensors").is_file()
    settings = json.loads((run_dir / "best" / "forensics.json").read_text())
    assert settings["layout"] == "tokens_first"
    assert settings["polygon_coordinates"] == "absolute"
    assert settings["template"]["prompts"]
    record = json.loads((run_dir / "run_record.json").read_text())
    assert record["steps"] == 3
    assert len(record["config_hash"]) == 12
    history = json.loads((run_dir / "history.json").read_text())
    terms = {key for entry in history for key in entry}
    assert {"loss_text", "loss_dice", "loss_focal", "loss_authentic", "loss_boundary", "eval_recall_real"} <= terms
    assert list((run_dir / "tensorboard").rglob("events.out.tfevents.*"))
    assert "trainable:" in (run_dir / "train.log").read_text()


def test_evaluation_of_the_trained_model(run_dir: Path, tmp_path: Path) -> None:
    """On the annotation list too: the same images give the same numbers in both formats."""
    results = []
    for name, root in (("eval.jsonl", []), ("eval_annotations.json", ["--data-root", str(run_dir / "data")])):
        out = tmp_path / name
        arguments = ["evaluate", "--model", str(run_dir / "best"), "--data", str(run_dir / "data" / name), *root]
        assert main([*arguments, "--out", str(out), "--max-new-tokens", "4", "--no-baselines"]) == 0
        results.append(json.loads((out / "metrics.json").read_text()))
    for section in ("image", "localization", "authentic"):
        assert results[0][section] == results[1][section]
    assert results[0]["run"]["seed"] == 0
    assert results[0]["run"]["config_hash"] == json.loads((run_dir / "run_record.json").read_text())["config_hash"]
    report = (tmp_path / "eval.jsonl" / "report.html").read_text(encoding="utf-8")
    assert "Mask Dice loss" in report  # the training curves found their way in
    assert "<svg" in report


def test_predict_writes_masks_and_overlays(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "data" / "eval" / "images"
    arguments = ["predict", str(folder), "--model", str(run_dir / "best"), "--out", str(tmp_path), "--no-text"]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        stem = Path(line["mask_path"]).stem
        assert (tmp_path / "masks" / f"{stem}.png").is_file()
        assert (tmp_path / "overlays" / f"{stem}.png").is_file()
    assert capsys.readouterr().out.count("score") == 6


@pytest.mark.slow
def test_two_runs_of_one_seed_give_one_model(run_dir: Path, tmp_path: Path, repo_root: Path) -> None:
    """Fast enough for its budget, a run does not depend on the clock."""
    overrides = [
        f"output_dir={tmp_path}",
        f"model.path={run_dir}/tiny",
        f"data.train={run_dir}/data/train.jsonl",
        f"data.eval={run_dir}/data/val.jsonl",
        "train.max_steps=3",
        "train.eval_steps=2",
        "train.batch_size=4",
        "train.eval_batch_size=4",
        "data.num_workers=0",
    ]
    command = [sys.executable, "sft_llm.py", "--config", "configs/train/quickstart.yaml", *overrides]
    result = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = [(folder / "best" / "model.safetensors").read_bytes() for folder in (run_dir, tmp_path)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_quickstart_script_smoke(tmp_path: Path, repo_root: Path) -> None:
    """The user's own command, shortened: every step runs and every file is there."""
    result = subprocess.run(
        ["bash", "script/quickstart.sh", "--seconds", "20", "--out", str(tmp_path / "quick start")],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("best/model.safetensors", "metrics.json", "predictions.jsonl", "report.html", "run_record.json"):
        assert (tmp_path / "quick start" / name).is_file()
    assert "AUROC" in result.stdout
