"""Callbacks: the time budget, the sampler's epoch, and the best model with early stopping."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config.model_folder import CALIBRATION
from finetune.errors import ConfigError
from finetune.training.sampling import ClassBalancedSampler

logger = logging.getLogger(__name__)


class TimeBudgetCallback(TrainerCallback):
    """Stops training when the trainer's wall-clock budget is used up; all ranks follow rank 0's clock."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.restore_progress()  # the time used up before a resumption among it

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        budget = self.trainer.budget
        if budget.seconds is None:
            return
        share = torch.tensor(budget.elapsed_share(), device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(share, src=0)
        budget.share = float(share)
        if budget.share >= 1 and not control.should_training_stop:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning("time budget of %g s used up at step %d", budget.seconds, state.global_step)


class SamplerEpochCallback(TrainerCallback):
    """Tells the class-balanced sampler the epoch: accelerate does not reach it in a resumed run on several ranks."""

    def __init__(self, sampler: ClassBalancedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class BestModelCallback(TrainerCallback):
    """Writes `best/` whenever an evaluation is the best so far, and stops after `patience` evaluations without one.

    Args:
        metric: name in the evaluation's metrics, e.g. `eval_score`; larger is better unless it is a loss or an error.
        patience: None for no early stopping.
    """

    def __init__(self, out_dir: str | Path, metric: str, patience: int | None) -> None:
        self.out_dir, self.metric, self.patience = Path(out_dir), metric, patience
        self.sign = -1 if "loss" in metric or metric.endswith("false_positive_area") else 1
        self.best: float | None = None
        self.best_step = -1
        self.bad_evaluations = 0
        self.trainer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run takes up the best value and the patience from its history."""
        old, stored = self._old(), self._stored_step()
        if state.is_world_process_zero and old.is_dir() and not self.out_dir.exists():
            old.rename(self.out_dir)  # killed between the two renames of `_save`
        self.best, self.best_step, self.bad_evaluations = None, -1, 0
        if stored is not None:
            for entry in state.log_history:
                if self.metric in entry:
                    self._judge(entry[self.metric], entry["step"])
            if stored > state.global_step:  # of steps that are made again, maybe in another way: it does not count
                self.best, self.best_step = None, -1

    @property
    def is_out_of_patience(self) -> bool:
        """Whether early stopping ends the run here."""
        return self.patience is not None and self.bad_evaluations >= self.patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not metrics or self.metric not in metrics:
            known = ", ".join(sorted(metrics or {}))
            key = "train.metric_for_best" if self.out_dir.name == "best" else f"train.best_folders.{self.out_dir.name}:"
            raise ConfigError(f"{key} '{self.metric}' is not among the evaluation's metrics: {known}")
        if self._judge(metrics[self.metric], state.global_step):
            self._save(state, metrics)
        elif self.is_out_of_patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "early stop at step %d: %d evaluations without a better %s than %.4f",
                    state.global_step, self.bad_evaluations, self.metric, self.best,
                )  # fmt: skip

    def _judge(self, value: float, step: int) -> bool:
        """Whether a value is the best so far, remembered either way; NaN never is."""
        if math.isfinite(value) and (self.best is None or self.sign * value > self.sign * self.best):
            self.best, self.best_step, self.bad_evaluations = value, step, 0
            return True
        self.bad_evaluations += 1
        return False

    def _stored_step(self) -> int | None:
        """The step of the best model that is there, None without one; in this order every rank finds it, whenever rank
        0 renames."""
        for folder in (self._old(), self.out_dir):
            try:
                return int(json.loads((folder / "best.json").read_text(encoding="utf-8"))["step"])
            except FileNotFoundError:
                continue
        return None

    def _old(self) -> Path:
        return self.out_dir.with_name(self.out_dir.name + ".old")

    def _save(self, state: TrainerState, metrics: dict[str, float]) -> None:
        """Write to a sibling folder first, so that a crash leaves the previous best intact."""
        fresh = self.out_dir.with_name(self.out_dir.name + ".writing")
        old = self._old()
        if state.is_world_process_zero:
            shutil.rmtree(fresh, ignore_errors=True)  # what a crash left behind must not end up in the new folder
        self.trainer.save_model(str(fresh))
        if not state.is_world_process_zero:
            return
        calibration = self.trainer.last_calibration()
        if calibration is not None:
            calibration.save(fresh / CALIBRATION)
        record = {"step": state.global_step, "metric": self.metric, "value": self.best, "metrics": metrics}
        (fresh / "best.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if self.out_dir.exists():
            self.out_dir.rename(old)
        fresh.rename(self.out_dir)
        shutil.rmtree(old, ignore_errors=True)


class BestFolders(TrainerCallback):
    """Further folders beside `best/`, each kept by a metric of its own; one callback, since the Trainer wants no class
    twice.

    Args:
        metrics: folder name -> metric.
    """

    def __init__(self, out_dir: str | Path, metrics: Mapping[str, str]) -> None:
        self.keepers = [BestModelCallback(Path(out_dir) / name, metric, None) for name, metric in metrics.items()]
        self.trainer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for keeper in self.keepers:
            keeper.trainer = self.trainer
            keeper.on_train_begin(args, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for keeper in self.keepers:
            keeper.on_evaluate(args, state, control, metrics=metrics)
