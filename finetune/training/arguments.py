"""`RunConfig` to `transformers.TrainingArguments`: the only place that knows both vocabularies."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from typing import Any

import torch

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

from transformers import TrainingArguments  # noqa: E402
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # noqa: E402

from finetune.config import RunConfig  # noqa: E402
from finetune.errors import ConfigError  # noqa: E402


def training_arguments(config: RunConfig) -> TrainingArguments:
    """The Trainer's arguments for a run; `train.trainer_args` overrides anything set here.

    Raises:
        ConfigError: `train.trainer_args` names no TrainingArguments field, or a value is refused.
    """
    train = config.train
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(config.output_dir, "tensorboard")
    has_cuda = torch.cuda.is_available()
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if has_cuda and torch.cuda.is_bf16_supported() else "fp32"
    known = _known()
    checkpointing = "activation" if "activation_checkpointing" in known else "gradient"  # renamed during 5.x
    arguments: dict[str, Any] = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "data_seed": config.seed,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.eval_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": train.warmup_ratio,  # a value below 1 is a share of all steps
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        f"{checkpointing}_checkpointing": train.gradient_checkpointing,
        f"{checkpointing}_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": "steps" if config.data.has_eval else "no",
        "eval_steps": train.eval_steps,
        "save_strategy": "steps",
        "save_steps": train.eval_steps,
        "save_total_limit": train.save_total_limit,
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,  # a non-finite loss must be seen, not replaced by the last finite one
        "report_to": train.report_to or ["none"],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_num_workers": config.data.num_workers,
        "dataloader_persistent_workers": bool(config.data.num_workers and config.train.feature_cache),  # they know keys
        "ddp_find_unused_parameters": False,
        "use_cpu": not has_cuda,
        "dataloader_pin_memory": has_cuda,
        "disable_tqdm": None,
    }
    for problem in trainer_argument_problems(config):
        raise ConfigError(problem)
    if "wandb" in train.report_to and importlib.util.find_spec("wandb") is None:
        raise ConfigError("train.report_to names wandb, which is not installed; pip install wandb, or remove it")
    try:
        result = TrainingArguments(**{**arguments, **train.trainer_args})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"the training arguments are refused: {' '.join(str(error).split())}") from error
    if result.n_gpu > 1:  # started without a launcher: DataParallel would split lists of masks and images wrongly
        result._n_gpu = 1
    return result


def trainer_argument_problems(config: RunConfig) -> list[str]:
    """What is wrong with the names in `train.trainer_args` and `train.report_to`, one line each."""
    known, problems = _known(), []
    for name in config.train.report_to:
        if name not in _REPORTERS:
            problems.append(f"train.report_to names '{name}'; choose from: {', '.join(sorted(_REPORTERS))}")
    for key in config.train.trainer_args:
        if key in _OF_OUR_SCHEDULE:
            problems.append(
                f"train.trainer_args.{key} would not be read: the schedule is a run's own; set {_OF_OUR_SCHEDULE[key]}"
            )
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"train.trainer_args: '{key}' is no field of transformers.TrainingArguments{advice}")
    return problems


_REPORTERS = {*INTEGRATION_TO_CALLBACK, "all", "none"}

_OF_OUR_SCHEDULE = {
    "lr_scheduler_type": "train.lr_scheduler",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps or train.warmup_ratio",
}


def _known() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments)}
