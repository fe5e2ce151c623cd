"""Region masking in a run: the order of the draws carries the progress, so worker processes and resumed runs agree.

What is hidden is `finetune.data.region_masking`'s part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config import RegionMaskingConfig, RunConfig
from finetune.data.dataset import ForensicDataset
from finetune.data.region_masking import Draw, RegionMasking
from finetune.training.sampling import ClassBalancedSampler


def masking_problems(config: RegionMaskingConfig) -> list[str]:
    """What is wrong with the settings, one line each."""
    problems = [
        f"region_masking.{name} is {getattr(config, name)}; expected a number from 0 to 1"
        for name in ("start_share", "end_share", "begin", "finish", "probability", "keep_tampered")
        if not 0 <= getattr(config, name) <= 1
    ]
    if config.begin > config.finish:
        problems.append(
            f"region_masking.begin is {config.begin}, after finish, {config.finish}; give them in order, 0 to 1"
        )
    if config.cell < 1:
        problems.append(f"region_masking.cell is {config.cell}; expected pixels, 28 for one image token")
    return problems


class NumberedSampler(Sampler[int]):
    """Another sampler's indices, each with its place among all draws of the run (epochs one after another)."""

    def __init__(self, inner: Sampler[int]) -> None:
        self.inner = inner
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        assert isinstance(self.inner, Sized)
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self)
        return iter([Draw(index, first + place) for place, index in enumerate(self.inner)])


class RegionMaskingCallback(TrainerCallback):
    """Tells the data set how many draws the run has, before its first worker starts."""

    def __init__(self, dataset: ForensicDataset, config: RunConfig) -> None:
        self.dataset, self.config = dataset, config

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.dataset.region_masking = RegionMasking(
            self.config.region_masking, self.config.seed, state.max_steps * per_step
        )


def shuffled(count: int, seed: int) -> ClassBalancedSampler:
    """Every record once an epoch, in an order that seed and epoch decide."""
    return ClassBalancedSampler([None] * count, seed=seed)
