"""QLoRA for real, on the CPU: a 4-bit language model under float heads, token rows and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import SMALL, STREAM, collate, forward, head_outputs, record_named, samples_of

from finetune.config import HeadsConfig, LoraConfig, ModelConfig
from finetune.data.collator import MODEL_KEYS
from finetune.errors import ConfigError
from finetune.models.adapters import set_trainable
from finetune.models.groups import parameter_groups, plain_name, trainable_table
from finetune.models.loading import Bundle, load_bundle, save_bundle

bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra `qlora`")

STAGE_1 = ["new_tokens", "cls_head", "mask_head", "noise_residual"]
STAGE_2 = [*STAGE_1, "lm_lora"]
LORA = LoraConfig(r=4, alpha=8, dropout=0.0)
NAMES = ("real_84x140", "tampered_150x211")


def quantized(path: Path, adapter: Path | None = None) -> Bundle:
    model = ModelConfig(
        str(path), dtype="float32", quantization="nf4", adapter=None if adapter is None else str(adapter)
    )
    heads = None if adapter is not None else HeadsConfig(**SMALL, noise_residual=STREAM)
    return load_bundle(model, heads=heads)


def learn(bundle: Bundle, batch: dict[str, Any], steps: int) -> list[float]:
    """AdamW on text and both heads; the losses."""
    bundle.model.train()
    optimizer = torch.optim.AdamW([p for p in bundle.model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        output = bundle.model(**{key: batch[key] for key in MODEL_KEYS if key in batch}, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits.float(), batch["text_targets"])
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(
            output.cls_logits, batch["cls_labels"].float()
        )
        loss = loss + sum(
            (m.sigmoid() - t).square().mean() for m, t in zip(output.mask_logits, batch["mask_targets"], strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def values(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in bundle.model.named_parameters()}


def assert_equal_outputs(ours: Bundle, theirs: Bundle, batch: dict[str, Any]) -> None:
    found, expected = (forward(bundle.model.eval(), batch) for bundle in (ours, theirs))
    for one, other in zip(
        [found.logits, *head_outputs(found)], [expected.logits, *head_outputs(expected)], strict=True
    ):
        assert float((one - other).abs().max()) <= 2e-6 * max(1.0, float(other.abs().max()))


def test_only_the_language_model_is_in_four_bits(checkpoint: Path) -> None:
    base = quantized(checkpoint).base
    four_bit = {name for name, module in base.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert four_bit == {name for name in linear if name.startswith("model.language_model.layers.")}
    assert len(four_bit) == 14
    assert base.model.language_model.layers[0].mlp.up_proj.weight.quant_type == "nf4"
    for name, parameter in base.named_parameters():
        assert parameter.is_floating_point() != (name.removesuffix(".weight") in four_bit), name


def test_trains_and_comes_back(untied: Path, photo_records: Path, tmp_path: Path) -> None:
    """The loss falls, exactly the declared parameters move, the folder gives the same outputs on that base."""
    bundle = set_trainable(quantized(untied), STAGE_2, LORA)
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, *NAMES)))
    before = values(bundle)
    losses = learn(bundle, batch, 12)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]
    declared = {name for members in parameter_groups(bundle.model, STAGE_2).values() for name, _ in members}
    moved = {name for name, value in values(bundle).items() if not torch.equal(value, before[name])}
    assert moved == declared
    save_bundle(bundle, tmp_path / "best")
    assert_equal_outputs(quantized(untied, tmp_path / "best"), bundle, batch)
    total = sum(
        p.numel() for p in load_bundle(ModelConfig(str(untied)), heads=HeadsConfig(enabled=False)).model.parameters()
    )
    share = trainable_table(bundle.model, STAGE_2, {}).splitlines()[-1]
    assert int(share.split()[3].replace(",", "")) >= total  # four-bit weights are counted as weights, not as bytes


def test_stages_go_on_over_a_four_bit_base(tied: Path, photo_records: Path, tmp_path: Path) -> None:
    """Stage 1 in full precision or in 4 bits, stage 2 in 4 bits: rows and heads are not quantised and stay exact."""
    first = set_trainable(quantized(tied), STAGE_1, LORA)
    batch = collate(first, samples_of(first, record_named(photo_records, *NAMES)))
    learn(first, batch, 2)
    save_bundle(first, tmp_path / "stage1")
    second = set_trainable(quantized(tied, tmp_path / "stage1"), STAGE_2, LORA)
    assert_equal_outputs(second, first, batch)
    kept = {plain_name(n): p for n, p in first.model.named_parameters() if p.requires_grad}
    again = {plain_name(n): p for n, p in second.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(again[name], parameter) for name, parameter in kept.items())
    assert any(".lora_" in name for name in again)
    learn(second, batch, 2)
    save_bundle(second, tmp_path / "stage2")
    third = set_trainable(quantized(tied, tmp_path / "stage2"), STAGE_2, LORA)
    assert_equal_outputs(third, second, batch)


def test_full_training_of_four_bits_is_refused(tied: Path, tmp_path: Path) -> None:
    save_bundle(set_trainable(quantized(tied), STAGE_2, LORA), tmp_path / "one")
    for bundle in (quantized(tied), quantized(tied, tmp_path / "one")):
        with pytest.raises(ConfigError, match="lm_full cannot train on a 4-bit model"):
            set_trainable(bundle, ["lm_full"], LORA)
