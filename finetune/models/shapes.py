"""The published sizes of Qwen2.5-VL, and our model class at these sizes on the meta device: parameters without memory.

For counting and for golden lists of what trains; nothing built here can compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.config import HeadsConfig, to_dict
from finetune.models.qwen_forensics_model import QwenForensicsConfig, QwenForensicsForConditionalGeneration


@dataclass(frozen=True)
class Shape:
    """Published sizes of a Qwen2.5-VL checkpoint; the vision tower is the same in both."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    rows: int  # of the embedding matrix, padding included
    is_tied: bool


SHAPES = {
    "3B": Shape(2048, 36, 16, 2, 11008, 151936, True),
    "7B": Shape(3584, 28, 28, 4, 18944, 152064, False),
}
VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14,
    "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def build_on_meta(
    shape: Shape, heads: HeadsConfig, token_ids: tuple[list[int], list[int]] | None = None
) -> QwenForensicsForConditionalGeneration:
    """Our class at the published size, without storage; no language model where the heads need the tower alone.

    Args:
        token_ids: ids of the cls and of the mask tokens; without them no token row can train.
    """
    cls_ids, mask_ids = token_ids or ([], [])
    config = QwenForensicsConfig(
        text_config={
            "vocab_size": shape.rows,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "tie_word_embeddings": shape.is_tied,
        },
        vision_config={**VISION, "out_hidden_size": shape.hidden},
        tie_word_embeddings=shape.is_tied,
        heads=to_dict(heads),
        cls_token_ids=cls_ids,
        mask_token_ids=mask_ids,
        has_language=not (heads.enabled and heads.source == "vision"),
    )
    with torch.device("meta"):
        return QwenForensicsForConditionalGeneration(config)
