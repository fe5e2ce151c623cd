"""The heads run in whatever precision their weights have been given: DeepSpeed casts every parameter of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import STREAM, collate, load, record_named, samples_of

from finetune.config import LossConfig
from finetune.data.collator import MODEL_KEYS
from finetune.losses.criterion import Criterion, total
from finetune.models.loading import Bundle

LOSSES = LossConfig(
    text=1.0, focal=1.0, dice=1.0, boundary=1.0, authentic=1.0, bce=1.0, contrast_region=1.0, contrast_image=1.0,
    operation=1.0,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "query": {"noise_residual": STREAM, "layer": "weighted", "cls_uses_mask": True, "operations": ["splice"]},
    "query without stream": {"cls_uses_mask": True},
    "grid": {"mask": "grid", "noise_residual": STREAM, "layer": 1, "cls_uses_mask": True},
    "on the tower": {
        "source": "vision",
        "vision_layers": [0, 2],
        "noise_residual": STREAM,
        "operations": ["splice", "retouch"],
    },
    "to language": {"noise_residual": STREAM, "mask_sigmoid": True},
}

EXPECTED: dict[str, dict[str, torch.Tensor]] = {}
"""In float32, of each variant; filled by the first test that asks."""


def gradients(bundle: Bundle, records: Path) -> dict[str, torch.Tensor]:
    """Of every parameter, for one batch with all loss terms."""
    names = ("tampered_150x211", "real_84x140", "unmasked_140x84")
    batch = collate(bundle, samples_of(bundle, record_named(records, *names)))
    if bundle.base.heads_config.operations:
        batch["operation_maps"] = batch["mask_targets"]  # the first operation
    bundle.model.train()
    inputs = {key: batch[key] for key in MODEL_KEYS if key in batch}
    if bundle.base.reads_tower:
        inputs = {key: inputs[key] for key in ("pixel_values", "image_grid_thw", "mask_sizes_hw")}
    outputs = bundle.model(**inputs, **({} if bundle.base.reads_tower else {"use_cache": False}))
    if bundle.base.reads_tower:  # every image has its outputs, tokens or not
        batch |= {key: getattr(outputs, key) for key in ("cls_image_index", "mask_image_index")}
    loss = total(Criterion(LOSSES)(outputs, batch))[0]
    loss = loss if outputs.branch_anchor is None else loss + outputs.branch_anchor
    assert torch.isfinite(loss)
    loss.backward()
    return {name: p.grad for name, p in bundle.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtypes", ["all bfloat16", "heads in float32", "heads in bfloat16"])
def test_heads_train_in_the_dtype_of_their_weights(tied: Path, photo_records: Path, name: str, dtypes: str) -> None:
    """Whole model cast as DeepSpeed casts it, and either part in half precision; gradients near those of float32."""
    settings = dict(VARIANTS[name])
    if name == "to language":
        settings["noise_residual"] = STREAM.__class__(**{**vars(STREAM), "to_language": True})
    if name not in EXPECTED:
        EXPECTED[name] = gradients(load(tied, **settings), photo_records)
    expected = EXPECTED[name]
    bundle = load(tied, dtype="bfloat16" if dtypes == "heads in float32" else "float32", **settings)
    if dtypes == "all bfloat16":
        bundle.model.to(torch.bfloat16)
    if dtypes == "heads in bfloat16":
        for module in bundle.base.head_modules():
            module.to(torch.bfloat16)
    found = gradients(bundle, photo_records)
    assert found.keys() == expected.keys()
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
    for part in ("cls_head.out.weight", "mask_head.direct.weight" if name != "grid" else "mask_head.out.weight"):
        ours, theirs = found[part].float().flatten(), expected[part].flatten()
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9, part
