"""Named groups of parameters: what a run may train, which group a parameter belongs to, and the table that shows it.

Names only; freezing, PEFT and continuing from an adapter are `finetune.models.adapters`' part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from finetune.errors import ConfigError

HEAD_GROUPS = {
    "neck": ("neck",),
    "cls_head": ("cls_head", "layer_mix"),
    "mask_head": ("mask_head", "mask_queries", "operation_head", "layer_mix"),
    "noise_residual": ("noise_residual", "stream_to_language"),
    "region_features": ("region_projection",),
}
"""Modules of each group of heads; `neck` and `mask_queries` exist with `heads.source: vision` only, `operation_head`
with `heads.operations`, `region_projection` with `model.region_features`."""

GROUPS = (
    "new_tokens", *HEAD_GROUPS, "lm_lora", "lm_full", "projector", "vision_lora", "vision_top", "vision_full",
)  # fmt: skip
"""Everything `train.trainable` may name."""

LORA_GROUPS = ("lm_lora", "vision_lora")

EXCLUSIVE = (
    ("lm_full", "lm_lora", "the language model trains whole or by LoRA"),
    ("lm_full", "vision_lora", "an adapter folder would have to hold the whole language model"),
    ("vision_full", "vision_lora", "the vision tower trains whole or by LoRA"),
    ("vision_full", "vision_top", "the whole tower contains its top blocks"),
)
"""Pairs that cannot train together, with the reason."""


def group_problems(groups: Sequence[str]) -> list[str]:
    """What is wrong with a choice of groups, one line each."""
    problems = [
        f"train.trainable names '{name}'; known groups: {', '.join(GROUPS)}" for name in groups if name not in GROUPS
    ]
    for one, other, reason in EXCLUSIVE:
        if one in groups and other in groups:
            problems.append(f"train.trainable names both {one} and {other}; choose one: {reason}")
    return problems


def needs_adapter(groups: Sequence[str]) -> bool:
    """Whether a run that starts from a whole model saves an adapter folder, not a whole model."""
    has_lora = any(group in groups for group in LORA_GROUPS)
    return has_lora or ("new_tokens" in groups and "lm_full" not in groups)


def keeps_tower(groups: Sequence[str]) -> bool:
    """Whether all that trains is heads and LoRA of the tower: then heads on the tower are saved without their base."""
    return {*groups} <= {*HEAD_GROUPS, "vision_lora"}


def plain_name(name: str) -> str:
    """A parameter's name as in the unwrapped model: without what DDP and PEFT put in front of and into it."""
    path = re.sub(r"^(module\.)?(base_model\.model\.)?", "", name)
    return path.replace(".modules_to_save.default", "")


def group_of(name: str, groups: Sequence[str]) -> str | None:
    """The group a parameter name belongs to, among those that train."""
    path = plain_name(name)
    root = path.split(".")[0]
    for group, modules in HEAD_GROUPS.items():
        if root in modules and group in groups:
            return group
    if "trainable_tokens" in path:
        candidates: tuple[str, ...] = ("new_tokens",)
    elif ".lora_" in path:
        candidates = ("vision_lora",) if ".visual." in path else ("lm_lora",)
    elif ".visual.merger." in path:
        candidates = ("projector", "vision_top", "vision_full")
    elif ".visual." in path:
        candidates = ("vision_top", "vision_full")
    else:
        candidates = ("lm_full",)
    return next((group for group in candidates if group in groups), None)


def parameter_groups(model: nn.Module, groups: Sequence[str]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every trainable parameter under the group it belongs to, in model order.

    Raises:
        ConfigError: a trainable parameter belongs to none of `groups`.
    """
    assigned: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in groups}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of(name, groups)
        if group is None:
            raise ConfigError(f"parameter '{name}' is trainable but belongs to none of: {', '.join(groups)}")
        assigned[group].append((name, parameter))
    return assigned


def trainable_table(model: nn.Module, groups: Sequence[str], learning_rates: dict[str, str]) -> str:
    """Plain-text table: group, tensors, parameters, learning rate; last line the share of all parameters."""
    rows = [("group", "tensors", "parameters", "lr")]
    total = 0
    for group, members in parameter_groups(model, groups).items():
        size = sum(parameter.numel() for _, parameter in members)
        total += size
        rows.append((group, str(len(members)), f"{size:,}", learning_rates.get(group, "0")))
    everything = sum(_numel(parameter) for parameter in model.parameters())
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.append(f"trainable: {total:,} of {everything:,} parameters ({100 * total / everything:.2f} %)")
    return "\n".join(lines)


def collapsed(names: Sequence[str]) -> dict[str, int]:
    """Names with layer numbers collapsed and how many there are of each: `layers.*.self_attn.q_proj` -> 36."""
    counts: dict[str, int] = {}
    for name in names:
        key = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        counts[key] = counts.get(key, 0) + 1
    return counts


def _numel(parameter: nn.Parameter) -> int:
    """Parameters, not bytes: a 4-bit weight holds two in each."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None and getattr(state, "shape", None) is not None else parameter.numel()
