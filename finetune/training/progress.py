"""What a training run prints: a progress bar where there is a terminal, one line per logging step and evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = ("score", "auroc", "balanced_accuracy", "recall_real", "recall_fake", "pixel_f1", "false_positive_area")


class ProgressLines(TrainerCallback):
    """Replaces the Trainer's own progress and printer callbacks, which print dictionaries."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.last: tuple[int, float] = (0, 0.0)  # step and time of the last training line
        self.evaluated = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True,
                disable=True if args.disable_tqdm else None, leave=False,
            )  # fmt: skip
        self.last = (state.global_step, time.monotonic())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None:
            self.evaluated += 1
            self.bar.set_postfix_str(f"evaluating, batch {self.evaluated}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        now = time.monotonic()
        if "loss" in logs:
            steps = max(state.global_step - self.last[0], 1)
            speed = (now - self.last[1]) / steps
            tqdm.write(f"{training_line(logs, state.global_step, state.max_steps)}  {speed:.2f} s/step")
            self.last = (state.global_step, now)
        elif "eval_loss" in logs:
            tqdm.write(evaluation_line(logs, state.global_step, state.max_steps))
            self.last = (self.last[0], self.last[1] + logs.get("eval_runtime", 0.0))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.evaluated = 0
        if self.bar is not None:
            self.bar.set_postfix_str("")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def training_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """`step 120/500  loss 2.310 (text 1.20  dice 0.80)  lr 9.0e-04  grad 1.3`."""
    parts = [f"step {step}/{max_steps}", f"loss {logs['loss']:.3f}{_terms(logs, 'loss_')}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    if "grad_norm" in logs:
        parts.append(f"grad {logs['grad_norm']:.2g}")
    return "  ".join(parts)


def evaluation_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """`step 120/500  evaluation: loss 1.900 (text 1.00)  score 0.71  auroc 0.80  recall_real 0.75 ...`."""
    parts = [f"step {step}/{max_steps}", f"evaluation: loss {logs['eval_loss']:.3f}{_terms(logs, 'eval_loss_')}"]
    parts += [f"{name} {logs[f'eval_{name}']:.3f}" for name in _SHOWN if f"eval_{name}" in logs]
    return "  ".join(parts)


def _terms(logs: Mapping[str, Any], prefix: str) -> str:
    terms = [f"{key.removeprefix(prefix)} {value:.3f}" for key, value in logs.items() if key.startswith(prefix)]
    return f" ({'  '.join(terms)})" if terms else ""
