"""Callbacks: the time budget, and the best model with early stopping."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import ConfigError

logger = logging.getLogger(__name__)


class TimeBudgetCallback(TrainerCallback):
    """Stops training when the trainer's wall-clock budget is used up; all ranks follow rank 0's clock."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.budget.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        budget = self.trainer.budget
        if budget.seconds is None:
            return
        share = torch.tensor(budget.elapsed_share(), device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(share, src=0)
        budget.share = float(share)
        if budget.share >= 1:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning("time budget of %g s used up at step %d", budget.seconds, state.global_step)


class BestModelCallback(TrainerCallback):
    """Writes `best/` whenever an evaluation is the best so far, and stops after `patience` evaluations without one.

    Args:
        metric: name in the evaluation's metrics, e.g. `eval_score`; larger is better unless it ends in `loss`.
        patience: None for no early stopping.
    """

    def __init__(self, out_dir: str | Path, metric: str, patience: int | None) -> None:
        self.out_dir, self.metric, self.patience = Path(out_dir), metric, patience
        self.best: float | None = None
        self.bad_evaluations = 0
        self.trainer: Any = None

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
            raise ConfigError(f"train.metric_for_best '{self.metric}' is not among the evaluation's metrics: {known}")
        value = metrics[self.metric]
        sign = -1 if self.metric.endswith("loss") else 1
        if self.best is None or sign * value > sign * self.best:
            self.best, self.bad_evaluations = value, 0
            self._save(state, metrics)
            return
        self.bad_evaluations += 1
        if self.patience is not None and self.bad_evaluations >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "early stop at step %d: %d evaluations without a better %s than %.4f",
                    state.global_step, self.bad_evaluations, self.metric, self.best,
                )  # fmt: skip

    def _save(self, state: TrainerState, metrics: dict[str, float]) -> None:
        """Write to a sibling folder first, so that a crash leaves the previous best intact."""
        fresh = self.out_dir.with_name(self.out_dir.name + ".writing")
        self.trainer.save_model(str(fresh))
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "metric": self.metric, "value": self.best, "metrics": metrics}
        (fresh / "best.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        old = self.out_dir.with_name(self.out_dir.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.out_dir.exists():
            self.out_dir.rename(old)
        fresh.rename(self.out_dir)
        shutil.rmtree(old, ignore_errors=True)
