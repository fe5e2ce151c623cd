"""Training on from an adapter: what it holds is taken off the base and put into a new adapter, bit by bit.

The new adapter stands on the same base as the old one and holds all of it, whether it trains on or not: loading it
needs no other folder. Ranks may grow (the new part of the product is zero), never shrink.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.models.groups import plain_name
from finetune.models.loading import Bundle


class Rank(NamedTuple):
    """LoRA's rank and alpha at one layer."""

    r: int
    alpha: int


@dataclass(frozen=True)
class Brought:
    """What an adapter held.

    tensors: parameter name in the wrapped model, without PEFT's outer prefixes -> values.
    modules: paths of the modules it holds whole. layers: its LoRA layers. scaling: their factors (alpha / r).
    merged: LoRA layers that become part of a module which the new adapter holds whole.
    """

    tensors: dict[str, Tensor]
    modules: list[str]
    layers: dict[str, Rank]
    scaling: dict[str, float]
    has_rows: bool
    merged: frozenset[str] = frozenset()

    def merging_into(self, modules: Sequence[str]) -> Brought:
        """The same for a new adapter that holds `modules` whole: LoRA inside them is no layer of its own there."""
        merged = frozenset(name for name in self.layers if any(is_inside(name, module) for module in modules))
        return replace(
            self, layers={name: rank for name, rank in self.layers.items() if name not in merged}, merged=merged
        )

    def join(self, layers: Mapping[str, Rank]) -> dict[str, Rank]:
        """The layers of both; where both have one, the new rank.

        Raises:
            ConfigError: a new rank is smaller than the old one.
        """
        for name, rank in layers.items():
            old = self.layers.get(name)
            if old is not None and rank.r < old.r:
                key = "vision_lora.r" if ".visual." in name else "lora.r"
                raise ConfigError(
                    f"{key} is {rank.r}, the adapter that training starts from has rank {old.r} at '{name}', which a "
                    f"smaller one cannot hold; use {key} = {old.r} or more, or start from a merged model"
                )
        return {**self.layers, **layers}


def is_inside(name: str, module: str) -> bool:
    """Whether a module path is another one or below it."""
    return name == module or name.startswith(module + ".")


def take_off(bundle: Bundle) -> tuple[Bundle, Brought]:
    """The bundle without its adapter, and what the adapter held. The base's own weights are not changed.

    Raises:
        ConfigError: the adapter holds something this project cannot continue (DoRA, biases, LoRA on embeddings).
    """
    wrapped: Any = bundle.model
    adapter = wrapped.active_adapter
    config = wrapped.peft_config[adapter]
    if config.use_dora or config.bias != "none":
        raise ConfigError(
            f"the adapter was trained with use_dora={config.use_dora}, bias={config.bias}; training can go on from "
            "plain LoRA, token rows and whole modules only: merge it first (forensics merge) and start from that model"
        )
    tensors, layers, scaling = {}, {}, {}
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in (f".modules_to_save.{adapter}.", "trainable_tokens_delta", ".lora_")):
            tensors[plain_name(name).replace(f".{adapter}", ".default")] = parameter.detach()
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            path = plain_name(name)
            layers[path] = Rank(module.r[adapter], module.lora_alpha[adapter])
            scaling[path] = float(module.scaling[adapter])
    modules = _saved_paths(wrapped)
    has_rows = any("trainable_tokens_delta" in name for name in tensors)
    is_tied = bool(bundle.base.config.tie_word_embeddings)
    base = wrapped.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config  # else PEFT warns of a second adapter
    if is_tied:
        base.tie_weights()
    brought = Brought(tensors, modules, layers, scaling, has_rows)
    return replace(bundle, model=base), brought


def put_back(wrapped: nn.Module, brought: Brought) -> None:
    """Copy what an adapter held into a new one, which must have a place for all of it.

    Raises:
        ConfigError: a tensor has no place.
    """
    places = {
        plain_name(name): parameter for name, parameter in wrapped.named_parameters() if ".original_module." not in name
    }
    scaling = {
        plain_name(name): float(module.scaling["default"])
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    with torch.no_grad():
        for layer in brought.merged:
            place = places[f"{layer}.weight"]
            down, up = (brought.tensors[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
            place.copy_(place.float() + brought.scaling[layer] * (up @ down).to(place.device))  # (out, in)
        for name, values in brought.tensors.items():
            if name.split(".lora_")[0] in brought.merged:
                continue
            place = places.get(name)
            if place is None:
                raise ConfigError(
                    f"'{name}' of the adapter that training starts from has no place in the new one; merge it first "
                    "(forensics merge) and start from that model"
                )
            if ".lora_" not in name:
                place.copy_(values)
                continue
            layer = name.split(".lora_")[0]
            if ".lora_A." in name:
                place[: len(values)] = values.to(place)  # (r, in): the rows below stay as initialised
            else:
                factor = brought.scaling[layer] / scaling[layer]
                place.zero_()
                place[:, : values.shape[1]] = (
                    values.to(place) if math.isclose(factor, 1.0) else (values.float() * factor).to(place)
                )  # (out, r)


def merge_whole(bundle: Bundle) -> Bundle:
    """The bundle with its adapter merged into the weights, which must not be quantised."""
    is_tied = bool(bundle.base.config.tie_word_embeddings)
    model: Any = bundle.model
    merged = model.merge_and_unload(safe_merge=True)
    if is_tied:
        merged.tie_weights()
    return replace(bundle, model=merged)


def _saved_paths(wrapped: nn.Module) -> list[str]:
    from peft.utils import ModulesToSaveWrapper

    return [plain_name(name) for name, module in wrapped.named_modules() if isinstance(module, ModulesToSaveWrapper)]
