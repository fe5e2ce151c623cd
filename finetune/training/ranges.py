"""The range of every number in a run's configuration that has one of its own, whatever the others say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from finetune.config import RunConfig
from finetune.data.sources import weight_problem


@dataclass(frozen=True)
class Range:
    """Which values are allowed, and how that is said behind "expected"."""

    holds: Callable[[float], bool]
    expected: str


_COUNT = Range(lambda value: value >= 1, "at least 1")
_COUNT_OR_NONE = Range(lambda value: value >= 1, "at least 1, or null")
_FROM_0 = Range(lambda value: value >= 0 and math.isfinite(value), "a number from 0 on")
_FROM_0_OR_NONE = Range(lambda value: value >= 0, "a number from 0 on, or null")
_ABOVE_0 = Range(lambda value: value > 0 and math.isfinite(value), "a number above 0")
_DROPOUT = Range(lambda value: 0 <= value < 1, "a share from 0 to below 1")
_SEED = Range(lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")

_RANGES = {
    "seed": _SEED,
    "train.batch_size": _COUNT,
    "train.eval_batch_size": _COUNT,
    "train.gradient_accumulation_steps": _COUNT,
    "train.eval_steps": _COUNT,
    "train.logging_steps": _COUNT,
    "train.learning_rate": _FROM_0,
    "train.muon_learning_rate": _FROM_0,
    "train.weight_decay": _FROM_0,
    "train.max_grad_norm": _FROM_0,
    "train.warmup_ratio": Range(lambda value: 0 <= value <= 1, "a number from 0 on, a share of all steps, at most 1"),
    "train.warmup_steps": _FROM_0_OR_NONE,
    "train.max_steps": Range(lambda value: value >= 1 or value == -1, "a positive number, or -1 to count epochs"),
    "train.max_seconds": Range(lambda value: value > 0, "a number above 0, or null for no limit"),
    "train.early_stopping_patience": Range(lambda value: value >= 1, "1 or more, or null"),
    "train.heatmap_snapshots": _FROM_0,
    "data.val_ratio": Range(lambda value: 0 <= value < 1, "a share of the training data, from 0 to below 1"),
    "data.image_short_side": _COUNT_OR_NONE,
    "data.max_regions": _COUNT_OR_NONE,
    "data.max_eval_samples": _COUNT_OR_NONE,
    "data.max_length": _COUNT,
    "data.min_pixels": _COUNT,
    "data.num_workers": _FROM_0,
    "data.image_cache_megabytes": _FROM_0,
    "loss.focal_gamma": _FROM_0,
    "loss.focal_alpha": Range(lambda value: 0 <= value <= 1, "a weight of tampered images from 0 to 1, or null"),
    "loss.temperature": _ABOVE_0,
    "loss.bce_pos_weight": _ABOVE_0,
    "loss.cls_pos_weight": _ABOVE_0,
    "loss.operation_authentic_weight": _FROM_0,
    "loss.evidence_share": Range(lambda value: 0 < value <= 1, "a share of the pixels, up to 1"),
    "lora.r": _COUNT,
    "lora.alpha": _COUNT,
    "lora.dropout": _DROPOUT,
    "vision_lora.r": _COUNT,
    "vision_lora.alpha": _COUNT,
    "heads.dropout": _DROPOUT,
}  # fmt: skip
"""By the key's full name; a value of None is one that is not set."""


def range_problems(config: RunConfig) -> list[str]:
    """Every number outside its range, one line each; [] when there is none."""
    problems = []
    for key, allowed in _RANGES.items():
        value = attrgetter(key)(config)
        if value is not None and not allowed.holds(value):
            problems.append(_outside(key, value, allowed))
    for group, rate in config.train.group_learning_rates.items():
        if not _FROM_0.holds(rate):
            problems.append(_outside(f"train.group_learning_rates.{group}", rate, _FROM_0))
    for what in ("train", "eval"):
        for source in getattr(config.data, what):
            problems += filter(None, [weight_problem(source, what)])
    return problems


def _outside(what: str, value: object, allowed: Range) -> str:
    return f"{what} is {value}; expected {allowed.expected}"
