"""The switches of the heads: which layer they read, query and grid masks, sizes, sigmoid, expert features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import STREAM, assert_same, collate, forward, load, record_named, samples_of

from finetune.config import HeadsConfig
from finetune.errors import ConfigError
from finetune.models.features import by_shape, gather_states, locate_runs
from finetune.models.heads import HEADS, evidence_size, pool_evidence
from finetune.models.loading import Bundle
from finetune.models.noise_residual import NoiseResidualStream
from finetune.models.qwen_forensics_model import QwenForensicsOutput

NAMES = ("real_84x140", "unmasked_140x84")


def batch_of(bundle: Bundle, records: Path, *names: str) -> dict[str, Any]:
    return collate(bundle, samples_of(bundle, record_named(records, *(names or NAMES))))


def cls_states(bundle: Bundle, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """What reaches the classification head, and the output with all hidden states."""
    seen: list[torch.Tensor] = []
    handle = bundle.base.cls_head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    output = forward(bundle.model, batch, output_hidden_states=True)
    handle.remove()
    return seen[0], output


@pytest.mark.parametrize("layer", ["last", "weighted", 0, 1, -2])
def test_heads_read_the_configured_layer(tied: Path, photo_records: Path, layer: str | int) -> None:
    bundle = load(tied, layer=layer)
    batch = batch_of(bundle, photo_records)
    if layer == "weighted":
        with torch.no_grad():
            bundle.base.layer_mix.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    found, output = cls_states(bundle, batch)
    runs = locate_runs(batch["input_ids"], bundle.base.config.cls_token_ids, [1, 1])
    per_layer = [gather_states(states, runs) for states in output.hidden_states]
    assert len(per_layer) == 3  # embeddings and two layers
    if layer == "weighted":
        weights = torch.tensor([0.5, -1.0, 2.0]).softmax(dim=0)
        expected = sum(w * states for w, states in zip(weights, per_layer, strict=True))
    else:
        expected = per_layer[-1 if layer == "last" else int(layer)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert forward(bundle.model, batch).hidden_states is None  # not handed on unasked


def test_fresh_layer_weights_are_equal(tied: Path) -> None:
    weights = load(tied, layer="weighted").base.layer_mix.weight.flatten().softmax(dim=0)
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("mask", HEADS)
@pytest.mark.parametrize("has_stream", [False, True])
def test_masks_have_the_size_asked_for(tied: Path, photo_records: Path, mask: str, has_stream: bool) -> None:
    residual = replace(STREAM, enabled=has_stream)
    bundle = load(tied, mask=mask, grid_size=4, noise_residual=residual)
    batch = batch_of(bundle, photo_records, "pair", "unmasked_140x84")
    output = forward(bundle.model, batch, mask_sizes_hw=[(84, 140), (150, 211), (7, 500)])
    assert [tuple(m.shape) for m in output.mask_logits] == [(84, 140), (150, 211), (7, 500)]
    assert all(m.dtype == torch.float32 and m.std() > 0 for m in output.mask_logits)
    processed = forward(bundle.model, batch, mask_sizes_hw=None)
    assert [tuple(m.shape) for m in processed.mask_logits] == [(84, 140), (140, 224), (140, 84)]
    stride = 4 if has_stream else 7
    cells = [(84 // stride, 140 // stride), (140 // stride, 224 // stride), (140 // stride, 84 // stride)]
    assert [tuple(f.shape[1:]) for f in processed.mask_features] == cells
    larger = F.interpolate(processed.mask_logits[0][None, None], size=(84, 140), mode="bilinear")[0, 0]
    torch.testing.assert_close(output.mask_logits[0], larger)


@pytest.mark.parametrize("mask", HEADS)
def test_every_mask_token_matters(tied: Path, photo_records: Path, mask: str) -> None:
    """Changing the embedding of one token changes the mask; no token is read from a wrong place."""
    bundle = load(tied, mask=mask)
    batch = batch_of(bundle, photo_records, "real_84x140")
    before = forward(bundle.model, batch)
    rows = bundle.base.get_input_embeddings().weight
    for token in (bundle.tokens.mask[0], bundle.tokens.mask[-1]):
        token_id = bundle.tokenizer.convert_tokens_to_ids(token)
        kept = rows[token_id].clone()
        with torch.no_grad():
            rows[token_id] += torch.randn(len(kept), generator=torch.Generator().manual_seed(0))
            after = forward(bundle.model, batch)
            rows[token_id] = kept
        assert not torch.allclose(after.mask_logits[0], before.mask_logits[0], atol=1e-6)


def test_query_head_reads_patches_and_grid_head_does_not(tied: Path, photo_records: Path) -> None:
    for mask, reads in (("query", True), ("grid", False)):
        head = load(tied, mask=mask).base.mask_head
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, 32, 64, generator=generator)
        patches = torch.randn(32, 6, 10, generator=generator)
        with torch.no_grad():
            first, second = (head(states, [[p]], None).logits[0] for p in (patches, patches.flip(2)))
        assert torch.allclose(first, second) != reads


def test_several_tower_layers_feed_the_mask(tied: Path, photo_records: Path) -> None:
    last, both = load(tied, vision_layers=[2]), load(tied, vision_layers=[0, -1])
    batch = batch_of(last, photo_records, "real_84x140")
    assert len(both.base.mask_head.patch_projs) == 2
    vision = last.base._encode_images(batch["pixel_values"], batch["image_grid_thw"])
    grid = batch["image_grid_thw"]
    maps = both.base._patch_maps(vision, grid, grid)
    assert torch.equal(maps[1][0], last.base._patch_maps(vision, grid, grid)[0][0])
    raw = vision.hidden_states[1].sum()  # output of block 0
    torch.testing.assert_close(maps[0][0].sum(), raw, rtol=1e-4, atol=1e-3)


def test_sigmoid_inside_the_head_interpolates_scores(tied: Path, photo_records: Path) -> None:
    """Scores are averaged instead of logits; what comes out is again a logit, as every loss and metric expects."""
    plain, inside = load(tied, grid_size=4), load(tied, grid_size=4, mask_sigmoid=True)
    batch = batch_of(plain, photo_records, "unmasked_140x84")
    cells: list[torch.Tensor] = []
    plain.base.mask_head.register_forward_hook(lambda _m, _i, output: cells.append(output.logits[0]))
    logits = forward(plain.model, batch, mask_sizes_hw=[(33, 20)]).mask_logits[0]
    found = forward(inside.model, batch, mask_sizes_hw=[(33, 20)]).mask_logits[0].sigmoid()
    expected = F.interpolate(cells[0].sigmoid()[None, None], size=(33, 20), mode="bilinear")[0, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert not torch.equal(found, logits.sigmoid())


def test_image_score_reads_the_mask_branch_only_where_asked(tied: Path, photo_records: Path) -> None:
    for uses_mask in (True, False):
        bundle = load(tied, cls_uses_mask=uses_mask)
        batch = batch_of(bundle, photo_records)
        before = forward(bundle.model, batch).cls_logits
        with torch.no_grad():
            bundle.base.mask_head.direct.bias.add_(2.0)
        assert torch.equal(forward(bundle.model, batch).cls_logits, before) != uses_mask


def test_evidence_belongs_to_its_image(tied: Path, photo_records: Path) -> None:
    """Cls and mask runs of different images: the evidence of an image without mask tokens is zero."""
    bundle = load(tied)
    samples = samples_of(bundle, record_named(photo_records, *NAMES))
    mask_ids = set(bundle.tokenizer.convert_tokens_to_ids(list(bundle.tokens.mask)))
    samples[0].input_ids = [token for token in samples[0].input_ids if token not in mask_ids]
    samples[0].labels = samples[0].input_ids
    seen: list[torch.Tensor] = []
    bundle.base.cls_head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[1]))
    output = forward(bundle.model, collate(bundle, samples))
    assert output.cls_image_index.tolist() == [0, 1]
    assert output.mask_image_index.tolist() == [1]
    assert not seen[0][0].any()
    assert seen[0][1].any()
    alone = forward(bundle.model, collate(bundle, samples[1:]))
    torch.testing.assert_close(output.cls_logits[1:], alone.cls_logits, rtol=0, atol=2e-4)


def test_noise_stream_enters_the_language_model_only_where_asked(tied: Path, photo_records: Path) -> None:
    bundle = load(tied, noise_residual=replace(STREAM, to_language=True))
    batch = batch_of(bundle, photo_records)
    before = forward(bundle.model, batch).logits
    with torch.no_grad():
        bundle.base.stream_to_language.weight.normal_()
    assert not torch.allclose(forward(bundle.model, batch).logits, before, atol=1e-2)
    assert not hasattr(load(tied, noise_residual=STREAM).base, "stream_to_language")


@pytest.mark.parametrize("stem_width", [0, 6])
def test_stream_with_and_without_a_hidden_layer_in_its_stems(stem_width: int) -> None:
    torch.manual_seed(0)
    stream = NoiseResidualStream(replace(STREAM, stem_width=stem_width))
    images = [torch.rand(3, 56, 84) * 255, torch.rand(3, 84, 28) * 255]
    features = stream(images)
    assert [tuple(f.shape) for f in features] == [(8, 14, 21), (8, 21, 7)]
    torch.testing.assert_close(features[1], stream(images[1:])[0])
    assert (stream.cell_stem.mix is not None) == bool(stem_width)


def test_pooled_evidence_by_hand() -> None:
    logits = torch.arange(200.0).view(10, 20) / 10 - 10
    features = torch.stack([torch.ones(10, 20), logits])
    (row,) = pool_evidence([logits], [features])
    assert row.shape == (evidence_size(2),)
    ranked = logits.flatten().flip(0)
    tops = [ranked[:n].mean() for n in (1, 4, 10, 20, 40, 80)]  # 0.5, 2, 5, 10, 20, 40 % of 200
    torch.testing.assert_close(row[:6], torch.stack(tops))
    scores = logits.sigmoid()
    inside = (logits * scores).sum() / scores.sum()
    expected = [logits.mean(), logits.std(unbiased=False), scores.mean(), torch.tensor(1.0), inside]
    torch.testing.assert_close(row[6:11], torch.stack(expected))


def test_by_shape_keeps_the_order() -> None:
    tensors = [torch.full(shape, float(i)) for i, shape in enumerate([(2, 3), (3, 2), (2, 3), (1, 1), (3, 2)])]
    calls: list[list[int]] = []

    def double(batch: torch.Tensor, indices: list[int]) -> Any:
        calls.append(indices)
        return (batch * 2).unbind()

    found = by_shape(tensors, double)
    assert calls == [[0, 2], [1, 4], [3]]
    assert all(torch.equal(a, 2 * b) for a, b in zip(found, tensors, strict=True))


@pytest.mark.parametrize("settings", [{}, {"mask": "grid"}, {"noise_residual": STREAM}])
def test_operations_are_told_apart_at_every_place_of_the_mask_features(
    tied: Path, photo_records: Path, settings: dict[str, Any]
) -> None:
    plain, bundle = load(tied, **settings), load(tied, operations=["splice", "remove"], **settings)
    batch = batch_of(bundle, photo_records)
    output, without = forward(bundle.model, batch), forward(plain.model, batch)
    assert without.operation_logits is None
    found, output.operation_logits = output.operation_logits, None
    assert_same(output, without)  # nothing else changes, and no other head starts from other weights
    for logits, features in zip(found, output.mask_features, strict=True):
        assert logits.shape == (3, *features.shape[1:])
        expected = torch.einsum("kc,chw->khw", bundle.base.operation_head.weight[:, :, 0, 0], features)
        expected = expected + bundle.base.operation_head.bias[:, None, None]
        torch.testing.assert_close(logits, expected)
    assert "operation_head.weight" in dict(bundle.base.named_parameters())


def test_operations_that_cannot_be_are_refused(tied: Path) -> None:
    with pytest.raises(ConfigError, match="a name twice"):
        load(tied, operations=["splice", "splice"])
    assert not hasattr(load(tied, source="vision", mask="none", operations=["splice"]).base, "operation_head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"heads\.hidden_size is \d+; expected a multiple of heads\.num_heads, 5"),
        ({"num_layers": 0}, r"heads\.num_layers is 0; expected at least 1"),
        ({"noise_residual": replace(STREAM, channels=0)}, r"noise_residual\.channels is 0; expected at least 1"),
        ({"noise_residual": replace(STREAM, widths=[8, 8])}, r"widths is \[8, 8\]; expected three numbers"),
        ({"noise_residual": replace(STREAM, widths=[33, 48, 64])}, r"widths is \[33, 48, 64\]; expected three numbers"),
        ({"noise_residual": replace(STREAM, widths=[8, 8, 10])}, r"the last one a multiple of 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tied: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tied, **changes)


@pytest.mark.parametrize("widths", [[8, 24, 28], [32, 64, 96], [34, 46, 40]])
def test_sizes_that_divide_are_taken(tied: Path, widths: list[int]) -> None:
    load(tied, noise_residual=replace(STREAM, widths=widths))


def test_output_is_typed(tied: Path, photo_records: Path) -> None:
    bundle = load(tied)
    output = forward(bundle.model, batch_of(bundle, photo_records), return_dict=False)
    assert type(output) is QwenForensicsOutput
    assert output.branch_anchor is None  # only in training
    assert HeadsConfig().mask in HEADS
