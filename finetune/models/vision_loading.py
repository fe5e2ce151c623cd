"""Opening models whose heads read the vision tower alone: base, heads and LoRA come from up to three places.

Every head weight must find its place. Parts that the folder lacks and the new configuration has (a stage adds the mask
head, or the verdict's summand from the mask) are new and named in the log; everything else that differs is an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune.config import HeadsConfig, ModelConfig, NoiseResidualConfig, to_dict
from finetune.config.model_folder import ADAPTER_CONFIG
from finetune.errors import ModelLoadError
from finetune.models.configuration import QwenForensicsConfig
from finetune.models.loading import (
    Bundle,
    base_model_path,
    check_same_heads,
    load_adapter,
    load_model,
    load_processor,
    saved_settings,
)
from finetune.models.plain import HEADS_FILE, is_head, read_config
from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration
from finetune.models.vision_parts import (
    LORA_DIR,
    BaseTower,
    StoredHeads,
    parts_section,
    read_heads,
    tower_fingerprint,
)
from finetune.special_tokens import SpecialTokens

logger = logging.getLogger(__name__)

BuildBase = Callable[[dict[str, Any]], QwenForensicsForConditionalGeneration]

_STREAM_PARTS = ("noise_residual", "neck.stream_norm", "neck.stream_proj")
_MASK_PARTS = ("mask_head", "mask_queries", "cls_head.evidence", "operation_head")
_STARTS_AT_ZERO = ("cls_head.evidence.3.", "neck.stream_proj.")
"""New summands beside trained ones: zero at first, so that a stage begins with the verdicts of the one before."""
_MASK_FIELDS = ("mask", "num_layers", "num_heads", "num_queries", "grid_size", "mask_sigmoid")


def load_vision(
    base_path: str | Path,
    heads_dir: str | Path | None = None,
    lora_dir: str | Path | None = None,
    language: bool = False,
    *,
    heads: HeadsConfig | None = None,
    use_lora: bool = True,
    config: ModelConfig | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    device_map: Any = None,
    build_base: BuildBase | None = None,
) -> Bundle:
    """A model with heads on its vision tower.

    Args:
        base_path: a Qwen2.5-VL (folder or hub name), or a whole model of ours; tower and language come from it.
        heads_dir: where the heads are: a folder of vision parts (or its heads.safetensors), or any model of ours;
            None: new heads.
        lora_dir: PEFT folder of the tower; None: `vision_lora` of `heads_dir`, where there is one.
        language: also read the language model; without it neither built nor read from disk.
        heads: what the heads are to be; None: as they were saved, or `HeadsConfig(source="vision")`.
        use_lora: False leaves out the LoRA that belongs to the heads (which then see features they do not know).
        config: dtype, attention and quantisation; its paths are not read.
        min_pixels, max_pixels: as `load_processor`; None: as saved beside the heads, or the base's.
        build_base: makes the model of `base_path` instead of reading it, as of `load_bundle`.

    Raises:
        ModelLoadError: a folder that is missing or incomplete, heads of another block list, width or base, LoRA that
            matches nothing.
    """
    config = config or ModelConfig()
    stored = None if heads_dir is None else read_heads(heads_dir)
    if heads_dir is not None and stored is None and str(heads_dir) != str(base_path):
        raise ModelLoadError(f"{heads_dir}: no heads there; expected a folder with {HEADS_FILE} and config.json")
    heads = heads or _saved_vision(stored) or HeadsConfig(source="vision")
    lora = _lora_folder(stored, lora_dir, use_lora)
    source = stored.folder if stored is not None and not stored.other_keys else base_path
    processor = load_processor(source, min_pixels, max_pixels)
    model = _build(str(base_path), config, heads, processor, language, device_map, build_base)
    tower = BaseTower(str(base_path), tower_fingerprint(model))
    _check_tower(stored, model, tower)
    filled = fill_heads(model, stored) if stored is not None else set()
    settings = {} if stored is None or _saved_vision(stored) is None else saved_settings(stored.folder)
    tokens = SpecialTokens(model.config.num_cls, model.config.num_mask)
    wrapped: Any = model
    if lora is not None:
        wrapped = load_adapter(model, lora)
        _print_lora(wrapped, lora)
    is_new = not any(name.startswith("cls_head.out") for name in filled)
    return Bundle(wrapped, processor, tokens, settings, has_new_heads=is_new, tower=tower)


def reads_tower(config: ModelConfig, saved: QwenForensicsConfig | None, heads: HeadsConfig | None) -> bool:
    """Whether `open_vision` opens this: vision parts, or heads on the tower asked for or saved.

    Args:
        saved: our configuration of the folder, None for a plain model.
    """
    place = Path(config.adapter or config.path)
    if parts_section(place) is not None:
        return True
    kept = None if saved is None else saved.heads_config
    if (place / ADAPTER_CONFIG).is_file() and kept is not None and kept.source == "vision":
        return False  # language or blocks of the tower trained with them: an adapter like any other
    wanted = heads or kept
    return wanted is not None and wanted.enabled and wanted.source == "vision"


def open_vision(
    config: ModelConfig,
    heads: HeadsConfig | None = None,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    device_map: Any = None,
    build_base: BuildBase | None = None,
) -> Bundle:
    """What `load_bundle` does for heads on the tower: finds base and heads from `config`.

    `config.path` is a folder of vision parts (its base is `config.base`, or the one it names), an adapter of ours (only
    its heads are taken), or a model with or without heads.

    Raises:
        ModelLoadError: as `load_vision`, or a base that is not where the folder says.
    """
    place = config.adapter or config.path
    if heads is not None and not (heads.enabled and heads.source == "vision"):
        raise ModelLoadError(
            f"{place}: a folder of vision parts, for heads.source: vision; to train other heads, start from its base"
        )
    section = parts_section(place)
    base, heads_dir = config.base or config.path, place
    if section is not None:
        base = config.base or (config.path if config.adapter else str(section.get("base", "")))
        _check_base(place, base)
    elif (Path(place) / ADAPTER_CONFIG).is_file():
        base = config.base or (config.path if config.adapter else base_model_path(place))
        _check_only_heads(place, reads_language=config.language == "load")
    return load_vision(
        base, heads_dir, language=config.language == "load", heads=heads, config=config,
        min_pixels=min_pixels, max_pixels=max_pixels, device_map=device_map, build_base=build_base,
    )  # fmt: skip


def fill_heads(model: QwenForensicsForConditionalGeneration, stored: StoredHeads) -> set[str]:
    """Copy stored head weights into the model's heads; says which parts are new.

    Returns:
        The names that were filled.

    Raises:
        ModelLoadError: other blocks, width or kind, or a weight without a place.
    """
    then, now = stored.config.heads_config, model.config.heads_config
    tensors = stored.tensors
    allowed: tuple[str, ...] = ()
    if then.source != "vision":
        has_same = replace(then.noise_residual, to_language=False)  # that layer stays behind
        is_same = _as_built(has_same) == _as_built(now.noise_residual)
        tensors = {name: value for name, value in tensors.items() if is_same and name.startswith("noise_residual.")}
        allowed = ("",)
    else:
        _check_same(stored, then, now, model.config.vision_config.depth)
        if then.mask == "none":
            allowed += _MASK_PARTS
        if not then.cls_uses_mask:
            allowed += ("cls_head.evidence",)
        if not then.operations:
            allowed += ("operation_head",)
        if then.mask == "none" and not then.noise_residual.enabled:
            allowed += _STREAM_PARTS
    own = {name: value for name, value in model.state_dict().items() if is_head(name)}
    new = [name for name in own if name not in tensors]
    odd = sorted(set(tensors) - set(own)) or [name for name in new if not name.startswith(allowed)]
    odd = odd or [name for name in tensors if own[name].shape != tensors[name].shape]
    if odd:
        raise ModelLoadError(
            f"{stored.folder}: {len(odd)} of its {len(tensors)} head weights do not fit the heads asked for, e.g. "
            f"'{odd[0]}'; use the `heads` section these weights were trained with"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
        for name in new:
            if tensors and then.source == "vision" and name.startswith(_STARTS_AT_ZERO):
                own[name].zero_()
    parts = sorted({_part(name) for name in new})
    logger.info("heads of %s: %d weights taken over; new: %s", stored.folder, len(tensors), ", ".join(parts) or "none")
    return set(tensors)


# ---- pieces ----


def _build(
    base: str,
    config: ModelConfig,
    heads: HeadsConfig,
    processor: Any,
    language: bool,
    device_map: Any,
    build_base: BuildBase | None,
) -> QwenForensicsForConditionalGeneration:
    """The base with new heads, which stay in float32 whatever the base's type."""
    own = read_config(base)
    if language and own is not None and not own.has_language:
        raise ModelLoadError(f"{base}: saved without its language model; use model.language: skip, or another base")
    off = {"heads": to_dict(HeadsConfig(enabled=False)), "has_language": language}
    if build_base is not None:
        model = build_base(off)
    else:
        model = load_model(base, config, off, device_map, ignores_heads=True)
    image_processor = processor.image_processor
    model.replace_heads(
        {
            "heads": to_dict(heads),
            "image_mean": list(image_processor.image_mean),
            "image_std": list(image_processor.image_std),
        }
    )
    for module in model.head_modules():
        module.to(model.device)
    return model


def _saved_vision(stored: StoredHeads | None) -> HeadsConfig | None:
    if stored is None or stored.config.heads_config.source != "vision":
        return None
    return stored.config.heads_config


def _lora_folder(stored: StoredHeads | None, lora_dir: str | Path | None, use_lora: bool) -> Path | None:
    if not use_lora:
        return None
    if lora_dir is not None:
        if not (Path(lora_dir) / ADAPTER_CONFIG).is_file():
            raise ModelLoadError(f"{lora_dir}: no {ADAPTER_CONFIG}; expected a PEFT folder of the vision tower")
        return Path(lora_dir)
    if stored is None:
        return None
    own = stored.folder / LORA_DIR
    if own.is_dir():
        return own
    if (parts_section(stored.folder) or {}).get("has_lora"):
        raise ModelLoadError(
            f"{stored.folder}: these heads were trained with LoRA on the tower, and {LORA_DIR} is not there; copy the "
            "whole folder, or name the LoRA folder"
        )
    return None


def _check_tower(stored: StoredHeads | None, model: QwenForensicsForConditionalGeneration, tower: BaseTower) -> None:
    """Heads on a tower know its features only; shapes alone would not tell a 3B's tower from another one."""
    if stored is None or stored.config.heads_config.source != "vision":
        return
    then, now = stored.config.vision_config, model.config.vision_config
    for name in ("depth", "hidden_size", "out_hidden_size", "patch_size"):
        if getattr(then, name) != getattr(now, name):
            raise ModelLoadError(
                f"{stored.folder}: these heads were trained on a vision tower with {name} {getattr(then, name)}, that "
                f"of {tower.path} has {getattr(now, name)}; give the base they were trained on"
            )
    found = (parts_section(stored.folder) or {}).get("fingerprint")
    if found and found != tower.fingerprint and model.dtype != torch.float16:  # which rounds small weights differently
        raise ModelLoadError(
            f"{stored.folder}: these heads were trained on another vision tower (fingerprint {found}) than that of "
            f"{tower.path} ({tower.fingerprint}); give the base they were trained on (model.base)"
        )


def _as_built(stream: NoiseResidualConfig) -> NoiseResidualConfig:
    """What its weights depend on: how many pictures are searched in training may change from run to run."""
    return replace(stream, similarity_share=1.0)


def _check_same(stored: StoredHeads, then: HeadsConfig, now: HeadsConfig, depth: int) -> None:
    """The settings that shapes do not tell, and those whose difference is better said in words."""
    same: dict[str, tuple[Any, Any]] = {
        "vision_layers": ([b % depth for b in then.vision_layers], [b % depth for b in now.vision_layers]),
        "hidden_size": (then.hidden_size, now.hidden_size),
    }
    if then.mask != "none":
        same |= {name: (getattr(then, name), getattr(now, name)) for name in _MASK_FIELDS}
        if then.cls_uses_mask:
            same["cls_uses_mask"] = (True, now.cls_uses_mask)
        if then.operations:
            same["operations"] = (then.operations, now.operations)
    if then.noise_residual.enabled or then.mask != "none":
        same["noise_residual"] = (_as_built(then.noise_residual), _as_built(now.noise_residual))
    check_same_heads(stored.folder, same)


def _check_base(place: str, base: str) -> None:
    if not base:
        raise ModelLoadError(f"{place}: names no base model; give it as model.base")
    is_local = base.startswith((".", "/", "~")) or base.count("/") != 1
    if is_local and not Path(base).is_dir():
        raise ModelLoadError(
            f"{place}: its base model '{base}' is not there; give the folder of the Qwen2.5-VL it was trained on as "
            "model.base"
        )


def _check_only_heads(place: str, *, reads_language: bool) -> None:
    """An adapter of the token stages may lend its heads; what else it changed would be lost in silence."""
    stored = read_heads(place)
    others = stored.other_keys if stored is not None else ()
    lost = [key for key in others if ".visual." in key or (reads_language and "trainable_tokens" not in key)]
    if lost:
        raise ModelLoadError(
            f"{place}: heads on the vision tower cannot start from this adapter, which also changes '{lost[0]}'; merge "
            "it first (forensics merge) and start from that model"
        )


def _part(name: str) -> str:
    """The part of the heads a weight belongs to, as the log names it."""
    known = (*_STREAM_PARTS, *_MASK_PARTS)
    return next((part for part in known if name.startswith(part)), name.split(".")[0])


def _print_lora(wrapped: Any, folder: Path) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    names = lora_layers(wrapped)
    print(f"LoRA of {folder} on {len(names)} layers:\n  " + "\n  ".join(names))


def lora_layers(model: Any) -> list[str]:
    """Names of the layers that carry LoRA, as in the unwrapped model."""
    found = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return [name.removeprefix("base_model.model.") for name in found]
