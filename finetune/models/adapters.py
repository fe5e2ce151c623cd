"""What trains: named parameter groups, PEFT where only rows or low-rank updates move, and the table that shows it.

Without `lm_full`, new embedding rows train through PEFT's trainable token indices, so the rest of the matrix has
neither gradient nor optimizer state; heads then travel in the same adapter folder (`modules_to_save`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from finetune.config import LoraConfig
from finetune.errors import ConfigError
from finetune.models.loading import Bundle
from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration

HEAD_GROUPS = {
    "cls_head": ("cls_head", "layer_mix"),
    "mask_head": ("mask_head", "layer_mix"),
    "noise_residual": ("noise_residual", "stream_to_language"),
}
GROUPS = ("new_tokens", *HEAD_GROUPS, "lm_lora", "lm_full", "projector", "vision_full")
"""Everything `train.trainable` may name."""


def set_trainable(bundle: Bundle, groups: Sequence[str], lora: LoraConfig) -> Bundle:
    """Freeze everything, then make exactly the named groups trainable; wraps the model in PEFT where needed.

    Raises:
        ConfigError: unknown group, groups that exclude each other, or a LoRA pattern that matches nothing.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ConfigError(f"train.trainable names '{unknown[0]}'; known groups: {', '.join(GROUPS)}")
    if "lm_full" in groups and "lm_lora" in groups:
        raise ConfigError("train.trainable names both lm_full and lm_lora; choose one")
    if bundle.model is not bundle.base:
        raise ConfigError("this model already carries an adapter; continuing from an adapter uses its own settings")
    model = bundle.base
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    uses_peft = "lm_lora" in groups or ("new_tokens" in groups and "lm_full" not in groups)
    modules = _modules_of(model, groups)
    if uses_peft:
        return replace(bundle, model=_wrap(bundle, groups, modules, lora))
    for module in modules.values():
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    return bundle


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


def group_of(name: str, groups: Sequence[str]) -> str | None:
    """The group a parameter name belongs to, among those that train."""
    path = re.sub(r"^(module\.)?(base_model\.model\.)?", "", name)
    root = path.split(".")[0]
    for group, modules in HEAD_GROUPS.items():
        if root in modules and group in groups:
            return group
    if "trainable_tokens" in path:
        return "new_tokens" if "new_tokens" in groups else None
    if ".lora_" in path:
        return "lm_lora" if "lm_lora" in groups else None
    if ".visual.merger." in path:
        return next((group for group in ("projector", "vision_full") if group in groups), None)
    if ".visual." in path:
        return "vision_full" if "vision_full" in groups else None
    return "lm_full" if "lm_full" in groups else None


def trainable_table(model: nn.Module, groups: Sequence[str], learning_rates: dict[str, float]) -> str:
    """Plain-text table: group, tensors, parameters, learning rate; last line the share of all parameters."""
    rows = [("group", "tensors", "parameters", "lr")]
    total = 0
    for group, members in parameter_groups(model, groups).items():
        size = sum(parameter.numel() for _, parameter in members)
        total += size
        rows.append((group, str(len(members)), f"{size:,}", f"{learning_rates.get(group, 0):g}"))
    everything = sum(parameter.numel() for parameter in model.parameters())
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.append(f"trainable: {total:,} of {everything:,} parameters ({100 * total / everything:.2f} %)")
    return "\n".join(lines)


def _modules_of(model: QwenForensicsForConditionalGeneration, groups: Sequence[str]) -> dict[str, nn.Module]:
    """Module path -> module for every group that trains whole modules."""
    paths: list[str] = []
    for group, names in HEAD_GROUPS.items():
        if group in groups:
            paths += [name for name in names if hasattr(model, name)]
    if "lm_full" in groups:
        paths += ["model.language_model", "lm_head"]
    if "vision_full" in groups:
        paths.append("model.visual")
    elif "projector" in groups:
        paths.append("model.visual.merger")
    return {path: model.get_submodule(path) for path in dict.fromkeys(paths)}


def _wrap(bundle: Bundle, groups: Sequence[str], modules: dict[str, nn.Module], lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    model = bundle.base
    target: str = DUMMY_TARGET_MODULES  # PEFT's name for "no LoRA layers, only token rows and saved modules"
    if "lm_lora" in groups:
        target = lora.target_modules
        matched = lora_matches(model, target)
        if not matched:
            raise ConfigError(f"lora.target_modules '{target}' matches no linear layer of the model")
        print(f"LoRA on {len(matched)} layers: {_summary(matched)}")
    rows = None
    if "new_tokens" in groups:
        ids = [*(model.config.cls_token_ids or []), *(model.config.mask_token_ids or [])]
        rows = {"embed_tokens": ids}
        if not model.config.tie_word_embeddings:
            rows["lm_head"] = ids
    config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target,
        trainable_token_indices=rows,
        modules_to_save=list(modules) or None,
    )
    return get_peft_model(model, config)


def lora_matches(model: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers a LoRA pattern matches (full match, as PEFT does)."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)]


def _summary(names: Sequence[str]) -> str:
    """Layer names with indices collapsed: `language_model.layers.*.self_attn.q_proj x36, ...`."""
    counts: dict[str, int] = {}
    for name in names:
        key = re.sub(r"\.\d+\.", ".*.", name)
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{key} x{count}" for key, count in counts.items())
