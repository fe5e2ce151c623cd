"""`log.csv`: one row per evaluation, for a spreadsheet. Every other number is in history.json and TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "log.csv"
METRICS = {
    "auroc": "eval_auroc",
    "accuracy": "eval_accuracy",
    "balanced_accuracy": "eval_balanced_accuracy",
    "f1": "eval_f1",
    "iou": "eval_pixel_iou",
    "dice": "eval_pixel_f1",
    "false_positive_area": "eval_false_positive_area",
}
"""Column -> name of the metric. `f1` is of the images; `dice`, of the maps at 0.5, is the same number as pixel F1."""
COLUMNS = ("epoch", "step", "seconds", "learning_rate", "train_loss", "eval_loss", *METRICS)


class EvaluationTable(TrainerCallback):
    """Keeps `log.csv`; a resumed run goes on with the rows up to its step.

    Args:
        terms: loss terms with a weight; each has a column `eval_loss_TERM`.
    """

    def __init__(self, out_dir: str | Path, terms: Sequence[str]) -> None:
        self.path = Path(out_dir) / FILE
        self.columns = (*COLUMNS, *(f"eval_loss_{name}" for name in terms))
        self.rows: list[dict[str, str]] = []
        self.trainer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rows = []
        if self.trainer.resumed_from is not None and self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                found = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
            self.rows = [row for row in found if int(row["step"]) <= state.global_step]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the Trainer log before every evaluation, one at the run's end included: a row has a loss and a rate
        wherever `logging_steps` falls."""
        if control.should_evaluate or control.should_training_stop:
            control.should_log = True

    on_epoch_end = on_step_end

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        values = row(state.log_history, metrics or {}, state.global_step, self.trainer.budget.elapsed())
        self.rows = [old for old in self.rows if int(old["step"]) != state.global_step]
        self.rows.append({column: _written(values.get(column)) for column in self.columns})
        fresh = self.path.with_name(f"{self.path.name}.writing")
        with fresh.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        fresh.replace(self.path)  # a kill leaves the old one whole


def row(
    history: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], step: int, seconds: float
) -> dict[str, float | None]:
    """The values of an evaluation; None where the run has no such number.

    Args:
        history: the Trainer's log. `train_loss` is the mean over the steps since the evaluation before this one, of
            which each entry tells the mean since the entry before; `learning_rate` is the newest.
        metrics: of the evaluation. seconds: of training so far, evaluations included.
    """
    before = max((entry["step"] for entry in history if "eval_loss" in entry and entry["step"] < step), default=-1)
    logged = [entry for entry in history if "loss" in entry and entry["step"] <= step]
    num_steps = [entry["step"] - last for entry, last in zip(logged, [0, *(e["step"] for e in logged)], strict=False)]
    parts = [(entry["loss"], num) for entry, num in zip(logged, num_steps, strict=True) if entry["step"] > before]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    found: dict[str, float | None] = {
        "epoch": history[-1].get("epoch") if history else None,
        "step": step,
        "seconds": round(seconds, 1),
        "learning_rate": rates[-1] if rates else None,
        "train_loss": sum(loss * num for loss, num in parts) / sum(num for _, num in parts) if parts else None,
        **{column: metrics.get(name) for column, name in METRICS.items()},
    }
    return found | {name: value for name, value in metrics.items() if name.startswith("eval_loss")}


def _written(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"
