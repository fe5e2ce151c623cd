"""Without heads, without tokens and with zero LoRA the model is Qwen2.5-VL, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import STREAM, assert_same, collate, forward, load, plain_inputs, record_named, samples_of
from transformers import Qwen2_5_VLForConditionalGeneration

from finetune.config import LoraConfig
from finetune.data.dataset import Sample
from finetune.models.adapters import set_trainable
from finetune.models.loading import Bundle

NAMES = ("tampered_224x196", "real_84x140", "text")


def base_logits(path: Path, bundle: Bundle, batch: dict[str, Any]) -> torch.Tensor:
    """The base class's logits, with the same rows for the forensic tokens."""
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(bundle.base.get_input_embeddings().weight)
        base.get_output_embeddings().weight.copy_(bundle.base.get_output_embeddings().weight)
        return base(**plain_inputs(batch)).logits


def without_tokens(bundle: Bundle, samples: list[Sample]) -> list[Sample]:
    ids = set(bundle.tokenizer.convert_tokens_to_ids(list(bundle.tokens.all)))
    for sample in samples:
        sample.input_ids = [token for token in sample.input_ids if token not in ids]
        sample.labels = [-100] * len(sample.input_ids)
    return samples


@pytest.mark.parametrize("heads", [{"enabled": False}, {}, {"noise_residual": STREAM}])
def test_text_logits_are_the_base_class_s(checkpoint: Path, photo_records: Path, heads: dict[str, Any]) -> None:
    bundle = load(checkpoint, **heads)
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, *NAMES)))
    output = forward(bundle.model, batch)
    assert torch.equal(output.logits, base_logits(checkpoint, bundle, batch))
    assert (output.cls_logits is None) == (heads.get("enabled") is False)


def test_images_beside_a_video_are_left_to_the_base_class(tied: Path) -> None:
    """transformers takes videos only where it runs the tower itself."""
    bundle = load(tied, enabled=False)
    config = bundle.base.config
    torch.manual_seed(0)
    pixels, grid = torch.randn(16, 1176), torch.tensor([[1, 4, 4]])
    image, video = [config.image_token_id] * 4, [config.video_token_id] * 4
    start, end = config.vision_start_token_id, config.vision_end_token_id
    ids = torch.tensor([[5, start, *image, end, start, *video, end, 7]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image[0]) * 1 + (ids == video[0]) * 2,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "pixel_values_videos": pixels.flip(0),
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tied, dtype=torch.float32).eval()
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(bundle.base.get_input_embeddings().weight)
        base.get_output_embeddings().weight.copy_(bundle.base.get_output_embeddings().weight)
        assert torch.equal(bundle.model(**inputs).logits, base(**inputs).logits)


def test_heads_stay_silent_without_tokens(tied: Path, photo_records: Path) -> None:
    bundle = load(tied)
    samples = without_tokens(bundle, samples_of(bundle, record_named(photo_records, *NAMES)))
    batch = collate(bundle, samples)
    output = forward(bundle.model, batch)
    assert output.cls_logits is None
    assert output.mask_logits is None
    assert torch.equal(output.logits, base_logits(tied, bundle, batch))


def test_logits_to_keep_selects_positions_of_the_full_logits(tied: Path, photo_records: Path) -> None:
    bundle = load(tied)
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, *NAMES)))
    kept = forward(bundle.model, batch, logits_to_keep=batch["logits_to_keep"]).logits
    full = forward(bundle.model, batch).logits
    assert kept.shape[0] == len(batch["text_targets"]) > 0
    torch.testing.assert_close(kept, full[batch["logits_to_keep"]], rtol=0, atol=1e-5)  # another matmul shape


def test_base_class_labels_give_the_mean_over_the_kept_positions(tied: Path, photo_records: Path) -> None:
    bundle = load(tied)
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, *NAMES)))
    loss = forward(bundle.model, batch, labels=batch["labels"]).loss
    kept = forward(bundle.model, batch, logits_to_keep=batch["logits_to_keep"]).logits
    expected = torch.nn.functional.cross_entropy(kept, batch["text_targets"])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [["lm_lora"], ["new_tokens", "cls_head", "mask_head", "noise_residual", "lm_lora"]])
def test_fresh_adapter_changes_nothing(checkpoint: Path, photo_records: Path, groups: list[str]) -> None:
    bundle = load(checkpoint, layer="weighted", noise_residual=replace(STREAM, to_language=True))
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, "real_84x140", "unmasked_140x84", "text")))
    before = forward(bundle.model, batch)
    wrapped = set_trainable(bundle, groups, LoraConfig(dropout=0.0))
    wrapped.model.eval()
    assert_same(forward(wrapped.model, batch), before, atol=1e-5)  # measured 6e-8: other memory alignment


def test_trained_lora_changes_the_outputs(tied: Path, photo_records: Path) -> None:
    """The test above could fail."""
    bundle = load(tied)
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, "tampered_224x196")))
    before = forward(bundle.model, batch)
    wrapped = set_trainable(bundle, ["lm_lora"], LoraConfig(dropout=0.0))
    for name, parameter in wrapped.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    after = forward(wrapped.model.eval(), batch)
    assert not torch.allclose(after.logits, before.logits, atol=1e-3)
    assert not torch.equal(after.cls_logits, before.cls_logits)
