"""Reports train as the LoRA configuration says, from a stored set; the merged model writes what the adapter writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config import load_config
from finetune.data.synthesis.wall_photos import write_wall_reports

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def walls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walls")
    write_wall_reports(folder, 8, seed=4)
    arguments = ["--csv", str(folder / "table.csv"), "--out", str(folder / "set"), "--format", "parquet"]
    more = ["--workers", "1", "--set", "splits.ratios={train: 0.7, val: 0.3}"]
    assert main(["reports", "prepare", *arguments, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(walls: Path, tiny_dir: Path) -> Path:
    """Trained for two steps at a rate that moves it."""
    overrides = [
        f"output_dir={walls / 'run'}",
        f"model.path={tiny_dir}",
        "model.dtype=float32",
        f"data.train=[{walls / 'set' / 'train'}]",
        f"data.eval=[{walls / 'set' / 'val'}]",
        "data.num_workers=0",
        "data.image_cache_megabytes=8",
        "train.precision=fp32",
        "train.max_steps=2",
        "train.gradient_accumulation_steps=1",
        "train.learning_rate=0.01",
        "train.text_retention=false",
        "train.gradient_checkpointing=false",
        "train.report_to=[]",
    ]
    assert main(["train", "--config", str(ROOT / "configs" / "train" / "reports_lora.yaml"), *overrides]) == 0
    return walls / "run" / "best"


def texts(model: Path, walls: Path, out: Path) -> list[str]:
    arguments = ["--model", str(model), "--out", str(out), "--max-new-tokens", "24", "--device", "cpu"]
    assert main(["reports", "infer", str(walls / "set" / "train"), *arguments, "--compare-gt"]) == 0
    return [each["text"] for each in json.loads((out / "results.json").read_text("utf-8"))["reports"]]


def test_the_configuration_is_that_of_the_specification() -> None:
    config = load_config(ROOT / "configs" / "train" / "reports_lora.yaml")
    assert (config.lora.r, config.lora.alpha, config.train.learning_rate) == (64, 128, 5e-6)
    assert not config.heads.enabled
    assert config.train.metric_for_best == "eval_loss"


def test_lora_is_on_every_projection_of_the_language_model_and_on_nothing_else(adapter: Path) -> None:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = {name.rsplit(".lora_", 1)[0] for name in file.keys()}  # noqa: SIM118  (no mapping)
    found = {name.rsplit(".", 1)[1] for name in names}
    assert found == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all("language_model" in name and "visual" not in name for name in names)
    stored = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    assert (stored["r"], stored["lora_alpha"]) == (64, 128)


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_merged_model_writes_the_same_reports(
    adapter: Path, walls: Path, tiny_dir: Path, tmp_path: Path, plain: bool
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(adapter), "--out", str(merged), *(["--plain"] if plain else [])]) == 0
    written = texts(adapter, walls, tmp_path / "a")
    assert texts(merged, walls, tmp_path / "b") == written
    assert texts(tiny_dir, walls, tmp_path / "c") != written  # the adapter does something
