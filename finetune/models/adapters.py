"""What trains: everything is frozen, then the named groups are released, through PEFT where only rows or low-rank
updates move.

Without `lm_full`, new embedding rows train through PEFT's trainable token indices, so the rest of the matrix has
neither gradient nor optimizer state; heads and vision blocks then travel in the same adapter folder
(`modules_to_save`). A model that carries an adapter gets a new one that holds the old one too
(`finetune.models.continuing`), so that an adapter folder always stands on the base it names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from finetune.config import LoraConfig, VisionLoraConfig, VisionTopConfig
from finetune.errors import ConfigError
from finetune.models.configuration import HEAD_MODULES
from finetune.models.continuing import Brought, Rank, is_inside, merge_whole, put_back, take_off
from finetune.models.groups import (
    HEAD_GROUPS,
    LORA_GROUPS,
    collapsed,
    group_problems,
    keeps_tower,
    needs_adapter,
    plain_name,
)
from finetune.models.loading import Bundle
from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration

VISION, LANGUAGE = "model.visual.", "model.language_model."


def set_trainable(
    bundle: Bundle,
    groups: Sequence[str],
    lora: LoraConfig,
    vision_lora: VisionLoraConfig | None = None,
    vision_top: VisionTopConfig | None = None,
    whole_dtype: torch.dtype | None = None,
) -> Bundle:
    """Freeze everything, then make exactly the named groups trainable; wraps the model in PEFT where needed.

    An adapter that the bundle brings is continued: its token rows, heads and LoRA are part of the new adapter, whether
    they train or not, and outputs are unchanged by this call. With `lm_full` it is merged into the weights instead;
    LoRA inside a module that now trains whole is merged into that module.

    Args:
        whole_dtype: what the projector and single tower blocks that train whole are held in; None: as loaded.

    Raises:
        ConfigError: unknown group, groups that exclude each other, a pattern or block that matches nothing, or an
            adapter that cannot be continued this way.
    """
    for problem in group_problems(groups):
        raise ConfigError(problem)
    if "lm_full" in groups and getattr(bundle.base, "is_loaded_in_4bit", False):
        raise ConfigError("lm_full cannot train on a 4-bit model; use lm_lora, or model.quantization: none")
    vision_lora, vision_top = vision_lora or VisionLoraConfig(), vision_top or VisionTopConfig()
    brought = None
    if bundle.model is not bundle.base:
        if "lm_full" in groups:
            bundle = merge_whole(bundle)
        else:
            bundle, brought = take_off(bundle)
    model = bundle.base
    if brought is None and "region_features" not in groups:
        _check_regions_are_trained(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = _module_paths(model, groups, vision_top)
    for path in modules:
        if whole_dtype is not None and path.startswith(VISION):
            model.get_submodule(path).to(whole_dtype)
    kept: list[str] = []
    if bundle.tower is not None and not keeps_tower(groups):
        bundle = replace(bundle, tower=None)
        kept = [name for name in HEAD_MODULES if hasattr(model, name)]  # the base that an adapter stands on lacks them
    if bundle.tower is not None:
        return _train_parts(bundle, groups, modules, lora, vision_lora, brought)
    if brought is not None or needs_adapter(groups):
        layers = _lora_layers(model, groups, lora, vision_lora, modules)
        return replace(bundle, model=_wrap(bundle, groups, modules, layers, lora, brought, kept))
    for path in modules:
        for parameter in model.get_submodule(path).parameters():
            parameter.requires_grad_(True)
    return bundle


def _check_regions_are_trained(model: QwenForensicsForConditionalGeneration) -> None:
    """Refuse region features that would stay at the zeros they begin with.

    Raises:
        ConfigError: as said.
    """
    if model.config.region_features:
        weight = model.region_projection.out.weight
        if weight.numel() and not weight.is_meta and not bool(weight.any()):
            raise ConfigError(
                "model.region_features is on, but nothing has trained them and train.trainable does not name "
                "region_features, so they would add nothing; add the group, or switch them off"
            )


def _train_parts(
    bundle: Bundle,
    groups: Sequence[str],
    modules: Sequence[str],
    lora: LoraConfig,
    vision_lora: VisionLoraConfig,
    brought: Brought | None,
) -> Bundle:
    """Heads in place, LoRA of the tower alone in PEFT, so that its folder goes onto a plain Qwen2.5-VL as well."""
    model = bundle.base
    wrapped: Any = model
    layers = _lora_layers(model, groups, lora, vision_lora, modules)
    if layers or brought is not None:
        default = replace(lora, r=vision_lora.r, alpha=vision_lora.alpha)
        wrapped = _wrap(bundle, groups, [], layers, default, brought)
    for path in modules:
        for parameter in model.get_submodule(path).parameters():
            parameter.requires_grad_(True)
    return replace(bundle, model=wrapped)


def lora_matches(model: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers a LoRA pattern matches (full match, as PEFT does).

    Raises:
        ConfigError: the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"lora.target_modules '{pattern}' is not a regular expression: {error}") from error
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and compiled.fullmatch(n)]


def block_numbers(blocks: Sequence[int], depth: int, key: str) -> list[int]:
    """Numbers of vision blocks, negative ones counted from the end, in order.

    Raises:
        ConfigError: none, or one that the tower does not have; `key` names the setting.
    """
    outside = [block for block in blocks if not -depth <= block < depth]
    if outside or not blocks:
        raise ConfigError(
            f"{key} is {list(blocks)}; expected blocks of the vision tower, 0 to {depth - 1} (or -1, -2, ... from the "
            "end)"
        )
    return sorted({block % depth for block in blocks})


def _module_paths(
    model: QwenForensicsForConditionalGeneration, groups: Sequence[str], vision_top: VisionTopConfig
) -> list[str]:
    """Paths of the modules that train whole; none inside another."""
    paths: list[str] = []
    if "region_features" in groups and not model.config.region_features:
        raise ConfigError(
            "train.trainable names region_features, which this model lacks; set model.region_features: true"
        )
    for group, names in HEAD_GROUPS.items():
        if group in groups:
            paths += [name for name in names if hasattr(model, name)]
    if "lm_full" in groups:
        paths += ["model.language_model", "lm_head"]
    if "vision_full" in groups:
        paths.append("model.visual")
    elif "projector" in groups or ("vision_top" in groups and vision_top.merger):
        paths.append("model.visual.merger")
    if "vision_top" in groups:
        depth = model.config.vision_config.depth
        if not 1 <= vision_top.blocks <= depth:
            raise ConfigError(f"vision_top.blocks is {vision_top.blocks}; expected 1 to {depth} blocks of the tower")
        paths += [f"model.visual.blocks.{number}" for number in range(depth - vision_top.blocks, depth)]
    return list(dict.fromkeys(paths))


def _lora_layers(
    model: QwenForensicsForConditionalGeneration,
    groups: Sequence[str],
    lora: LoraConfig,
    vision_lora: VisionLoraConfig,
    modules: Sequence[str],
) -> dict[str, Rank]:
    """Rank and alpha of each linear layer that gets LoRA; the matches are printed."""
    layers: dict[str, Rank] = {}
    if "lm_lora" in groups:
        matched = lora_matches(model, lora.target_modules)
        if not matched:
            raise ConfigError(f"lora.target_modules '{lora.target_modules}' matches no linear layer of the model")
        layers |= dict.fromkeys(matched, Rank(lora.r, lora.alpha))
    if "vision_lora" in groups:
        numbers = block_numbers(vision_lora.blocks, model.config.vision_config.depth, "vision_lora.blocks")
        for number in numbers:
            pattern = rf"model\.visual\.blocks\.{number}\.(?:{vision_lora.target_modules})"
            matched = lora_matches(model, pattern)
            if not matched:
                raise ConfigError(
                    f"vision_lora.target_modules '{vision_lora.target_modules}' matches no linear layer of vision "
                    f"block {number}; its layers are attn.qkv, attn.proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj"
                )
            layers |= dict.fromkeys(matched, Rank(vision_lora.r, vision_lora.alpha))
    twice = [name for name in layers for path in modules if is_inside(name, path)]
    if twice:
        raise ConfigError(f"'{twice[0]}' would train both whole and by LoRA; choose other blocks or targets")
    if layers and os.environ.get("RANK", "0") == "0":
        found = ", ".join(f"{key} x{count}" for key, count in collapsed(list(layers)).items())
        print(f"LoRA on {len(layers)} layers: {found}")
    return layers


def _wrap(
    bundle: Bundle,
    groups: Sequence[str],
    modules: Sequence[str],
    layers: Mapping[str, Rank],
    lora: LoraConfig,
    brought: Brought | None,
    kept: Sequence[str] = (),
) -> Any:
    """The PEFT model; `kept` are modules it holds whole although they need not train."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    model = bundle.base
    saved = _outermost([*modules, *kept])
    has_rows = "new_tokens" in groups
    everywhere = dict(layers)
    if brought is not None:
        brought = brought.merging_into(modules)
        _check_whole(layers, brought)
        saved = _outermost([*saved, *brought.modules])
        has_rows = has_rows or brought.has_rows
        everywhere = brought.join(layers)
    rows = None
    if has_rows:
        ids = [*(model.config.cls_token_ids or []), *(model.config.mask_token_ids or [])]
        rows = {"embed_tokens": ids}
        if not model.config.tie_word_embeddings:
            rows["lm_head"] = ids
    ranks, alphas = _patterns(everywhere, Rank(lora.r, lora.alpha))
    config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # PEFT's name for "no LoRA layers, only token rows and saved modules"
        target_modules=_target(everywhere, lora.target_modules, model) if everywhere else DUMMY_TARGET_MODULES,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        trainable_token_indices=rows,
        modules_to_save=saved or None,
    )
    wrapped = get_peft_model(model, config)
    if brought is not None:
        put_back(wrapped, brought)
    _release(wrapped, groups, modules)
    return wrapped


def _check_whole(layers: Mapping[str, Rank], brought: Brought) -> None:
    for name in layers:
        module = next((module for module in brought.modules if is_inside(name, module)), None)
        if module is not None:
            raise ConfigError(
                f"LoRA on '{name}': the adapter that training starts from holds '{module}' whole; leave it out, or "
                "merge the adapter first (forensics merge) and start from that model"
            )


def _release(wrapped: nn.Module, groups: Sequence[str], modules: Sequence[str]) -> None:
    """Only what the groups name trains; what an earlier adapter brought along besides stays as it is."""
    for name, parameter in wrapped.named_parameters():
        if ".original_module." in name:
            continue
        path = plain_name(name)
        if "trainable_tokens" in path:
            trains = "new_tokens" in groups
        elif ".lora_" in path:
            trains = LORA_GROUPS[VISION in path] in groups
        elif ".modules_to_save." in name:
            trains = any(path.startswith(module + ".") for module in modules)
        else:
            continue
        parameter.requires_grad_(trains)
    for layer in wrapped.modules():
        dropout = getattr(layer, "lora_dropout", None)
        if dropout is not None and not layer.lora_A["default"].weight.requires_grad:
            dropout["default"] = nn.Identity()  # a frozen update is part of the model, not of the training


def _outermost(paths: Sequence[str]) -> list[str]:
    """Distinct module paths without those inside another."""
    distinct = list(dict.fromkeys(paths))
    return [path for path in distinct if not any(path.startswith(other + ".") for other in distinct)]


def _target(layers: Mapping[str, Rank], pattern: str, model: nn.Module) -> str:
    """A regular expression that matches exactly `layers`: the configured one where that is so, else their names.

    PEFT matches it against every module, containers and norms among them, and has no LoRA for those.
    """
    if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == set(layers):
        return pattern
    grouped: dict[str, list[str]] = {}
    for name in layers:
        numbers = re.findall(r"\.(\d+)\.", name)
        grouped.setdefault(re.sub(r"\.\d+\.", ".{}.", name, count=1), []).append(numbers[0] if numbers else "")
    parts = []
    for key, numbers in grouped.items():
        choice = f"({'|'.join(numbers)})"
        parts.append(choice.join(re.escape(part) for part in key.split("{}")))
    return "|".join(parts)


def _patterns(layers: Mapping[str, Rank], default: Rank) -> tuple[dict[str, int], dict[str, int]]:
    """PEFT's rank and alpha patterns: one for a tower whose layers agree, else one for each layer that differs."""
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    for tower in (VISION, LANGUAGE):
        own = {name: rank for name, rank in layers.items() if name.startswith(tower)}
        found = set(own.values())
        keys = {re.escape(tower) + ".*": found.pop()} if len(found) == 1 else {re.escape(n): r for n, r in own.items()}
        for key, rank in keys.items():
            if rank != default:
                ranks[key], alphas[key] = rank
    return ranks, alphas
