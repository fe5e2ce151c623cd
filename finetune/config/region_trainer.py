"""`trainer` of the region pipeline's YAML: arguments of `transformers.TrainingArguments`, each at its place in a run.

What a run has a key of its own for goes there, what it decides itself is accepted with that value only, and the rest
is passed on (`train.trainer_args`, whose names are checked against TrainingArguments before training).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finetune.errors import ConfigError, shorten

TRAINER_KEYS = {
    "num_train_epochs": "train.epochs", "max_steps": "train.max_steps", "learning_rate": "train.learning_rate",
    "per_device_train_batch_size": "train.batch_size", "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps", "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm", "warmup_ratio": "train.warmup_ratio", "warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.lr_scheduler", "gradient_checkpointing": "train.gradient_checkpointing",
    "eval_steps": "train.eval_steps", "save_total_limit": "train.save_total_limit",
    "logging_steps": "train.logging_steps", "report_to": "train.report_to",
    "metric_for_best_model": "train.metric_for_best", "resume_from_checkpoint": "train.resume", "seed": "seed",
    "output_dir": "output_dir", "dataloader_num_workers": "data.num_workers",
}  # fmt: skip
"""Argument -> key of a run that it sets."""

_DECIDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "eval_strategy": (("steps",), "validation runs every trainer.eval_steps steps, or leave out data.val_jsonl"),
    "save_strategy": (("steps",), "checkpoints are written every trainer.save_steps (else eval_steps) steps"),
    "load_best_model_at_end": ((True, False), "the best model is always kept, in output_dir/best"),
    "remove_unused_columns": ((False,), "the data has no columns to remove"),
}  # fmt: skip
"""Argument -> values that say what a run does in any case, and what that is."""
_ALIASES = {"evaluation_strategy": "eval_strategy"}


def trainer_settings(trainer: Mapping[str, Any], precision: str | None, where: str) -> Iterator[tuple[str, str, Any]]:
    """(argument, key of a run, value) of each argument that sets something.

    Args:
        precision: what the file's own `precision` says, None where it says nothing.

    Raises:
        ConfigError: a value that a run cannot have, or one that contradicts another key.
    """
    for name, value in trainer.items():
        known = _ALIASES.get(name, name)
        if known == "warmup_steps" and isinstance(value, float) and value < 1:
            yield name, "train.warmup_ratio", value  # as TrainingArguments reads it
        elif known in TRAINER_KEYS:
            yield name, TRAINER_KEYS[known], _VALUES.get(known, _same)(value)
        elif known in ("bf16", "fp16"):
            if bool(value) != (precision == known) and precision is not None:
                raise ConfigError(f"{where}: 'trainer.{name}' is {value} and 'precision' is {precision}; keep one")
            if value and precision is None:
                yield name, "train.precision", known
        elif known == "greater_is_better":
            metric = str(trainer.get("metric_for_best_model", "eval_loss"))
            if value is not None and bool(value) == ("loss" in metric):
                raise ConfigError(
                    f"{where}: 'trainer.{name}' is {value}, and the best model goes by {metric}; remove it"
                )
        elif known in _DECIDED:
            accepted, reason = _DECIDED[known]
            if value not in accepted:
                raise ConfigError(f"{where}: 'trainer.{name}' is {shorten(value)}; {reason}")
        else:
            yield name, f"train.trainer_args.{name}", value


def _same(value: Any) -> Any:
    return value


def _report_to(value: Any) -> Any:
    if value in (None, "none", "None"):
        return []
    return [value] if isinstance(value, str) else value


def _metric(value: Any) -> Any:
    return f"eval_{value}" if isinstance(value, str) and not value.startswith("eval_") else value


_VALUES: dict[str, Callable[[Any], Any]] = {
    "report_to": _report_to,
    "metric_for_best_model": _metric,
    "lr_scheduler_type": lambda value: "constant" if value == "constant_with_warmup" else value,
    "resume_from_checkpoint": lambda value: {True: "auto", False: None}.get(value, value),
}
