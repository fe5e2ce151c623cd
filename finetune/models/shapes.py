"""Published sizes of Qwen2.5-VL, and our model class at these sizes on the meta device: parameters without memory."""

from __future__ import annotations

import re
from typing import Any

import torch

from finetune.config import HeadsConfig, to_dict
from finetune.models.qwen_forensics_model import QwenForensicsConfig, QwenForensicsForConditionalGeneration

VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14,
    "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
"""The vision tower, the same at every size."""

RELEASED: dict[str, dict[str, Any]] = {
    "3B": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
           "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
"""The language model; rows of the embedding matrix with their padding."""


def released_shape(name: str) -> dict[str, Any] | None:
    """Sizes of a released checkpoint, as its config.json has them.

    Args:
        name: of a hub, such as `Qwen/Qwen2.5-VL-3B-Instruct`; what stands behind the last `/` counts.

    Returns:
        `text_config`, `vision_config` and `tie_word_embeddings`; None where the name says no size of `RELEASED`.
    """
    for size, text in RELEASED.items():
        if re.search(rf"(?<![A-Za-z0-9.]){size}(?![A-Za-z0-9])", name.rstrip("/").rpartition("/")[2], re.IGNORECASE):
            vision = {**VISION, "out_hidden_size": text["hidden_size"]}
            return {"text_config": text, "vision_config": vision, "tie_word_embeddings": text["tie_word_embeddings"]}
    return None


def build_on_meta(size: str, heads: HeadsConfig) -> QwenForensicsForConditionalGeneration:
    """Our class at a size of `RELEASED`, without storage and token ids, for counting; no language model where the heads
    need the tower alone."""
    shape = released_shape(size)
    assert shape is not None, size
    has_language = not (heads.enabled and heads.source == "vision")
    with torch.device("meta"):
        return QwenForensicsForConditionalGeneration(
            QwenForensicsConfig(**shape, heads=to_dict(heads), has_language=has_language)
        )
