"""What can be known to be wrong with a run's configuration before a model or a data file is opened."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.config import RunConfig, stage_runs
from finetune.data.template import load_template, template_problem
from finetune.errors import ConfigError
from finetune.losses.criterion import TERMS
from finetune.models.groups import EXCLUSIVE, GROUPS
from finetune.schema import Record
from finetune.training.adversarial import adversarial_problems
from finetune.training.arguments import trainer_argument_problems
from finetune.training.evaluation import METRICS
from finetune.training.feature_cache import cache_problems
from finetune.training.ranges import range_problems
from finetune.training.region_masking import masking_problems
from finetune.training.search_cache import search_cache_problems


def check_run(config: RunConfig) -> None:
    """Raise the first of `run_problems`.

    Raises:
        ConfigError: as a user can cause it, one line.
    """
    for problem in run_problems(config):
        raise ConfigError(problem)


def check_best(config: RunConfig, records: Sequence[Record]) -> None:
    """What the best models are chosen by can be measured on these validation records.

    Raises:
        ConfigError: the AUROC is asked for, and the images of the records are all real or all tampered.
    """
    asked = {"train.metric_for_best": config.train.metric_for_best}
    asked |= {f"train.best_folders.{name}": metric for name, metric in config.train.best_folders.items()}
    labels = {target.label for record in records for target in record.targets} - {None}
    key = next((key for key, metric in asked.items() if metric == "eval_auroc"), None)
    if key is not None and len(labels) == 1:
        found = "tampered" if labels == {1} else "real"
        raise ConfigError(
            f"{key} is eval_auroc, which needs real and tampered images, and all labelled images of data.eval are "
            f"{found}; give a validation set with both, or another metric, e.g. eval_loss"
        )


def run_problems(config: RunConfig) -> list[str]:
    """Every problem that the configuration alone tells of, one line each; [] when there is none."""
    if config.stages:
        return [f"stage '{run.name}': {problem}" for run in stage_runs(config) for problem in run_problems(run.config)]
    return [
        *_group_problems(config),
        *range_problems(config),
        *_length_problems(config),
        *trainer_argument_problems(config),
        *_metric_problems(config),
        *_data_problems(config),
        *_heads_problems(config),
        *_resume_problems(config),
        *_template_problems(config),
        *masking_problems(config.region_masking),
        *(adversarial_problems(config.adversarial) if config.adversarial.share else []),
    ]


def _group_problems(config: RunConfig) -> list[str]:
    train = config.train
    problems = [
        f"train.trainable names '{group}'; {_advice(group, GROUPS)}" for group in train.trainable if group not in GROUPS
    ]
    for one, other, reason in EXCLUSIVE:
        if one in train.trainable and other in train.trainable:
            problems.append(f"train.trainable names both {one} and {other}; choose one: {reason}")
    if not train.trainable:
        problems.append(f"train.trainable is empty, so nothing would train; name some of: {', '.join(GROUPS)}")
    for field, groups in (("group_learning_rates", train.group_learning_rates), ("muon_groups", train.muon_groups)):
        problems += [
            f"train.{field} names '{group}', which does not train; {_advice(group, train.trainable)}"
            for group in groups
            if group not in train.trainable
        ]
    return problems


def _length_problems(config: RunConfig) -> list[str]:
    """A run that would not end, or not learn."""
    train = config.train
    problems = []
    if train.max_steps == -1 and not train.epochs > 0:
        problems.append(f"train.epochs is {train.epochs}; expected a number above 0, or set train.max_steps")
    if not any(getattr(config.loss, name) for name in TERMS):
        problems.append(f"every weight under loss is 0; set one of: {', '.join(TERMS)}")
    return problems


def _metric_problems(config: RunConfig) -> list[str]:
    train = config.train
    problems = []
    metrics = [f"eval_{name}" for name in (*METRICS, *(f"loss_{term}" for term in TERMS))]
    if train.metric_for_best not in metrics:
        problems.append(
            f"train.metric_for_best is '{train.metric_for_best}'; {_advice(train.metric_for_best, metrics)}"
        )
    if train.early_stopping_patience is not None and not config.data.has_eval:
        problems.append("train.early_stopping_patience needs data.eval: without it nothing is evaluated")
    for folder, metric in train.best_folders.items():
        if metric not in metrics:
            problems.append(f"train.best_folders.{folder} is '{metric}'; {_advice(metric, metrics)}")
        if not re.fullmatch(r"best_\w+", folder):
            problems.append(f"train.best_folders names '{folder}'; expected a name like best_val_auc")
    for name, is_set in (("best_folders", train.best_folders), ("heatmap_snapshots", train.heatmap_snapshots)):
        if is_set and not config.data.has_eval:
            problems.append(f"train.{name} needs data.eval or data.val_ratio: without one nothing is evaluated")
    return problems


def _data_problems(config: RunConfig) -> list[str]:
    data = config.data
    problems = []
    if data.max_pixels < data.min_pixels:
        problems.append(f"data.max_pixels is {data.max_pixels}; expected at least data.min_pixels, {data.min_pixels}")
    share = config.heads.noise_residual.similarity_share
    if not 0 <= share <= 1 or (share == 0 and not config.train.search_cache):
        problems.append(
            f"heads.noise_residual.similarity_share is {share}; expected a share of the pictures, above 0 and up to 1, "
            "or 0 with train.search_cache for those searched before (`forensics precompute`)"
        )
    return problems


def _heads_problems(config: RunConfig) -> list[str]:
    """Weights of losses, what heads on the vision tower cannot do, and what a feature cache cannot hold."""
    heads, loss, model = config.heads, config.loss, config.model
    is_vision = heads.enabled and heads.source == "vision"
    problems = [
        f"loss.{name} is {getattr(loss, name)}; expected a weight from 0 on"
        for name in TERMS
        if not (getattr(loss, name) >= 0 and math.isfinite(getattr(loss, name)))
    ]
    if loss.text and model.language == "skip":
        problems.append(
            f"loss.text is {loss.text} with model.language: skip, which leaves out the model that would read and write "
            "text; set loss.text to 0, or model.language to load"
        )
    if loss.operation and not heads.operations:
        problems.append(
            f"loss.operation is {loss.operation}, but heads.operations names none; list them, or set it to 0"
        )
    if is_vision and heads.mask == "none":
        problems += [
            f"loss.{name} is {getattr(loss, name)} with heads.mask: none, so there is no map; set it to 0"
            for name, term in TERMS.items()
            if term.output in ("mask_logits", "mask_features", "operation_logits") and getattr(loss, name)
        ]
    if config.train.feature_cache and config.train.feature_cache != "auto":
        problems += cache_problems(config)
    if config.train.search_cache:
        problems += search_cache_problems(config)
    return problems


def _resume_problems(config: RunConfig) -> list[str]:
    resume = config.train.resume
    if resume in (None, "auto") or Path(str(resume), "trainer_state.json").is_file():
        return []
    return [f"train.resume is '{resume}', which holds no trainer_state.json; give a checkpoint-N folder or 'auto'"]


def _template_problems(config: RunConfig) -> list[str]:
    try:
        template = load_template(config.data.template)
    except ConfigError as error:
        return [str(error)]
    problem = template_problem(template, config.data.layout) if config.heads.enabled else None
    return [problem] if problem else []


def _advice(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(known)}"
