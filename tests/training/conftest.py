"""Data, configurations and a runner for the training tests: everything is built here, nothing is downloaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import RunConfig, load_config

SMALL = {
    "model": {"dtype": "float32"},
    "heads": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "noise_residual": {"enabled": True, "channels": 8, "widths": [8, 8, 8], "global_blocks": 1},
    },
    "data": {"max_length": 1024, "max_polygon_points": 8, "max_pixels": 28 * 28 * 12},
    "train": {
        "trainable": ["cls_head", "mask_head", "noise_residual", "lm_full", "vision_full"],
        "batch_size": 2,
        "eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "eval_steps": 100,
        "report_to": [],
        "trainer_args": {"disable_tqdm": True},
    },
}


@pytest.fixture(autouse=True)
def _one_thread(_few_threads: None) -> None:
    """Models of this size only wait for a second thread."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def synth_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic data set: `train.jsonl` (12) and `eval.jsonl` (8), both classes; read only."""
    from finetune.data.synthesis.config import SynthConfig
    from finetune.data.synthesis.generator import synthesize

    folder = tmp_path_factory.mktemp("synth")
    config = SynthConfig(num_train=12, num_eval=8, workers=1, sizes_hw=((84, 112), (112, 84)))
    synthesize(config, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def mixed_records(photo_records: Path) -> Path:
    """Eight records of unequal answers, masks and image counts, in an order that matters.

    Split over two ranks by two, the first step gives rank 0 text only and rank 1 a tampered image and a pair (one of
    its images without mask); the second step gives rank 0 no tampered mask.
    """
    by_id = {record["id"]: record for record in map(json.loads, photo_records.read_text().splitlines())}
    long_answer = "Look at the noise, the shadows and the compression, then compare every region with its surroundings."
    turns = [{"role": "user", "content": "How do I start?"}, {"role": "assistant", "content": long_answer}]
    names = ["tampered_224x196", "pair", "real_112x252", "unmasked_140x84", "tampered_150x211", "real_84x140"]
    records = [by_id["text"], {"id": "text_long", "messages": turns}, *(by_id[name] for name in names)]
    for name, operation in (("tampered_224x196", "retouch"), ("pair", "splice")):  # of tampered_150x211 it is not known
        by_id[name]["provenance"] = {"operation": {"name": operation}}
    path = photo_records.with_name("mixed.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_small() -> Callable[..., Path]:
    """Writes `SMALL` with changes to a YAML file; returns its path."""

    def write(path: Path, **changes: Any) -> Path:
        path.write_text(yaml.safe_dump(merge(SMALL, changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_config(tmp_path: Path, tiny_dir: Path, synth_dir: Path) -> Callable[..., Path]:
    """Writes a YAML of a small run on the tiny model and the synthetic data; returns its path."""

    def write(name: str = "config", **changes: Any) -> Path:
        tree = merge(SMALL, {"output_dir": str(tmp_path / name), "model": {"path": str(tiny_dir)}})
        data = {split: [str(synth_dir / f"{split}.jsonl")] for split in ("train", "eval")}
        tree = merge(tree, {"data": data})
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge(tree, changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_config(write_config: Callable[..., Path]) -> Callable[..., RunConfig]:
    """The configuration `write_config` writes, loaded; `overrides` as on the command line."""

    def make(name: str = "config", overrides: Sequence[str] = (), **changes: Any) -> RunConfig:
        return load_config(write_config(name, **changes), overrides)

    return make


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged, everything else replaced."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
