"""Adapters: continued without a change of any output, complete on the original base, on vision blocks, ranks grown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import STREAM, collate, forward, head_outputs, load, record_named, samples_of

from finetune.config import LoraConfig, ModelConfig, VisionLoraConfig, VisionTopConfig
from finetune.errors import ConfigError
from finetune.models.adapters import set_trainable
from finetune.models.groups import parameter_groups, plain_name
from finetune.models.loading import Bundle, load_bundle, save_bundle

HEADS = ["cls_head", "mask_head", "noise_residual"]
STAGE_1 = ["new_tokens", *HEADS]
STAGE_2 = [*STAGE_1, "lm_lora"]
LORA = LoraConfig(r=4, alpha=8, dropout=0.0)
NAMES = ("real_84x140", "unmasked_140x84", "text")


def disturbed(bundle: Bundle, seed: int = 7) -> Bundle:
    """Every trainable parameter away from its initial value, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    bundle.model.eval()
    return bundle


def outputs(bundle: Bundle, records: Path) -> Any:
    bundle.model.eval()
    return forward(bundle.model, collate(bundle, samples_of(bundle, record_named(records, *NAMES))))


def assert_close(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Text logits and head outputs agree to a share of their largest value (measured: 0 to 1e-6)."""
    pairs = [(found.logits, expected.logits), *zip(head_outputs(found), head_outputs(expected), strict=True)]
    for ours, theirs in pairs:
        assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def reopened(folder: Path) -> Bundle:
    return load_bundle(ModelConfig(path=str(folder), dtype="float32"))


def trained_names(bundle: Bundle) -> set[str]:
    return {plain_name(name) for name, parameter in bundle.model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def stage_1(checkpoint: Path, tmp_path: Path) -> Path:
    """Rows and heads on both kinds of checkpoint."""
    bundle = load(checkpoint, layer="weighted", noise_residual=STREAM)
    save_bundle(disturbed(set_trainable(bundle, STAGE_1, LORA)), tmp_path / "stage1")
    return tmp_path / "stage1"


def test_rows_and_heads_go_on_with_lora(stage_1: Path, checkpoint: Path, photo_records: Path, tmp_path: Path) -> None:
    """No output changes; everything of both stages trains, is saved, and stands on the base of the first."""
    first = reopened(stage_1)
    before = outputs(first, photo_records)
    second = set_trainable(first, STAGE_2, LORA)
    assert_close(outputs(second, photo_records), before)
    groups = parameter_groups(second.model, STAGE_2)
    assert all(groups[group] for group in STAGE_2)
    disturbed(second)
    expected = outputs(second, photo_records)
    save_bundle(second, tmp_path / "stage2")
    config = json.loads((tmp_path / "stage2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint)
    assert_close(outputs(reopened(tmp_path / "stage2"), photo_records), expected)


def test_what_does_not_train_is_brought_along(stage_1: Path, photo_records: Path, tmp_path: Path) -> None:
    """A stage of LoRA alone: rows and heads of the stage before keep their bits and are in the new folder."""
    first = reopened(stage_1)
    kept = {plain_name(n): p.detach().clone() for n, p in first.model.named_parameters() if "modules_to_save" in n}
    before = outputs(first, photo_records)
    second = set_trainable(first, ["lm_lora"], LORA)
    assert_close(outputs(second, photo_records), before)
    assert all(".lora_" in name for name in trained_names(second))
    save_bundle(disturbed(second), tmp_path / "stage2")
    again = reopened(tmp_path / "stage2")
    assert_close(outputs(again, photo_records), outputs(second, photo_records))
    found = {plain_name(n): p for n, p in again.model.named_parameters() if "modules_to_save" in n}
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], values) for name, values in kept.items())


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(LORA, id="same"),
        pytest.param(LoraConfig(r=8, alpha=8, dropout=0.0), id="rank 8, half the factor"),
        pytest.param(LoraConfig(r=4, alpha=8, target_modules=r".*language_model.*\.mlp\.up_proj"), id="other targets"),
    ],
)
def test_lora_goes_on(untied: Path, photo_records: Path, tmp_path: Path, lora: LoraConfig) -> None:
    save_bundle(disturbed(set_trainable(load(untied), STAGE_2, LORA)), tmp_path / "one")
    first = reopened(tmp_path / "one")
    before = outputs(first, photo_records)
    second = set_trainable(first, STAGE_2, lora)
    assert_close(outputs(second, photo_records), before)
    save_bundle(disturbed(second), tmp_path / "two")
    expected = outputs(second, photo_records)
    assert_close(outputs(reopened(tmp_path / "two"), photo_records), expected)


def test_a_pattern_that_matches_containers_too_gives_their_linear_layers_lora(untied: Path, tmp_path: Path) -> None:
    """PEFT alone refuses: it would put LoRA on whole decoder layers and norms."""
    wide = LoraConfig(r=4, alpha=8, target_modules=r".*language_model\.layers.*")
    bundle = set_trainable(load(untied), STAGE_2, wide)
    found = {name.split(".lora_")[0] for name in trained_names(bundle) if ".lora_" in name}
    layers = [
        n
        for n, m in load(untied).base.named_modules()
        if "language_model.layers." in n and isinstance(m, torch.nn.Linear)
    ]
    assert found == set(layers)
    save_bundle(disturbed(bundle), tmp_path / "one")
    assert {n.split(".lora_")[0] for n, _ in reopened(tmp_path / "one").model.named_parameters() if ".lora_A" in n}


def test_language_lora_stays_while_the_vision_tower_gets_its_own(
    untied: Path, photo_records: Path, tmp_path: Path
) -> None:
    """Other rank, other tower; the language model's LoRA is frozen, without dropout, and saved again."""
    save_bundle(disturbed(set_trainable(load(untied), STAGE_2, LoraConfig(r=4, dropout=0.5))), tmp_path / "one")
    first = reopened(tmp_path / "one")
    before = outputs(first, photo_records)
    vision = VisionLoraConfig(blocks=[0, -1], r=2, alpha=2)
    second = set_trainable(first, ["vision_lora"], LoraConfig(dropout=0.5), vision)
    assert_close(outputs(second, photo_records), before)
    names = trained_names(second)
    assert {name.split(".")[3] for name in names} == {"0", "2"}
    assert all(name.startswith("model.visual.blocks.") and ".lora_" in name for name in names)
    save_bundle(disturbed(second), tmp_path / "two")
    expected = outputs(second, photo_records)
    again = reopened(tmp_path / "two")
    assert_close(outputs(again, photo_records), expected)
    ranks = {p.shape[0] for n, p in again.model.named_parameters() if "lora_A" in n and "visual" in n}
    assert ranks == {2}


def test_adapter_with_lm_full_becomes_a_whole_model(tied: Path, photo_records: Path, tmp_path: Path) -> None:
    save_bundle(disturbed(set_trainable(load(tied), STAGE_2, LORA)), tmp_path / "one")
    first = reopened(tmp_path / "one")
    before = outputs(first, photo_records)
    second = set_trainable(first, ["lm_full", "cls_head"], LORA)
    assert second.model is second.base
    assert_close(outputs(second, photo_records), before)
    assert second.base.get_input_embeddings().weight is second.base.lm_head.weight


def test_smaller_rank_is_refused(tied: Path) -> None:
    first = set_trainable(load(tied), STAGE_2, LORA)
    with pytest.raises(ConfigError, match=r"lora.r is 2, the adapter that training starts from has rank 4"):
        set_trainable(first, STAGE_2, LoraConfig(r=2))


# ---- the vision tower ----


def test_vision_lora_matches_the_blocks_it_names(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = set_trainable(load(tied), ["vision_lora"], LORA, VisionLoraConfig(blocks=[0, 2], r=2))
    layers = {name.rsplit(".lora_", 1)[0] for name in trained_names(bundle)}
    own = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert layers == {f"model.visual.blocks.{number}.{layer}" for number in (0, 2) for layer in own}
    assert "LoRA on 10 layers: model.visual.blocks.*.attn.qkv x2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (VisionLoraConfig(blocks=[3]), r"vision_lora.blocks is \[3\]; expected blocks of the vision tower, 0 to 2"),
        (VisionLoraConfig(blocks=[]), r"vision_lora.blocks is \[\]"),
        (VisionLoraConfig(target_modules="q_proj"), "'q_proj' matches no linear layer of vision block 2"),
        (VisionLoraConfig(target_modules="(qkv"), "is not a regular expression"),
    ],
)
def test_vision_lora_that_matches_nothing_is_refused(tied: Path, settings: VisionLoraConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_trainable(load(tied), ["vision_lora"], LORA, settings)


@pytest.mark.parametrize("groups", [["vision_top"], ["vision_top", "lm_lora"]], ids=" ".join)
@pytest.mark.parametrize("merger", [False, True])
def test_vision_top_is_the_last_blocks(tied: Path, photo_records: Path, groups: list[str], merger: bool) -> None:
    bundle = set_trainable(load(tied), groups, LORA, vision_top=VisionTopConfig(blocks=2, merger=merger))
    names = {plain_name(n) for n, _ in parameter_groups(bundle.model, groups)["vision_top"]}
    tower = {name for name, _ in load(tied).base.named_parameters() if name.startswith("model.visual.")}
    wanted = ("model.visual.blocks.1.", "model.visual.blocks.2.", *(["model.visual.merger."] if merger else []))
    assert names == {name for name in tower if name.startswith(wanted)}
    assert torch.isfinite(outputs(bundle, photo_records).logits).all()


def test_whole_module_that_an_adapter_holds_goes_on(tied: Path, photo_records: Path, tmp_path: Path) -> None:
    """A projector that trained before is kept, also inside a larger part that trains now."""
    save_bundle(disturbed(set_trainable(load(tied), ["projector", "lm_lora"], LORA)), tmp_path / "one")
    for groups in (["lm_lora"], ["vision_full"]):
        first = reopened(tmp_path / "one")
        before = outputs(first, photo_records)
        second = set_trainable(first, groups, LORA)
        assert_close(outputs(second, photo_records), before)
        save_bundle(disturbed(second), tmp_path / groups[0])
        expected = outputs(second, photo_records)
        assert_close(outputs(reopened(tmp_path / groups[0]), photo_records), expected)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["lm_full", "vision_lora"], "would have to hold the whole language model"),
        (["vision_full", "vision_top"], "the whole tower contains its top blocks"),
        (["vision_lora", "vision_top"], "would train both whole and by LoRA"),
    ],
)
def test_overlapping_groups_are_refused(tied: Path, groups: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_trainable(load(tied), groups, LORA)


def test_block_with_lora_goes_on_whole(tied: Path, photo_records: Path, tmp_path: Path) -> None:
    """LoRA of a block that now trains whole becomes part of the block; that of the others stays LoRA."""
    groups = ["new_tokens", "lm_lora", "projector", "vision_lora"]
    first = disturbed(set_trainable(load(tied), groups, LORA, VisionLoraConfig(blocks=[1, 2], r=4, alpha=8)))
    before = outputs(first, photo_records)
    save_bundle(first, tmp_path / "first")
    second = set_trainable(
        reopened(tmp_path / "first"), ["lm_lora", "projector", "vision_top"], LORA, None, VisionTopConfig(blocks=1)
    )
    assert_close(outputs(second, photo_records), before)
    trained = trained_names(second)
    in_tower = {name for name in trained if name.startswith("model.visual.blocks.")}
    assert in_tower
    assert all(name.startswith("model.visual.blocks.2.") and ".lora_" not in name for name in in_tower)
    lora = {plain_name(name) for name, _ in second.model.named_parameters() if ".lora_" in name and ".visual." in name}
    assert lora
    assert all(name.startswith("model.visual.blocks.1.") for name in lora)
    disturbed(second)
    moved = outputs(second, photo_records)
    save_bundle(second, tmp_path / "second")
    third = reopened(tmp_path / "second")
    assert_close(outputs(third, photo_records), moved)
    # and on from there: the block stays whole
    fourth = set_trainable(third, ["lm_lora"], LORA)
    assert_close(outputs(fourth, photo_records), moved)
    with pytest.raises(ConfigError, match=r"holds 'model.visual.blocks.2' whole; leave it out"):
        set_trainable(reopened(tmp_path / "second"), ["vision_lora"], LORA, VisionLoraConfig(blocks=[2], r=4, alpha=8))


def test_what_trains_whole_may_be_held_in_float32(tied: Path, photo_records: Path) -> None:
    """Beside a model in bfloat16, whose weights are too coarse for small steps; nothing else is converted."""
    groups = ["lm_lora", "projector", "vision_top"]
    bundle = set_trainable(load(tied, dtype="bfloat16"), groups, LORA, whole_dtype=torch.float32)
    members = parameter_groups(bundle.model, groups)
    assert {p.dtype for group in groups for _, p in members[group]} == {torch.float32}
    frozen = {p.dtype for n, p in bundle.model.named_parameters() if not p.requires_grad and "language_model" in n}
    assert frozen == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        logits = outputs(bundle, photo_records).logits
    assert bool(logits.isfinite().all())
