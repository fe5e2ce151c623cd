"""The model that a configuration asks for, known from a config.json or a released name before any weight is read."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen2_5_VLConfig

from finetune.config import RunConfig, to_dict
from finetune.config.model_folder import MODEL_CONFIG
from finetune.errors import ConfigError
from finetune.models.qwen_forensics_model import QwenForensicsConfig, QwenForensicsForConditionalGeneration
from finetune.models.shapes import released_shape


def planned_config(config: RunConfig) -> QwenForensicsConfig | None:
    """The configuration of the model to be trained, with placeholders for token ids; None where its shape is not known:
    neither a folder with config.json nor the name of a released 3B or 7B.

    Raises:
        ConfigError: a config.json that cannot be used.
    """
    place = config.model.path if Path(config.model.path).is_dir() else config.model.base or config.model.path
    base = _shape(place)
    if base is None:
        return None
    first, num_cls, num_mask = base.text_config.vocab_size - 64, config.tokens.num_cls, config.tokens.num_mask
    own = {
        "heads": to_dict(config.heads),
        "cls_token_ids": list(range(first, first + num_cls)),
        "mask_token_ids": list(range(first + num_cls, first + num_cls + num_mask)),
        "has_language": config.loads_language,
        "region_features": config.model.region_features,
    }
    planned = QwenForensicsConfig(**{**base.to_dict(), **own})
    planned.text_config.tie_word_embeddings = base.tie_word_embeddings
    return planned


def _shape(place: str) -> Qwen2_5_VLConfig | None:
    if not (Path(place) / MODEL_CONFIG).is_file():
        sizes = None if Path(place).is_dir() else released_shape(place)
        return None if sizes is None else Qwen2_5_VLConfig(**sizes)
    try:
        return QwenForensicsConfig.from_pretrained(place)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{place}: config.json cannot be used ({reason}); copy the folder again") from error


def meta_model(config: RunConfig) -> QwenForensicsForConditionalGeneration:
    """The model to be trained, without weights.

    Raises:
        ConfigError: its shape is not known, or heads that it cannot have.
    """
    planned = planned_config(config)
    if planned is None:
        raise ConfigError(
            f"model.path '{config.model.path}' is no folder with config.json, and its name says neither 3B nor 7B: "
            "the shape of the model is not known"
        )
    with torch.device("meta"):
        return QwenForensicsForConditionalGeneration(planned)
