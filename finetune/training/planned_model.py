"""The model that a configuration asks for, known from a config.json or a released name before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

from finetune.config import RunConfig, to_dict
from finetune.errors import ConfigError
from finetune.models.qwen_forensics_model import QwenForensicsConfig, QwenForensicsForConditionalGeneration
from finetune.models.shapes import released_shape


def planned_config(config: RunConfig) -> QwenForensicsConfig:
    """The configuration of the model to be trained; its token ids are placeholders.

    Raises:
        ConfigError: `model.path` is neither a folder with config.json nor a released 3B or 7B name.
    """
    place = config.model.path if Path(config.model.path).is_dir() else config.model.base or config.model.path
    file = Path(place) / "config.json"
    shape = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else released_shape(place)
    if shape is None:
        raise ConfigError(
            f"model.path '{config.model.path}' is no folder with config.json, and its name says neither 3B nor 7B: "
            "the shape of the model is not known"
        )
    base = Qwen2_5_VLConfig(**{key: shape[key] for key in ("text_config", "vision_config") if key in shape})
    first, num_cls, num_mask = base.text_config.vocab_size - 64, config.tokens.num_cls, config.tokens.num_mask
    tied = shape.get("tie_word_embeddings", base.text_config.tie_word_embeddings)
    full = QwenForensicsConfig(
        **{**base.to_dict(), "tie_word_embeddings": tied},
        heads=to_dict(config.heads),
        cls_token_ids=list(range(first, first + num_cls)),
        mask_token_ids=list(range(first + num_cls, first + num_cls + num_mask)),
        has_language=config.model.language == "load" or not config.reads_pictures_only,
        region_features=config.model.region_features,
    )
    full.text_config.tie_word_embeddings = tied
    return full


def meta_model(config: RunConfig) -> QwenForensicsForConditionalGeneration:
    """The model to be trained, without weights.

    Raises:
        ConfigError: as `planned_config`, or heads that this model cannot have.
    """
    full = planned_config(config)
    with torch.device("meta"):
        return QwenForensicsForConditionalGeneration(full)
