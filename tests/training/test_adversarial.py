"""Attacked batches raise the loss within their radius, leave no gradient behind, and train like any other."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config import AdversarialConfig, RunConfig, load_config
from finetune.errors import ConfigError
from finetune.losses.criterion import total
from finetune.training.adversarial import Attack, attacked
from finetune.training.evaluation import forward
from finetune.training.run import build_trainer, train
from finetune.training.trainer import ForensicTrainer

Make = Callable[..., RunConfig]
STAGE_2 = ["new_tokens", "cls_head", "mask_head", "noise_residual", "lm_lora"]
KINDS = [
    AdversarialConfig(target=target, method=method, norm=norm, radius=radius, steps=3)
    for target, radius in (("features", 0.2), ("pixels", 4.0))
    for method in ("fgsm", "pgd")
    for norm in ("linf", "l2")
]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, synth_dir: Path, write_small: Callable[..., Path]
) -> tuple[ForensicTrainer, dict[str, Any]]:
    """A little trained (stage 2 on a frozen tower), and its first batch of two images with text."""
    torch.set_num_threads(1)  # fixtures of a module come before the one that sets it for each test
    out = tmp_path_factory.mktemp("attacked")
    path = write_small(
        out / "run.yaml",
        output_dir=str(out / "run"),
        model={"path": str(tiny_dir)},
        data={"train": [str(synth_dir / "train.jsonl")]},
        train={"trainable": STAGE_2, "max_steps": 10, "learning_rate": 5.0e-3, "logging_steps": 10, "batch_size": 4},
    )
    trainer = build_trainer(load_config(path))[0]
    trainer.train()
    trainer.model.eval()  # no dropout: the loss is a function of the input alone
    return trainer, trainer.data_collator([trainer.train_dataset[i] for i in (0, 1, 2)])


def loss_function(trainer: ForensicTrainer) -> Callable[[dict[str, Any]], Tensor]:
    def loss_of(batch: dict[str, Any]) -> Tensor:
        return total(trainer.criterion(forward(trainer.model, batch), batch))[0]

    return loss_of


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.target} {c.method} {c.norm}")
def test_the_attacked_loss_is_higher(
    config: AdversarialConfig, trained: tuple[ForensicTrainer, dict[str, Any]]
) -> None:
    """Higher than the clean one, and than that of random changes as large; inside the radius; nothing left behind."""
    trainer, batch = trained
    loss_of = loss_function(trainer)
    attack = Attack(config, trainer.bundle.base, seed=0)
    trainer.model.zero_grad(set_to_none=True)
    changed, _ = attack.perturb(batch, loss_of)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    noise = attack._start(batch, (5,), is_random=True)
    noise = [config.radius * part.sign() for part in noise]
    with torch.no_grad():
        clean, attacked = float(loss_of(batch)), float(loss_of(changed))
        random = float(loss_of(attack._changed(batch, noise)))
    print(f"{config.target} {config.method} {config.norm}: {clean:.4f} -> {attacked:.4f}, random {random:.4f}")
    assert attacked > clean * 1.01
    assert attacked > random
    assert_within(config, batch, changed, attack)


def assert_within(config: AdversarialConfig, batch: dict[str, Any], changed: dict[str, Any], attack: Attack) -> None:
    sizes = attack._sizes(batch)
    if config.target == "features":
        changes = [changed["vision_offsets"].embeds, *changed["vision_offsets"].patches]
    else:
        std = torch.tensor(attack.base.config.image_std).view(1, 3, 1, 1, 1)
        moved = (changed["pixel_values"] - batch["pixel_values"]).view(-1, 3, 2, 14, 14)
        assert torch.equal(moved[:, :, 0], moved[:, :, 1])  # both frames of a still image
        changes = [moved[:, :, :1] * 255 * std]
        levels = changed["pixel_values"].view(-1, 3, 2, 14, 14) * std
        levels = levels + torch.tensor(attack.base.config.image_mean).view(1, 3, 1, 1, 1)
        assert float(levels.min()) >= -1e-5
        assert float(levels.max()) <= 1 + 1e-5
    for change, own in zip(changes, sizes, strict=True):
        for part in change.split(list(own)):
            size = part.abs().max() if config.norm == "linf" else part.square().mean().sqrt()
            assert float(size) <= config.radius * 1.001
            assert float(size) > 0


def test_more_steps_find_more(trained: tuple[ForensicTrainer, dict[str, Any]]) -> None:
    trainer, batch = trained
    loss_of = loss_function(trainer)
    found = []
    for steps in (1, 8):
        config = AdversarialConfig(radius=0.2, steps=steps, step_size=0.3, random_start=False)
        changed, first = Attack(config, trainer.bundle.base, seed=0).perturb(batch, loss_of)
        with torch.no_grad():
            assert first == pytest.approx(float(loss_of(batch)), rel=1e-5)  # begins at the clean batch
            found.append(float(loss_of(changed)))
    assert found[1] > found[0]


def test_text_only_batch_is_left_alone(trained: tuple[ForensicTrainer, dict[str, Any]]) -> None:
    trainer, batch = trained
    text = {key: value for key, value in batch.items() if not key.startswith(("pixel", "image_grid"))}
    changed, _ = Attack(AdversarialConfig(), trainer.bundle.base, seed=0).perturb(text, loss_function(trainer))
    assert changed is text


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_share_of_micro_batches(share: float, trained: tuple[ForensicTrainer, dict[str, Any]]) -> None:
    attack = Attack(AdversarialConfig(share=share), trained[0].bundle.base, seed=0)
    hits = [attack.hits(number) for number in range(1000)]
    assert sum(hits) == round(1000 * share)
    assert all(abs(sum(hits[i : i + 10]) - 10 * share) <= 1 for i in range(0, 1000, 10))


def test_attacks_train_under_accumulation_and_are_repeatable(make_config: Make, tmp_path: Path) -> None:
    """Two runs agree in every number; only what is declared moves; the rise of the loss is logged."""
    section = {"trainable": STAGE_2, "max_steps": 3, "gradient_accumulation_steps": 2, "batch_size": 2}
    adversarial = {"share": 0.5, "radius": 0.2, "steps": 2}
    histories = []
    for name in ("one", "two"):
        train(make_config(name, train=section, adversarial=adversarial))
        histories.append(json.loads((tmp_path / name / "history.json").read_text()))
    for ours, theirs in zip(*histories, strict=True):
        for key in ("loss", "grad_norm", "adversarial_gain"):
            assert ours.get(key) == theirs.get(key)
    gains = [entry["adversarial_gain"] for entry in histories[0] if "adversarial_gain" in entry]
    assert len(gains) == 3  # one of the two micro-batches of every step
    assert min(gains) > 0


def test_gradient_is_that_of_the_changed_batch_alone(make_config: Make) -> None:
    """What the search for the change computed is not in the gradient of the step."""
    config = make_config(train={"trainable": STAGE_2}, adversarial={"share": 1.0, "radius": 0.1}, lora={"dropout": 0.0})
    trainer = build_trainer(config)[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])
    trainer.model.train()
    counts = trainer.criterion.counts(batch)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    trainer.window_place = 0
    changed, _ = attacked(trainer, batch, counts)
    trainer.attack = None
    trainer.compute_loss(trainer.model, changed, num_items_in_batch=counts).backward()
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_two_ranks_attack_as_one(write_config: Callable[..., Path], repo_root: Path, tmp_path: Path) -> None:
    """The search runs outside DDP: no gradient of it is exchanged, so two ranks of two equal one of four."""
    section = {"trainable": STAGE_2, "max_steps": 3, "trainer_args": {"train_sampling_strategy": "sequential"}}
    changes: dict[str, Any] = {
        "data": {"class_balanced": False, "eval": []},
        "lora": {"dropout": 0.0},
        "adversarial": {"share": 1.0, "method": "fgsm", "radius": 0.1},
    }
    train(load_config(write_config("one", train={**section, "batch_size": 4}, **changes)))
    path = write_config("two", train={**section, "batch_size": 2}, **changes)
    tools = repo_root / ".venv" / "bin"
    accelerate = str(tools / "accelerate") if (tools / "accelerate").is_file() else "accelerate"
    file = repo_root / "configs" / "accelerate" / "cpu_ddp.yaml"
    launch = [accelerate, "launch", "--quiet", "--config_file", str(file), "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, str(repo_root / "sft_llm.py"), "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (
        [e for e in json.loads((tmp_path / name / "history.json").read_text()) if "loss" in e]
        for name in ("one", "two")
    )
    assert len(ours) == len(theirs) == 3
    for one, two in zip(ours, theirs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "adversarial.share is 1.5"),
        ({"share": 0.5, "radius": 0.0}, "adversarial.radius is 0.0"),
        ({"share": 0.5, "steps": 0}, "adversarial.steps is 0"),
        ({"share": 0.5, "step_size": -1.0}, "adversarial.step_size is -1.0"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, float], message: str, make_config: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        build_trainer(make_config(adversarial=settings))
