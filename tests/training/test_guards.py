"""A run that diverges stops at once and leaves the records of that step in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.config import RunConfig
from finetune.errors import TrainingDivergedError
from finetune.training.run import build_trainer


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_saves_the_records_of_the_step(make_config: Callable[..., RunConfig], what: str) -> None:
    config = make_config(train={"gradient_accumulation_steps": 2})
    trainer = build_trainer(config)[0]
    if what == "loss":
        with torch.no_grad():
            trainer.bundle.base.cls_head.out.weight.fill_(math.nan)
    else:
        trainer.bundle.base.cls_head.out.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDivergedError, match=f"{what} is not finite at step 1 .*diverged_rank0.json"):
        trainer.train()
    saved = json.loads(Path(config.output_dir, "diverged_rank0.json").read_text())
    assert saved["step"] == 1
    assert len(saved["records"]) == len(set(saved["records"])) == 4  # the whole accumulation window
    assert set(saved["records"]) <= {record.id for record in trainer.train_dataset.records}
    assert f"the {what} is not finite" in saved["reason"]
