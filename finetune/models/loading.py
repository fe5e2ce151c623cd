"""Model, tokenizer and processor as one unit: loading from hub names, plain folders, our folders and adapters; saving.

Everything a folder needs to be loaded again is written here. Weights alone are `weights`' part, texts and images into
ids and pixels `vocabulary`'s; their functions that other layers use have their names here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from finetune.config import HeadsConfig, ModelConfig, to_dict
from finetune.config.model_folder import ADAPTER_CONFIG
from finetune.errors import ModelLoadError
from finetune.models.plain import SECTION, read_config
from finetune.models.qwen_forensics_model import QwenForensicsConfig, QwenForensicsForConditionalGeneration
from finetune.models.vision_parts import PARTS_SECTION, BaseTower, write_parts
from finetune.models.vocabulary import (
    add_forensic_tokens,
    check_folder,
    check_tokenizer,
    load_processor,
    load_vocabulary,
    save_processor,
)
from finetune.models.weights import (
    base_model_path,
    check_adapter,
    grow_embeddings,
    load_adapter,
    load_model,
    refuse_pickle,
)
from finetune.special_tokens import SpecialTokens

__all__ = [
    "SETTINGS",
    "Bundle",
    "add_forensic_tokens",
    "base_model_path",
    "grow_embeddings",
    "is_plain",
    "load_adapter",
    "load_bundle",
    "load_model",
    "load_processor",
    "load_vocabulary",
    "refuse_pickle",
    "save_bundle",
    "save_processor",
    "saved_settings",
    "unwrap",
]

SETTINGS = "forensics.json"


@dataclass
class Bundle:
    """A model with the processor and the vocabulary that belong to it.

    model: a `QwenForensicsForConditionalGeneration`, or a PeftModel around one.
    has_new_heads: whether the heads are freshly initialised, so that their verdicts mean nothing yet.
    tower: the base of heads on the vision tower, whose weights are not copied on saving; None: saved as a whole model
        or as an adapter.
    settings: what other layers want to find again beside the weights (template, layout, origin); plain JSON, not read
    here.
    """

    model: nn.Module
    processor: Any
    tokens: SpecialTokens
    settings: dict[str, Any] = field(default_factory=dict)
    has_new_heads: bool = False
    tower: BaseTower | None = None

    @property
    def base(self) -> QwenForensicsForConditionalGeneration:
        """The model without a PEFT wrapper."""
        return unwrap(self.model)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer


def unwrap(model: Any) -> QwenForensicsForConditionalGeneration:
    """The `QwenForensicsForConditionalGeneration` inside any wrapper (DDP, DeepSpeed, PEFT)."""
    while not isinstance(model, QwenForensicsForConditionalGeneration):
        inner = getattr(model, "module", None) or getattr(getattr(model, "base_model", None), "model", None)
        if inner is None:
            raise TypeError(f"found a {type(model).__name__}, expected a QwenForensicsForConditionalGeneration")
        model = inner
    return model


def load_bundle(
    config: ModelConfig,
    tokens: SpecialTokens | None = None,
    heads: HeadsConfig | None = None,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    device_map: Any = None,
    build_base: Callable[[dict[str, Any]], QwenForensicsForConditionalGeneration] | None = None,
) -> Bundle:
    """Load a checkpoint of any kind with its processor.

    A plain Qwen2.5-VL checkpoint gets `tokens` and `heads` (or their defaults); a folder saved by this project keeps
    its own, and `heads`, when given, must have the same shapes. A folder with `adapter_config.json` is loaded on its
    base model, a plain folder exported by `forensics merge --plain` with the heads beside it.

    Args:
        build_base: makes the base model from the fields of `QwenForensicsConfig` instead of reading `config.path`
            (`finetune.models.shared_base` puts several adapters on one base with it).

    Raises:
        ModelLoadError: folder missing or incomplete, weights that do not fit, an adapter that matches nothing.
    """
    adapter = config.adapter or (config.path if (Path(config.path) / ADAPTER_CONFIG).is_file() else None)
    source = adapter or config.path
    check_folder(source)
    saved = read_config(source)
    from finetune.models.vision_loading import open_vision, reads_tower  # which itself loads through this module

    if reads_tower(config, saved, heads):
        return open_vision(
            config, heads, min_pixels=min_pixels, max_pixels=max_pixels, device_map=device_map, build_base=build_base
        )
    if adapter:
        check_adapter(adapter)
    check_continuation(source, saved, tokens, heads)
    processor, tokens, new_ids = load_vocabulary(source, tokens, min_pixels, max_pixels)
    base_path = base_model_path(adapter) if adapter and adapter == config.path else config.path
    check_folder(base_path)
    if adapter and read_config(base_path) is None:  # a plain base lacks rows for the tokens the adapter brings
        new_ids = processor.tokenizer.convert_tokens_to_ids(list(tokens.all))
    settings_of_model = _model_settings(saved, heads, processor, tokens)
    settings_of_model["region_features"] = config.region_features or (saved is not None and saved.region_features)
    settings_of_model["has_language"] = config.language != "skip" and (saved is None or saved.has_language)
    if build_base is not None:
        model = build_base(settings_of_model)
    else:
        model = load_model(base_path, config, settings_of_model, device_map)
    check_tokenizer(source, processor, model)
    if model.config.has_language:
        grow_embeddings(model, len(processor.tokenizer), new_ids)
    settings = saved_settings(source)
    if adapter:
        wrapped = load_adapter(model, adapter)
        is_new = model.has_heads and read_config(base_path) is None and not _brings_heads(wrapped)
        return Bundle(wrapped, processor, tokens, settings, has_new_heads=is_new)
    return Bundle(model, processor, tokens, settings, has_new_heads=model.has_heads and saved is None)


def saved_settings(source: str | Path) -> dict[str, Any]:
    """What other layers wrote beside a model (`Bundle.settings`); {} where there is nothing."""
    file = Path(source) / SETTINGS
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for section in (SECTION, PARTS_SECTION):
        settings.pop(section, None)  # describes the folder's files, not the model
    return settings


def _brings_heads(wrapped: Any) -> bool:
    """Whether an adapter holds trained heads; without them a plain base's heads are random."""
    return "cls_head" in (wrapped.peft_config[wrapped.active_adapter].modules_to_save or ())


def save_bundle(
    bundle: Bundle, out_dir: str | Path, state_dict: dict[str, Any] | None = None, max_shard_size: str | None = None
) -> None:
    """Write a folder that `load_bundle` opens: weights, adapter or vision parts, our config, tokenizer, processor."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Any] = {}
    if bundle.tower is not None:
        sections[PARTS_SECTION] = write_parts(bundle.model, bundle.tower, out_dir, state_dict)
    else:
        _write_weights(bundle, out_dir, state_dict, max_shard_size)
    save_processor(bundle.processor, out_dir)
    settings = json.dumps({**bundle.settings, **sections}, indent=2, ensure_ascii=False)
    (out_dir / SETTINGS).write_text(settings, encoding="utf-8")


def _write_weights(
    bundle: Bundle, out_dir: Path, state_dict: dict[str, Any] | None, max_shard_size: str | None
) -> None:
    """A whole model, or an adapter with its configuration."""
    arguments: dict[str, Any] = {} if bundle.model is bundle.base else {"save_embedding_layers": False}
    if max_shard_size is not None:
        arguments["max_shard_size"] = max_shard_size
    bundle.model.save_pretrained(out_dir, state_dict=state_dict, **arguments)
    if bundle.model is not bundle.base:
        bundle.base.config.save_pretrained(out_dir)


def _model_settings(
    saved: QwenForensicsConfig | None, heads: HeadsConfig | None, processor: Any, tokens: SpecialTokens
) -> dict[str, Any]:
    ids = processor.tokenizer.convert_tokens_to_ids
    settings: dict[str, Any] = {
        "cls_token_ids": ids(list(tokens.cls)),
        "mask_token_ids": ids(list(tokens.mask)),
        "image_mean": list(processor.image_processor.image_mean),
        "image_std": list(processor.image_processor.image_std),
    }
    if heads is not None:
        settings["heads"] = to_dict(heads)
    elif saved is not None:
        settings["heads"] = saved.heads
    return settings


def check_continuation(
    source: str | Path, saved: QwenForensicsConfig | None, tokens: SpecialTokens | None, heads: HeadsConfig | None
) -> None:
    """Refuse tokens and heads that a folder with trained heads does not have, before anything else is read of it.

    Args:
        saved: the folder's configuration. tokens, heads: as asked for; None takes the folder's.

    Raises:
        ModelLoadError: they differ, where heads that stand on tokens go on.
    """
    if saved is None or heads is None or not (saved.heads_config.enabled and heads.enabled):
        return
    then, depth = saved.heads_config, saved.vision_config.depth
    same: dict[str, tuple[Any, Any]] = {"operations": (then.operations, heads.operations)}
    if then.source == heads.source == "tokens":
        if tokens is not None and saved.cls_token_ids and tokens != SpecialTokens(saved.num_cls, saved.num_mask):
            raise ModelLoadError(
                f"{source}: its heads stand on the tokens {{num_cls: {saved.num_cls}, num_mask: {saved.num_mask}}}, "
                f"the configuration asks for tokens: {{num_cls: {tokens.num_cls}, num_mask: {tokens.num_mask}}}; set "
                "them as they were, or start from another folder"
            )
        last = saved.text_config.num_hidden_layers
        same["layer"] = (_layer_number(then.layer, last), _layer_number(heads.layer, last))
        same["vision_layers"] = ([n % depth for n in then.vision_layers], [n % depth for n in heads.vision_layers])
    check_same_heads(source, same)


def _layer_number(layer: str | int, last: int) -> str | int:
    """`heads.layer` counted from the embeddings, so that one layer has one name."""
    if layer == "weighted":
        return layer
    return last if layer == "last" else int(layer) % (last + 1)


def check_same_heads(folder: str | Path, same: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse settings that trained heads cannot change and the shapes of their weights need not tell.

    Args:
        folder: where the heads are. same: name of a setting in `heads` -> (as saved, as asked for).

    Raises:
        ModelLoadError: two of them differ.
    """
    for name, (found, wanted) in same.items():
        if found != wanted:
            raise ModelLoadError(
                f"{folder}: its heads have heads.{name} {found}, the configuration asks for {wanted}; set "
                f"heads.{name} as it was, or start from another folder"
            )


def is_plain(path: str) -> bool:
    """Whether a base folder or hub name is a released Qwen2.5-VL: without trained heads, without forensic tokens."""
    check_folder(path)
    return read_config(path) is None
