"""What the tests of the model share: loading a bundle, batches of records, a forward pass without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.config import DataConfig, HeadsConfig, ModelConfig, NoiseResidualConfig
from finetune.data.collator import MODEL_KEYS, ForensicCollator
from finetune.data.dataset import ForensicDataset
from finetune.data.readers import read_records
from finetune.models.loading import Bundle, load_bundle
from finetune.schema import Record
from finetune.special_tokens import SpecialTokens

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 4}
"""A decoder that is quick to run; merged into the heads of `load`."""

STREAM = NoiseResidualConfig(enabled=True, channels=8, widths=[8, 8, 8], global_blocks=1)
"""A noise-residual stream that is quick to run."""


def load(path: str | Path, tokens: SpecialTokens | None = None, dtype: Any = "float32", **heads: Any) -> Bundle:
    """A bundle in evaluation mode; keyword arguments are fields of `HeadsConfig`."""
    config = ModelConfig(path=str(path), dtype=dtype)
    bundle = load_bundle(config, tokens, HeadsConfig(**{**SMALL, **heads}))
    bundle.model.eval()
    return bundle


def record_named(path: Path, *names: str) -> list[Record]:
    """Records of a JSONL in the order of `names`; all of them without names."""
    records = {record.id: record for record in read_records(str(path))}
    return [records[name] for name in names] if names else list(records.values())


def samples_of(bundle: Bundle, records: Sequence[Record], **config: Any) -> list[Any]:
    """Dataset items; keyword arguments are fields of `DataConfig`."""
    dataset = ForensicDataset(records, bundle.processor, bundle.tokens, DataConfig(**config))
    return [dataset[i] for i in range(len(dataset))]


def collate(bundle: Bundle, samples: Sequence[Any], padding_side: Literal["left", "right"] = "right") -> dict[str, Any]:
    """The collator's batch."""
    return ForensicCollator(bundle.processor, bundle.tokens, padding_side)(samples)


def forward(model: Any, batch: dict[str, Any], **changes: Any) -> Any:
    """Output for the model's keys of a batch, logits at every position, no gradients."""
    inputs = {key: batch[key] for key in MODEL_KEYS if key in batch and key != "logits_to_keep"} | changes
    with torch.no_grad():
        return model(**inputs)


def plain_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What the base class takes of a batch."""
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    return {key: batch[key] for key in keys if key in batch}


def head_outputs(output: Any) -> list[Tensor]:
    """Every number the heads return, as a list of tensors."""
    maps = [*output.mask_logits, *output.mask_features, *(output.operation_logits or [])]
    return [output.cls_logits, output.image_features, *maps]


def assert_same(found: Any, expected: Any, atol: float = 0.0) -> None:
    """Text logits and head outputs agree; bit by bit with the default tolerance."""
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=atol)
    pairs = list(zip(head_outputs(found), head_outputs(expected), strict=True))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
