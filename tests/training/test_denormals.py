"""Training on a CPU does not compute with denormal numbers; ordinary ones are what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from finetune.config import RunConfig
from finetune.training.denormals import denormals_dropped
from finetune.training.run import build_trainer

from transformers import TrainerCallback  # isort: skip


def test_numbers_too_small_to_matter_count_as_zero() -> None:
    small, ordinary = torch.full((64,), 2e-38), torch.linspace(-3, 3, 64)
    before = ordinary.exp() * 0.1
    with denormals_dropped(torch.device("cpu")):
        assert (small * 0.1 == 0).all()
        assert torch.equal(ordinary.exp() * 0.1, before)
    assert (small * 0.1 > 0).all()  # the process that trained is as it was
    with denormals_dropped(torch.device("meta")):
        assert (small * 0.1 > 0).all()


class Looks(TrainerCallback):
    """Notes before every step whether small numbers are dropped."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.found.append(bool((torch.full((64,), 2e-38) * 0.1 == 0).all()))


def test_every_step_is_taken_like_that(make_config: Callable[..., RunConfig]) -> None:
    """Whoever calls the trainer: a run that is killed in a test computes as the one that goes on."""
    trainer = build_trainer(make_config(train={"trainable": ["cls_head"]}))[0]
    looks = Looks()
    trainer.add_callback(looks)
    trainer.train()
    assert looks.found == [True, True]
    assert (torch.full((64,), 2e-38) * 0.1 > 0).all()
