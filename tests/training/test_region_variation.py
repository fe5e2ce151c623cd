"""Mirrored and shuffled records in a run: every epoch is another one, a resumed run trains on the same draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import RunConfig, load_config
from finetune.data.regions.wording import load_region_template
from finetune.models.groups import parameter_groups
from finetune.training.run import build_trainer, train

STEPS = 4  # two epochs of four records


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four records, each about three boxes of one picture."""
    folder = tmp_path_factory.mktemp("regions")
    template, found = load_region_template("en"), []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (84, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        types = {"R1": "crack", "R2": None, "R3": None}
        regions = [
            {"id": name, "box_xyxy": [9 * k, 5 * k, 9 * k + 40, 5 * k + 30], "type": kind}
            for k, (name, kind) in enumerate(types.items())
        ]
        turns = [("user", template.question()), ("assistant", template.answer(types))]
        found.append(
            {
                "id": f"wall{number}",
                "images": [f"{number}.png"],
                "messages": [{"role": role, "content": text} for role, text in turns],
                "provenance": {"task": "regions", "regions": regions, "positive_region_ids": ["R1"]},
            }
        )
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    return path


def config_for(repo_root: Path, tiny_dir: Path, lines: Path, out: Path, *more: str) -> RunConfig:
    changes = [
        f"output_dir={out}", f"model.path={tiny_dir}", f"data.train=[{lines}]", "data.eval=[]", "data.min_pixels=3136",
        "train.batch_size=2", f"train.max_steps={STEPS}", "train.muon_groups=[]", "train.logging_steps=1",
        "train.report_to=[]", "train.max_seconds=null", "train.trainer_args={disable_tqdm: true, save_steps: 2}",
    ]  # fmt: skip
    return load_config(repo_root / "configs/train/regions_tiny.yaml", [*changes, *more])


def draws(trainer: Any) -> list[list[int]]:
    """Ids of the records of the run's two epochs, record after record."""
    found = []
    sampler = trainer._get_train_sampler()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        found += [trainer.train_dataset[index].input_ids for index in sampler]
    return found


def test_every_epoch_is_another_one(repo_root: Path, tiny_dir: Path, lines: Path, tmp_path: Path) -> None:
    """The same in a second trainer, other in a second epoch; all of them other than the records as they are."""
    first, _, _ = build_trainer(config_for(repo_root, tiny_dir, lines, tmp_path / "a"))
    again, _, _ = build_trainer(config_for(repo_root, tiny_dir, lines, tmp_path / "b"))
    seen = draws(first)
    assert seen == draws(again)
    assert len({tuple(ids) for ids in seen}) > 5  # of 48 ways, eight draws
    plain = config_for(
        repo_root, tiny_dir, lines, tmp_path / "c", "data.mirror_regions=none", "data.shuffle_regions=false"
    )
    still, _, _ = build_trainer(plain)
    assert len({tuple(still.train_dataset[index].input_ids) for index in range(4)}) == 1  # their texts are the same
    assert type(still._get_train_sampler()).__name__ != "NumberedSampler"


def test_resumed_run_has_the_same_losses(repo_root: Path, tiny_dir: Path, lines: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train(config_for(repo_root, tiny_dir, lines, whole))
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4", ignore_errors=True)
    train(config_for(repo_root, tiny_dir, lines, cut, "train.resume=auto"))
    losses = [
        [entry["loss"] for entry in json.loads((out / "history.json").read_text("utf-8")) if "loss" in entry]
        for out in (whole, cut)
    ]
    assert len(losses[0]) == STEPS
    assert losses[1] == losses[0]


def test_the_features_are_a_group_that_moves(repo_root: Path, tiny_dir: Path, lines: Path, tmp_path: Path) -> None:
    """With a learning rate of its own; at rate 0 it stays at the zeros it begins with."""
    for rate, is_moved in (("1.0e-3", True), ("0.0", False)):
        changes = (
            f"train.group_learning_rates={{region_features: {rate}}}",
            "train.max_steps=1",
            "train.warmup_ratio=0",
        )
        trainer, _, _ = build_trainer(config_for(repo_root, tiny_dir, lines, tmp_path / rate, *changes))
        trainer.train()
        groups = parameter_groups(trainer.model, trainer.run_config.train.trainable)
        weights = dict(groups["region_features"])
        assert bool(weights["region_projection.out.weight"].any()) is is_moved
