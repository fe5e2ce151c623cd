"""How much GPU memory a configuration needs, by part, before anything is downloaded or started.

The model is built on the meta device: names and shapes, no weights. Weights, gradients and optimizer states are counted
exactly; activations follow from the tensors that a decoder layer saves for its backward pass (Korthikanti et al. 2022,
changed for grouped queries and gated MLPs). Formulae and measured ratios are in docs/distributed.md. Measured on the
CPU only, not on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.config import RunConfig, to_dict
from finetune.errors import ConfigError
from finetune.models.groups import group_of, needs_adapter
from finetune.models.qwen_forensics_model import HEAD_MODULES
from finetune.training.planned_model import meta_model

GB = 1e9
TEXT_TOKENS = 320
"""Prompt and answer of a record, beside its image tokens."""
SUPERVISED_TOKENS = 160
"""Tokens of the answer; logits are computed for these only."""
CONTEXT_GB = 1.0
"""CUDA context, cuBLAS workspaces and communication buffers of one process."""
FRAGMENTATION = 0.08
"""Of what the allocator holds and cannot use."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, an 8-bit scale for every 64 and a 32-bit one for every 256 of those (double quantisation)."""


@dataclass(frozen=True)
class Layout:
    """How a run is divided: `stage` 0 is one whole copy per GPU (single, DDP), 2 and 3 are DeepSpeed's."""

    name: str
    stage: int = 0
    offloads_optimizer: bool = False
    offloads_weights: bool = False


LAYOUTS = (
    Layout("single / ddp"),
    Layout("zero2", 2),
    Layout("zero2_offload", 2, offloads_optimizer=True),
    Layout("zero3", 3),
    Layout("zero3_offload", 3, offloads_optimizer=True, offloads_weights=True),
)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, by part, and on the host for each process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    host: float

    @property
    def total(self) -> float:
        """Bytes on each GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def parse_hardware(text: str) -> tuple[int, float]:
    """`2x24GB` -> 2 GPUs with 24e9 bytes each.

    Raises:
        ConfigError: another form.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(\d+(?:\.\d+)?)\s*G(?:i?B)?\s*", text, re.IGNORECASE)
    if not match or int(match[1] or 1) < 1:
        raise ConfigError(f"--hardware is {text!r}; expected the number of GPUs and their memory, e.g. 2x24GB")
    return int(match[1] or 1), float(match[2]) * GB


def estimate(config: RunConfig, layout: Layout, num_gpus: int, model: Any = None) -> Estimate:
    """Memory of one training step under a layout; `num_gpus` processes share what the layout divides.

    Args:
        model: `meta_model(config)`, where it is at hand.
    """
    model = model or meta_model(config)
    trained = trainable_numbers(config, model)
    precision = config.train.precision
    is_half = precision in ("bf16", "fp16") or (precision == "auto" and config.model.dtype != "float32")
    half = 2 if config.model.dtype in ("bfloat16", "float16") or (config.model.dtype == "auto" and is_half) else 4
    is_deepspeed = layout.stage > 0
    share = 1 / num_gpus if is_deepspeed else 1.0
    weight_bytes = sum(
        parameter.numel() * _bytes_of(name, config, half, is_half and is_deepspeed)
        for name, parameter in model.named_parameters()
    )
    added = trained.get("lm_lora", 0) + trained.get("vision_lora", 0) + trained.get("new_tokens", 0)
    if needs_adapter(config.train.trainable):  # PEFT trains a copy beside the frozen original
        added += trained.get("projector", 0) + trained.get("vision_top", 0)
    train_bytes = 2 if is_deepspeed and is_half else 4
    weight_bytes += added * train_bytes
    number = sum(trained.values())
    whole_bytes = half if {"lm_full", "vision_full"} & set(trained) and not is_deepspeed else train_bytes
    gradients = number * whole_bytes * share
    # Adam's two moments are as wide as the weights; DeepSpeed keeps them and a copy of the weights in float32
    kept = _moments(config, trained, 4 if is_deepspeed else whole_bytes)
    moments = (kept + (4 * number if is_half else 0)) * share if is_deepspeed else kept
    weights = weight_bytes * (share if layout.stage == 3 else 1.0)
    host = (moments if layout.offloads_optimizer else 0.0) + (weights if layout.offloads_weights else 0.0)
    weights = 0.0 if layout.offloads_weights else weights
    optimizer = 0.0 if layout.offloads_optimizer else moments
    if layout.stage == 3:  # the layer that is being computed is whole, and so are the heads
        largest = max(parameter.numel() for parameter in model.parameters())
        weights += (largest + _head_numbers(model)) * half
        host += weight_bytes  # every process reads the whole model before it is divided
    activations = activation_bytes(config, model, 2 if is_half else 4)
    used = weights + gradients + optimizer + activations
    return Estimate(weights, gradients, optimizer, activations, CONTEXT_GB * GB + FRAGMENTATION * used, host)


def _moments(config: RunConfig, trained: Mapping[str, int], width: float) -> float:
    """Bytes that the optimizer keeps beside the weights: two numbers per weight for Adam, one for Muon's groups.

    Args:
        trained: numbers per group. width: bytes of one number, where the optimizer does not choose its own.
    """
    name = str(config.train.trainer_args.get("optim", "adamw_torch"))
    if name in ("sgd", "adafactor"):  # Adafactor keeps a row and a column of each matrix
        return 0.0
    width = 1.0 if "8bit" in name else width
    adam = 1.0 if "lion" in name else 2.0
    muon = set(config.train.muon_groups)
    return sum(number * width * (1.0 if group in muon else adam) for group, number in trained.items())


def _is_top(name: str, config: RunConfig, model: nn.Module) -> bool:
    """Whether a parameter of the tower is of the blocks that `vision_top` trains, or of the merger where it does."""
    if ".visual.merger." in name:
        return config.vision_top.merger
    block = re.search(r"\.visual\.blocks\.(\d+)\.", name)
    return block is not None and int(block[1]) >= model.config.vision_config.depth - config.vision_top.blocks


def trainable_numbers(config: RunConfig, model: nn.Module) -> dict[str, int]:
    """Parameters of each group that trains; LoRA and token rows are computed from the layers they would be added to."""
    groups = config.train.trainable
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = group_of(name, groups)
        if group is not None and (group != "vision_top" or _is_top(name, config, model)):
            found[group] = found.get(group, 0) + parameter.numel()
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if "lm_lora" in groups:
        chosen = [module for name, module in linear if re.fullmatch(config.lora.target_modules, name)]
        found["lm_lora"] = config.lora.r * sum(module.in_features + module.out_features for module in chosen)
    if "vision_lora" in groups:
        depth = model.config.vision_config.depth
        blocks = "|".join(str(block % depth) for block in config.vision_lora.blocks)
        pattern = rf"model\.visual\.blocks\.({blocks})\.({config.vision_lora.target_modules})"
        chosen = [module for name, module in linear if re.fullmatch(pattern, name)]
        found["vision_lora"] = config.vision_lora.r * sum(layer.in_features + layer.out_features for layer in chosen)
    if "new_tokens" in groups and "lm_full" not in groups:
        text = model.config.text_config
        matrices = 1 if text.tie_word_embeddings else 2
        found["new_tokens"] = matrices * text.hidden_size * (config.tokens.num_cls + config.tokens.num_mask)
    return found


def picture_pixels(config: RunConfig) -> int:
    """Pixels that the model sees of a picture, at most: `data.max_pixels`; with `data.image_short_side` those of a
    picture twice as long as high, or of the square around it, where that is less."""
    data = config.data
    if data.image_short_side is None:
        return data.max_pixels
    return min(data.max_pixels, (2 if data.image_padding == "none" else 4) * data.image_short_side**2)


def activation_bytes(config: RunConfig, model: nn.Module, width: int) -> float:
    """What one micro-batch holds at the end of its forward pass, and the largest layer's own working set.

    Args:
        width: bytes of an activation in the language model and the tower, 2 or 4.
    """
    text, vision = model.config.text_config, model.config.vision_config
    batch = config.train.batch_size
    pixels = picture_pixels(config)
    image_tokens = pixels / (vision.patch_size * vision.spatial_merge_size) ** 2
    tokens = batch * min(image_tokens + TEXT_TOKENS, config.data.max_length)
    patches = batch * pixels / vision.patch_size**2
    groups = set(config.train.trainable)
    kv = text.hidden_size * text.num_key_value_heads / text.num_attention_heads
    layer = tokens * width * _saved_per_token(config, text.hidden_size, kv, text.intermediate_size)
    block = patches * width * (10 * vision.hidden_size + 4 * vision.intermediate_size)
    if config.train.gradient_checkpointing:
        language = text.num_hidden_layers * tokens * text.hidden_size * width + layer
    else:
        language = text.num_hidden_layers * layer
    tower = vision.depth * patches * vision.hidden_size * width  # every block's output is kept for the heads
    if groups & {"vision_full", "vision_lora", "vision_top"}:
        tower += block if config.train.gradient_checkpointing else vision.depth * block
    else:
        tower += block
    logits = batch * SUPERVISED_TOKENS * text.vocab_size * (width + 8)
    if not model.config.has_language:
        language = logits = 0.0
    heads = 0.0
    if config.heads.enabled:
        noise = config.heads.noise_residual
        per_cell = 8 * config.heads.hidden_size + (12 * (sum(noise.widths) + noise.channels) if noise.enabled else 0)
        heads = (
            batch * pixels / 16 * per_cell * 4 + batch * pixels * 40
        )  # masks, their losses and the pixels themselves
    return language + tower + logits + heads


def _saved_per_token(config: RunConfig, hidden: float, kv: float, mlp: float) -> float:
    """Numbers that a decoder layer keeps per token for its backward pass.

    A frozen linear layer does not need its input, only norms, attention and the gate do. With LoRA every adapted layer
    keeps a dropped-out copy of its input and the mask, a quarter as large.
    """
    frozen = 6 * hidden + 3 * kv + 3 * mlp
    if "lm_full" in config.train.trainable:
        return 10 * hidden + 4 * kv + 4 * mlp
    if "lm_lora" in config.train.trainable:
        copies = 1.25 if config.lora.dropout > 0 else 0.0
        return 10 * hidden + 4 * kv + 4 * mlp + copies * (6 * hidden + mlp)
    return frozen


def _bytes_of(name: str, config: RunConfig, half: int, casts_heads: bool) -> float:
    """Bytes per number of a base parameter as it is held on the device."""
    if name.split(".")[0] in HEAD_MODULES:
        return 2 if casts_heads else 4
    is_quantized = ".language_model.layers." in name and name.endswith("_proj.weight")
    return NF4_BYTES if config.model.quantization == "nf4" and is_quantized else half


def _head_numbers(model: Any) -> int:
    return sum(parameter.numel() for module in model.head_modules() for parameter in module.parameters())


# ---- what doctor says ----


def memory_report(config: RunConfig, hardware: str) -> tuple[list[str], bool]:
    """A table by layout and part, the verdict, and what to change when nothing fits; and whether something fits."""
    num_gpus, memory = parse_hardware(hardware)
    parts = ("weights", "gradients", "optimizer", "activations", "workspace", "total", "host")
    lines = [
        f"memory per GPU in GB, estimated (not measured on a GPU), for {num_gpus} x {memory / GB:g} GB:",
        f"{'':15}" + "".join(f"{part:>12}" for part in parts) + "  fits",
    ]
    model = meta_model(config)
    found = {layout.name: estimate(config, layout, num_gpus, model) for layout in _layouts(config)}
    for name, one in found.items():
        values = "".join(f"{getattr(one, part) / GB:12.1f}" for part in parts)
        lines.append(f"{name:15}{values}  {'yes' if one.total <= memory else 'no'}")
    fitting = [name for name, one in found.items() if one.total <= memory]
    if fitting:
        lines.append(f"fits with {fitting[0]}" + (f" (also: {', '.join(fitting[1:])})" if fitting[1:] else ""))
    else:
        smallest = min(found.values(), key=lambda one: one.total)
        lines.append(f"does not fit: at least {smallest.total / GB:.1f} GB are needed on each GPU")
        lines += [f"  {advice}" for advice in _advice(config, num_gpus, memory, model)]
    return lines, bool(fitting)


def _layouts(config: RunConfig) -> list[Layout]:
    """ZeRO-3 cannot divide 4-bit weights."""
    return [layout for layout in LAYOUTS if layout.stage != 3 or config.model.quantization == "none"]


def _advice(config: RunConfig, num_gpus: int, memory: float, model: Any) -> list[str]:
    """Single changes, each with the least it would then need."""
    groups = [group for group in config.train.trainable if group not in ("lm_full", "vision_full")]
    changes: dict[str, Mapping[str, Any]] = {
        "train.gradient_checkpointing=true": {"gradient_checkpointing": True},
        "train.batch_size=1": {"batch_size": 1},
        "LoRA in place of whole weights (lm_lora for lm_full)": {"trainable": [*groups, "lm_lora"]},
        "model.quantization=nf4": {"quantization": "nf4"},
    }
    if config.data.image_short_side is None:
        changes["data.max_pixels halved"] = {"max_pixels": config.data.max_pixels // 2}
    else:
        shorter = int(config.data.image_short_side * 0.7)  # half the pixels
        changes[f"data.image_short_side={shorter}"] = {"image_short_side": shorter}
    found = []
    for words, change in changes.items():
        changed = _changed(config, change)
        if to_dict(changed) == to_dict(config) or (
            words.startswith("LoRA") and "lm_full" not in config.train.trainable
        ):
            continue
        if changed.model.quantization == "nf4" and "lm_full" in changed.train.trainable:
            continue
        least = min(estimate(changed, layout, num_gpus, model).total for layout in _layouts(changed))
        found.append(f"{words}: {least / GB:.1f} GB{', fits' if least <= memory else ''}")
    return found


def _changed(config: RunConfig, change: Mapping[str, Any]) -> RunConfig:
    from finetune.config import build

    tree = to_dict(config)
    for name, value in change.items():
        section = {"quantization": "model", "max_pixels": "data", "image_short_side": "data"}.get(name, "train")
        tree[section][name] = value
    return build(RunConfig, tree, where="doctor")
