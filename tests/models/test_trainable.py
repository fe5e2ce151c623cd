"""One optimiser step moves exactly the declared parameters; every other value keeps its bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import STREAM, collate, load, record_named, samples_of

from finetune.config import LoraConfig
from finetune.data.collator import MODEL_KEYS
from finetune.errors import ConfigError
from finetune.models.adapters import set_trainable
from finetune.models.configuration import HEAD_MODULES, REGION_MODULE, TOWER_HEADS
from finetune.models.groups import group_of, parameter_groups, trainable_table
from finetune.models.head_running import _Anchor
from finetune.models.loading import Bundle

TOKEN_HEADS = set(HEAD_MODULES) - {*TOWER_HEADS, REGION_MODULE}
"""Every module of heads on tokens."""

STAGE_1 = ["new_tokens", "cls_head", "mask_head", "noise_residual"]
LORA = LoraConfig(r=4, dropout=0.0)


def rich(path: Path) -> Bundle:
    """A bundle with every head module there is."""
    return load(path, layer="weighted", noise_residual=replace(STREAM, to_language=True), operations=["splice"])


def step(bundle: Bundle, records: Path, names: tuple[str, ...] = ("real_84x140", "unmasked_140x84", "text")) -> Any:
    """Forward, a loss that uses every output, backward, one AdamW step; returns the output."""
    batch = collate(bundle, samples_of(bundle, record_named(records, *names)))
    bundle.model.train()
    optimizer = torch.optim.AdamW([p for p in bundle.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    output = bundle.model(**{key: batch[key] for key in MODEL_KEYS if key in batch})
    loss = torch.nn.functional.cross_entropy(output.logits, batch["text_targets"]) + output.branch_anchor
    if output.cls_logits is not None:
        maps = [*output.mask_logits, *(output.operation_logits or [])]
        loss = loss + (output.cls_logits - 3).square().mean() + sum((m - 1).square().mean() for m in maps)
    loss.backward()
    missing = [n for n, p in bundle.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing  # ranks would wait for these gradients for ever
    optimizer.step()
    return output


def merged_state(bundle: Bundle) -> dict[str, torch.Tensor]:
    """Weights under the names of the plain model; PEFT merged and taken off."""
    model = bundle.model if bundle.model is bundle.base else bundle.model.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stage_one_moves_the_new_rows_and_the_heads(checkpoint: Path, photo_records: Path) -> None:
    bundle = rich(checkpoint)
    is_tied = bundle.base.config.tie_word_embeddings
    before = merged_state(bundle)
    bundle = set_trainable(bundle, STAGE_1, LORA)
    names = {group: [name for name, _ in members] for group, members in parameter_groups(bundle.model, STAGE_1).items()}
    rows = ["base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta.default"]
    if not is_tied:
        rows.append("base_model.model.lm_head.token_adapter.trainable_tokens_delta.default")
    assert names["new_tokens"] == rows  # golden list
    trained = [name for group in names.values() for name in group]
    assert {name.split(".")[2] for name in trained} - {"model", "lm_head"} == TOKEN_HEADS
    assert all(".modules_to_save.default." in name for name in trained if name not in rows)
    table = trainable_table(bundle.model, STAGE_1, {"new_tokens": "0.001"}).splitlines()
    row_parameters = 33 * 64 * len(rows)
    assert table[1].split() == ["new_tokens", str(len(rows)), f"{row_parameters:,}", "0.001"]

    step(bundle, photo_records)
    after = merged_state(bundle)
    changed = moved(before, after)
    matrices = {name for name in changed if name.split(".")[0] not in HEAD_MODULES}
    assert matrices == {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    ids = bundle.tokenizer.convert_tokens_to_ids(list(bundle.tokens.all))
    for name in matrices:
        is_row_moved = (before[name] != after[name]).any(dim=1)
        assert is_row_moved.nonzero().flatten().tolist() == ids
    heads = {name for name in before if name.split(".")[0] in HEAD_MODULES}
    assert {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in trained} >= heads
    assert {name.split(".")[0] for name in heads & changed} == TOKEN_HEADS
    if is_tied:
        assert torch.equal(after["model.language_model.embed_tokens.weight"], after["lm_head.weight"])


CASES = {
    ("lm_lora",): ("model.language_model.layers.",),
    ("cls_head",): ("cls_head.", "layer_mix."),
    ("projector",): ("model.visual.merger.",),
    ("vision_top",): ("model.visual.blocks.2.",),
    ("vision_full",): ("model.visual.",),
    ("lm_full", "new_tokens"): ("model.language_model.", "lm_head."),
    ("projector", "lm_lora", "mask_head"): (
        "model.visual.merger.", "model.language_model.layers.", "mask_head.", "layer_mix.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("groups", CASES, ids=" ".join)
def test_each_group_moves_only_its_own_parameters(untied: Path, photo_records: Path, groups: tuple[str, ...]) -> None:
    bundle = load(untied, layer="weighted")
    before = merged_state(bundle)
    bundle = set_trainable(bundle, groups, LORA)
    members = parameter_groups(bundle.model, groups)
    assert all(members[group] for group in groups if group != "new_tokens")
    step(bundle, photo_records)
    if "lm_lora" in groups:
        step(bundle, photo_records)  # the first step moves B only from 0 on
    changed = moved(before, merged_state(bundle))
    assert all(name.startswith(CASES[groups]) for name in changed), changed
    for prefix in CASES[groups]:
        expected = {name for name in before if name.startswith(prefix)}
        if prefix == "model.language_model.layers.":  # LoRA: the seven projections, neither norms nor biases
            expected = {name for name in expected if "lm_full" in groups or "_proj.weight" in name}
        assert expected
        assert expected <= changed


def test_vision_and_lora_train_together(tied: Path, photo_records: Path) -> None:
    """PEFT wraps the whole tower (`modules_to_save`); the tower still knows its dtype and sizes."""
    bundle = set_trainable(load(tied), ["vision_full", "lm_lora"], LORA)
    output = step(bundle, photo_records)
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("heads_on", [True, False])
def test_text_only_batch_touches_every_trainable_branch(tied: Path, photo_records: Path, heads_on: bool) -> None:
    """Otherwise data-parallel ranks wait for gradients that never come; also where the heads are off."""
    bundle = load(tied, enabled=heads_on)
    groups = ["projector", "lm_lora", *(["cls_head", "mask_head"] if heads_on else [])]
    bundle = set_trainable(bundle, groups, LORA)
    output = step(bundle, photo_records, ("text",))
    assert float(output.branch_anchor.detach()) == 0.0
    gradients = [p.grad for p in bundle.model.parameters() if p.requires_grad]
    assert any(bool(g.abs().max() > 0) for g in gradients)


def test_gradients_of_branches_left_out_are_zeros_that_take_no_memory() -> None:
    x = torch.ones(40, 50, requires_grad=True)
    (gradient,) = torch.autograd.grad(_Anchor.apply(x), x)
    assert gradient.shape == x.shape
    assert not gradient.any()
    assert gradient.untyped_storage().nbytes() == 4


def test_frozen_tower_builds_no_graph(tied: Path, photo_records: Path) -> None:
    bundle = load(tied)
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, "real_84x140")))
    arguments = batch["pixel_values"], batch["image_grid_thw"]
    # What gradient checkpointing does to a frozen tower, which then runs forward twice and backward once for nothing.
    bundle.base.model.visual.patch_embed.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    set_trainable(bundle, ["cls_head"], LORA)
    assert not bundle.base._encode_images(*arguments).pooler_output[0].requires_grad
    set_trainable(bundle, ["projector"], LORA)
    assert bundle.base._encode_images(*arguments).pooler_output[0].requires_grad


@pytest.mark.parametrize("enabled", [True, False])
def test_frozen_tower_runs_once_under_checkpointing(tied: Path, photo_records: Path, enabled: bool) -> None:
    """With heads and without: recomputed in the backward pass it would run twice, and backward for nothing."""
    bundle = set_trainable(load(tied, enabled=enabled), ["lm_lora"], LORA)
    bundle.model.enable_input_require_grads()
    bundle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    needs_graph: list[bool] = []
    for block in bundle.base.model.visual.blocks:
        block.register_forward_hook(lambda _m, _i, output: needs_graph.append(output.requires_grad))
    step(bundle, photo_records)
    assert needs_graph == [False] * len(bundle.base.model.visual.blocks)


@pytest.mark.parametrize(
    ("groups", "lora", "message"),
    [
        (["cls_haed"], LORA, "names 'cls_haed'; known groups: new_tokens"),
        (["lm_full", "lm_lora"], LORA, "choose one"),
        (["lm_lora"], LoraConfig(target_modules="query_key_value"), "matches no linear layer"),
    ],
)
def test_impossible_groups_are_refused(tied: Path, groups: list[str], lora: LoraConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_trainable(load(tied), groups, lora)


def test_groups_by_name() -> None:
    everything = ["new_tokens", "cls_head", "mask_head", "noise_residual", "lm_lora", "projector", "vision_full"]
    assert group_of("module.base_model.model.cls_head.modules_to_save.default.out.weight", everything) == "cls_head"
    assert group_of("model.visual.merger.mlp.0.weight", everything) == "projector"
    assert group_of("model.visual.merger.mlp.0.weight", ["vision_full"]) == "vision_full"
    assert group_of("model.visual.blocks.0.attn.qkv.weight", ["projector"]) is None
    assert group_of("base_model.model.lm_head.token_adapter.trainable_tokens_delta.default", everything) == "new_tokens"
    assert group_of("layer_mix.weight", ["mask_head"]) == "mask_head"


def test_default_lora_pattern_leaves_the_vision_tower_alone(tied: Path) -> None:
    """`gate_proj|up_proj|down_proj` alone would also match the vision MLPs."""
    bundle = set_trainable(load(tied), ["lm_lora"], LORA)
    names = [name for name, _ in parameter_groups(bundle.model, ["lm_lora"])["lm_lora"]]
    assert len(names) == 2 * 7 * 2  # A and B, seven projections, two layers
    assert not [name for name in names if "visual" in name]


def test_gradient_checkpointing_changes_no_gradient(tied: Path, photo_records: Path) -> None:
    """Hidden states of tower and language model are captured by hooks, which run again when blocks are recomputed."""
    gradients = []
    for is_checkpointed in (False, True):
        bundle = set_trainable(load(tied, layer="weighted"), ["vision_full", "mask_head", "cls_head", "lm_lora"], LORA)
        for name, parameter in bundle.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        torch.manual_seed(0)
        for name, parameter in bundle.model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if is_checkpointed:
            bundle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert bundle.base.model.language_model.layers[0].gradient_checkpointing
        step(bundle, photo_records)
        gradients.append({n: p.grad for n, p in bundle.model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7
        )
