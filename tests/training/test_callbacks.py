"""The keeper of `best/`, early stopping and the printed lines, each driven by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.training.callbacks import BestModelCallback
from finetune.training.progress import evaluation_line, training_line


class FakeTrainer:
    """Saves a file that says which step it was saved at."""

    def __init__(self) -> None:
        self.step = 0
        self.fails = False

    def last_calibration(self) -> None:
        return None

    def save_model(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.fails:
            raise OSError("disk full")
        Path(folder, "weights").write_text(str(self.step))


def evaluate(callback: BestModelCallback, trainer: FakeTrainer, step: int, value: float) -> bool:
    """One evaluation; whether training is to stop."""
    trainer.step = step
    callback.trainer = trainer
    state: Any = SimpleNamespace(global_step=step, is_world_process_zero=True)
    control: Any = SimpleNamespace(should_training_stop=False)
    callback.on_evaluate(None, state, control, metrics={callback.metric: value})  # type: ignore[arg-type]
    return control.should_training_stop


def test_best_folder_holds_the_best_not_the_last(tmp_path: Path) -> None:
    callback, trainer = BestModelCallback(tmp_path / "best", "eval_score", patience=3), FakeTrainer()
    stops = [evaluate(callback, trainer, i + 1, v) for i, v in enumerate([0.5, 0.7, 0.6, float("nan"), 0.7])]
    assert stops == [False, False, False, False, True]  # an equal value is no improvement, NaN never is
    assert (tmp_path / "best" / "weights").read_text() == "2"
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert (record["step"], record["value"], record["metric"]) == (2, 0.7, "eval_score")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_losses_are_better_when_smaller_and_patience_starts_again(tmp_path: Path) -> None:
    for metric in ("eval_loss", "eval_loss_dice", "eval_false_positive_area"):
        callback, trainer = BestModelCallback(tmp_path / metric, metric, patience=2), FakeTrainer()
        assert not any(evaluate(callback, trainer, i, v) for i, v in enumerate([3.0, 4.0, 2.0, 2.5]))
        assert callback.best == 2.0
        assert evaluate(callback, trainer, 9, 2.0)


def test_first_value_nan_is_not_kept_for_ever(tmp_path: Path) -> None:
    callback, trainer = BestModelCallback(tmp_path / "best", "eval_score", patience=None), FakeTrainer()
    assert not any(evaluate(callback, trainer, i, v) for i, v in enumerate([float("nan"), 0.1, 0.0]))
    assert callback.best == 0.1


def test_a_crash_while_writing_leaves_the_old_best(tmp_path: Path) -> None:
    callback, trainer = BestModelCallback(tmp_path / "best", "eval_score", patience=None), FakeTrainer()
    evaluate(callback, trainer, 1, 0.1)
    trainer.fails = True
    with pytest.raises(OSError):
        evaluate(callback, trainer, 2, 0.2)
    assert (tmp_path / "best" / "weights").read_text() == "1"
    (tmp_path / "best.writing" / "half_written").write_text("x")
    trainer.fails = False
    evaluate(callback, trainer, 3, 0.3)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["best.json", "weights"]
    (tmp_path / "best").rename(tmp_path / "best.old")  # killed between the two renames
    state: Any = SimpleNamespace(log_history=[], is_world_process_zero=True, global_step=3)
    BestModelCallback(tmp_path / "best", "eval_score", patience=None).on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_resumed_run_remembers_its_best(tmp_path: Path) -> None:
    first, trainer = BestModelCallback(tmp_path / "best", "eval_score", patience=2), FakeTrainer()
    evaluate(first, trainer, 1, 0.8)
    history = [{"step": 1, "eval_score": 0.8}, {"step": 1, "loss": 1.0}, {"step": 2, "eval_score": 0.7}]
    resumed = BestModelCallback(tmp_path / "best", "eval_score", patience=2)
    state: Any = SimpleNamespace(log_history=history, is_world_process_zero=True, global_step=2)
    resumed.on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert (resumed.best, resumed.best_step, resumed.bad_evaluations) == (0.8, 1, 1)
    for rank, folder in ((0, "best"), (1, "best.old")):  # the other rank may look before or after it is renamed
        (tmp_path / "best").rename(tmp_path / "moving").rename(tmp_path / folder)
        other = BestModelCallback(tmp_path / "best", "eval_score", patience=2)
        other.on_train_begin(None, SimpleNamespace(**{**vars(state), "is_world_process_zero": rank == 0}), None)  # type: ignore[arg-type]
        assert (other.best, other.bad_evaluations) == (0.8, 1)
    (tmp_path / "best.old").rename(tmp_path / "best")
    state.global_step = 0  # gone back to a checkpoint before it
    resumed.on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert (resumed.best, resumed.best_step) == (None, -1)
    state.global_step = 2
    resumed.on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert evaluate(resumed, trainer, 3, 0.75)
    assert (tmp_path / "best" / "weights").read_text() == "1"


def test_unknown_metric_names_the_known_ones(tmp_path: Path) -> None:
    callback = BestModelCallback(tmp_path / "best", "eval_auroc", patience=None)
    state: Any = SimpleNamespace(global_step=1, is_world_process_zero=True)
    with pytest.raises(ConfigError, match="eval_loss, eval_score"):
        callback.on_evaluate(None, state, None, metrics={"eval_score": 1.0, "eval_loss": 2.0})  # type: ignore[arg-type]


def test_lines_are_readable() -> None:
    logs = {"loss": 2.3104, "grad_norm": 1.25, "learning_rate": 9e-4, "loss_text": 1.2, "loss_dice": 0.8, "epoch": 1.0}
    assert training_line(logs, 120, 500) == "step 120/500  loss 2.310 (text 1.200  dice 0.800)  lr 9.0e-04  grad 1.2"
    logs = {"eval_loss": 1.9, "eval_loss_text": 1.0, "eval_auroc": 0.8, "eval_recall_real": 0.75, "eval_runtime": 3.0}
    expected = "step 120/500  evaluation: loss 1.900 (text 1.000)  auroc 0.800  recall_real 0.750"
    assert evaluation_line(logs, 120, 500) == expected
