"""Heads on the vision tower alone: a score and a map for every image, the same with stored maps and with a language."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import STREAM, collate, plain_inputs, record_named, samples_of
from transformers import Qwen2_5_VLForConditionalGeneration

from finetune.config import HeadsConfig, LoraConfig, ModelConfig, VisionLoraConfig
from finetune.errors import ConfigError
from finetune.models.adapters import set_trainable
from finetune.models.groups import parameter_groups, trainable_table
from finetune.models.loading import Bundle, load_bundle
from finetune.models.neck import NUM_POOLED, FusionNeck
from finetune.models.shapes import RELEASED, build_on_meta
from finetune.special_tokens import SpecialTokens

VISION = HeadsConfig(
    source="vision", vision_layers=[0, 2], hidden_size=16, num_layers=1, num_heads=2, num_queries=3,
    noise_residual=STREAM,
)  # fmt: skip
GRID = torch.tensor([[1, 6, 10], [1, 14, 8], [1, 6, 10]])  # no multiples of the 8-patch window
SIZES = [int(size) for size in GRID.prod(dim=1)]
HEADS = ["neck", "cls_head", "mask_head", "noise_residual"]


def load(path: Path, language: Any = "auto", dtype: Any = "float32", **changes: Any) -> Bundle:
    bundle = load_bundle(ModelConfig(path=str(path), dtype=dtype, language=language), heads=replace(VISION, **changes))
    bundle.model.eval()
    return bundle


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(sum(SIZES), 1176, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(tied: Path) -> Bundle:
    """Read only."""
    return load(tied)


def run(model: Any, pixels: torch.Tensor | None, grid: torch.Tensor = GRID, **more: Any) -> Any:
    with torch.no_grad():
        return model(pixel_values=pixels, image_grid_thw=grid, **more)


def numbers(output: Any) -> list[torch.Tensor]:
    return [output.cls_logits, *output.mask_logits, output.image_features, *output.mask_features]


def assert_equal(found: Any, expected: Any, atol: float = 0.0) -> None:
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_every_image_gets_a_score_and_a_map(bundle: Bundle, pixels: torch.Tensor) -> None:
    output = run(bundle.model, pixels)
    assert output.logits is None
    assert output.cls_logits.shape == (3,)
    assert output.image_features.shape == (3, 16)
    assert output.cls_image_index.tolist() == output.mask_image_index.tolist() == [0, 1, 2]
    assert [tuple(m.shape) for m in output.mask_logits] == [(84, 140), (196, 112), (84, 140)]
    assert all(m.dtype == torch.float32 and m.std() > 0 for m in output.mask_logits)
    sizes = [(50, 60), (333, 77), (84, 140)]
    assert [tuple(m.shape) for m in run(bundle.model, pixels, mask_sizes_hw=sizes).mask_logits] == sizes


def test_operations_of_every_image(tied: Path, bundle: Bundle, pixels: torch.Tensor) -> None:
    output = run(load(tied, operations=["splice", "remove"]).model, pixels)
    assert_equal(output, run(bundle.model, pixels))  # the other heads stay as they are
    assert [o.shape for o in output.operation_logits] == [(3, *f.shape[1:]) for f in output.mask_features]
    assert run(bundle.model, pixels).operation_logits is None


def test_images_do_not_see_each_other(bundle: Bundle, pixels: torch.Tensor) -> None:
    together = run(bundle.model, pixels)
    for number, part in enumerate(pixels.split(SIZES)):
        alone = run(bundle.model, part, GRID[number : number + 1])
        torch.testing.assert_close(alone.cls_logits[0], together.cls_logits[number], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_stream", [True, False])
def test_stored_maps_replace_the_tower(tied: Path, pixels: torch.Tensor, has_stream: bool) -> None:
    bundle = load(tied, noise_residual=replace(STREAM, enabled=has_stream))
    with torch.no_grad():
        maps = bundle.base.tower_maps(pixels, GRID)
    assert [[tuple(m.shape) for m in block] for block in maps] == [[(32, 6, 10), (32, 14, 8), (32, 6, 10)]] * 2
    calls: list[Any] = []
    handle = bundle.base.model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    found = run(bundle.model, pixels if has_stream else None, tower_maps=maps)
    handle.remove()
    assert not calls
    assert_equal(found, run(bundle.model, pixels), atol=1e-6)
    if has_stream:
        with pytest.raises(ValueError, match="noise-residual stream reads"):
            run(bundle.model, None, tower_maps=maps)
    with pytest.raises(ValueError, match="neither images nor text"):
        run(bundle.model, None)


def test_a_language_model_changes_nothing_for_the_heads(
    bundle: Bundle, tied: Path, photo_records: Path, pixels: torch.Tensor
) -> None:
    full = load(tied, language="load")
    assert_equal(run(full.model, pixels), run(bundle.model, pixels))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tied, dtype=torch.float32).eval()
    tokens = load_bundle(ModelConfig(path=str(tied)))  # its template places forensic tokens, which are only text here
    batch = collate(tokens, samples_of(tokens, record_named(photo_records, "pair", "real_84x140", "text")))
    rows = plain.get_input_embeddings().weight.shape[0]
    batch["input_ids"] = batch["input_ids"].clamp(max=rows - 1)
    with torch.no_grad():
        expected = plain(**plain_inputs(batch)).logits
    output = run(full.model, batch["pixel_values"], batch["image_grid_thw"], **_text(batch))
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert_equal(output, run(bundle.model, batch["pixel_values"], batch["image_grid_thw"]), atol=1e-5)


def _text(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}


def test_text_is_generated_as_by_the_base_class(tied: Path, photo_records: Path) -> None:
    """Heads run in the prefill only, and on what is generated nothing of them is seen."""
    full = load(tied, language="load")
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tied, dtype=torch.float32).eval()
    question = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is it real?<|im_end|>\n"
    from PIL import Image

    picture = Image.open(photo_records.parent / "d.png")
    inputs = full.processor(text=[question], images=[picture], return_tensors="pt")
    expected = plain.generate(**inputs, max_new_tokens=6, do_sample=False)
    outputs: list[Any] = []
    handle = full.base.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    found = full.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    handle.remove()
    assert torch.equal(found, expected)
    assert [output.cls_logits is not None for output in outputs] == [True] + [False] * (len(outputs) - 1)


def test_without_a_language_model_there_is_none(bundle: Bundle, tied: Path) -> None:
    base = bundle.base
    names = {name for name, _ in base.named_parameters()}
    assert not any("language_model" in name or "lm_head" in name for name in names)
    assert all(name.startswith("model.visual.") or name.split(".")[0] in (*HEADS, "mask_queries") for name in names)
    base.tie_weights()
    assert base.get_output_embeddings() is None
    ids = torch.zeros(1, 3, dtype=torch.long)
    for call in (lambda: base(input_ids=ids), lambda: base.generate(input_ids=ids)):
        with pytest.raises(ConfigError, match=r"language model was left out .*model\.language: load"):
            call()
    tower = Qwen2_5_VLForConditionalGeneration.from_pretrained(tied).model.visual.state_dict()
    own = base.model.visual.state_dict()
    assert set(own) == set(tower)
    assert all(torch.equal(own[name], tower[name]) for name in own)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": "weighted"}, r"heads\.layer is 'weighted' with heads\.source: vision"),
    "block": ({"vision_layers": [1, 3]}, r"heads\.vision_layers is \[1, 3\]; expected blocks .* 0 to 2"),
    "twice": ({"vision_layers": [2, -1]}, "a block twice"),
    "to language": ({"noise_residual": replace(STREAM, to_language=True)}, "to_language adds to what the language"),
    "queries": ({"num_queries": 0}, r"heads\.num_queries is 0"),
    "no mask with tokens": ({"source": "tokens", "mask": "none"}, r"heads\.mask: none goes with"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_switches_that_exclude_each_other(tied: Path, case: tuple[dict[str, Any], str]) -> None:
    changes, message = case
    with pytest.raises(ConfigError, match=message):
        load(tied, **changes)


def test_heads_on_tokens_need_the_language_model(tied: Path) -> None:
    with pytest.raises(ConfigError, match=r"heads\.source: tokens reads the language model"):
        load_bundle(ModelConfig(path=str(tied), language="skip"), heads=HeadsConfig())


# ---- the neck ----


def test_the_neck_keeps_places_and_reads_every_map() -> None:
    """One marked cell of any block, or of the stream below it, changes the fused map there and next to it only."""
    torch.manual_seed(0)
    neck = FusionNeck(replace(VISION, vision_layers=[0, 1, 2]), 32, 8).eval()
    torch.nn.init.normal_(neck.refine.mix.weight)
    neck.refine.norm = torch.nn.Identity()  # its statistics are those of the whole map
    maps = [[torch.randn(32, 6, 10)] for _ in range(3)]
    stream = [torch.randn(8, 21, 35)]
    with torch.no_grad():
        before, state = neck(maps, stream)
        assert state.shape == (1, NUM_POOLED, 16)
        for block in range(4):
            changed = [[m[0].clone()] for m in maps]
            changed_stream = [stream[0].clone()]
            if block < 3:
                changed[block][0][:, 2, 7] += torch.randn(32)
            else:
                changed_stream[0][:, 8, 26] += 5 * torch.randn(8)  # row 2.3, column 7.4 of the patches
            difference = (neck(changed, changed_stream)[0][0] - before[0]).abs().sum(dim=0)
            assert difference[2, 7] == difference.max() > 0
            outside = difference.clone()
            outside[1:4, 6:9] = 0
            assert outside.max() < 1e-5


def test_the_expert_reaches_the_score_without_a_mask_head(tied: Path, pixels: torch.Tensor) -> None:
    bundle = load(tied, mask="none")
    assert not hasattr(bundle.base, "mask_head")
    assert not hasattr(bundle.base, "mask_queries")
    output = run(bundle.model, pixels)
    assert output.mask_logits is None
    assert output.mask_image_index is None
    with torch.no_grad():
        bundle.base.noise_residual.out.weight.mul_(2)
    assert not torch.equal(run(bundle.model, pixels).cls_logits, output.cls_logits)


def test_new_heads_come_from_their_own_seed(tied: Path) -> None:
    torch.manual_seed(1)
    first = load(tied).base.state_dict()
    torch.manual_seed(2)
    second, other = load(tied).base.state_dict(), load(tied, seed=5).base.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["mask_queries.weight"], other["mask_queries.weight"])


# ---- training ----


def step(bundle: Bundle, pixels: torch.Tensor, **more: Any) -> Any:
    """Forward, a loss that uses every output, backward."""
    bundle.model.train()
    output = bundle.model(pixel_values=pixels, image_grid_thw=GRID, **more)
    loss = (output.cls_logits - 3).square().mean() + output.branch_anchor
    loss = loss + sum((m - 1).square().mean() for m in output.mask_logits or [])
    loss.backward()
    without = [name for name, p in bundle.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without  # ranks would wait for these gradients for ever
    return output


@pytest.mark.parametrize("groups", [["neck", "cls_head"], HEADS, ["mask_head", "vision_lora"], ["neck", "vision_top"]])
def test_exactly_the_named_groups_move(tied: Path, pixels: torch.Tensor, groups: list[str]) -> None:
    bundle = set_trainable(load(tied), groups, LoraConfig(dropout=0.0), VisionLoraConfig(blocks=[0, 2], r=2))
    before = {name: p.detach().clone() for name, p in bundle.model.named_parameters()}
    trains = {name for members in parameter_groups(bundle.model, groups).values() for name, _ in members}
    optimizer = torch.optim.AdamW([p for p in bundle.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    step(bundle, pixels)
    optimizer.step()
    moved = {name for name, p in bundle.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trains
    for group, members in parameter_groups(bundle.model, groups).items():
        assert any(name in moved for name, _ in members), group
    table = trainable_table(bundle.model, groups, {})
    assert all(group in table for group in groups)


def test_a_frozen_tower_builds_no_graph(tied: Path, pixels: torch.Tensor) -> None:
    bundle = set_trainable(load(tied), HEADS, LoraConfig())
    bundle.model.train()
    assert not any(m.requires_grad for block in bundle.base.tower_maps(pixels, GRID) for m in block)
    maps = bundle.base.tower_maps(pixels, GRID)
    step(bundle, pixels)
    direct = {name: p.grad.clone() for name, p in bundle.model.named_parameters() if p.grad is not None}
    bundle.model.zero_grad()
    step(bundle, pixels, tower_maps=maps)
    for name, p in bundle.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, direct[name], rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_gives_the_same_gradients(tied: Path, pixels: torch.Tensor) -> None:
    found = []
    for uses_checkpointing in (False, True):
        bundle = set_trainable(load(tied), ["neck", "vision_lora"], LoraConfig(dropout=0.0), VisionLoraConfig([0, 1]))
        if uses_checkpointing:
            bundle.model.enable_input_require_grads()
            bundle.model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.no_grad():
            for name, parameter in bundle.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
        step(bundle, pixels)
        found.append({name: p.grad for name, p in bundle.model.named_parameters() if p.requires_grad})
    assert any(gradient.abs().max() > 0 for name, gradient in found[0].items() if "lora_" in name)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_text_alone_touches_every_trainable_weight(tied: Path) -> None:
    full = load(tied, language="load")
    full = set_trainable(full, [*HEADS, "vision_lora"], LoraConfig(), VisionLoraConfig([0]))
    full.model.train()
    output = full.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert output.cls_logits is None
    output.branch_anchor.backward()
    assert all(p.grad is not None for p in full.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mask", ["query", "grid", "none"])
@pytest.mark.parametrize("dtypes", ["tower", "heads", "both"])
def test_half_precision(tied: Path, pixels: torch.Tensor, mask: Any, dtypes: str) -> None:
    """A bfloat16 tower under float32 heads, and what DeepSpeed makes of a model: all of it cast."""
    expected = run(load(tied, mask=mask).model, pixels)
    bundle = load(tied, dtype="bfloat16" if dtypes == "tower" else "float32", mask=mask)
    if dtypes == "both":
        bundle.model.to(torch.bfloat16)
    elif dtypes == "heads":
        for module in bundle.base.head_modules():
            module.to(torch.bfloat16)
    else:
        assert bundle.base.neck.projs[0].weight.dtype == torch.float32
    bundle = set_trainable(bundle, HEADS, LoraConfig())
    output = step(bundle, pixels)
    torch.testing.assert_close(output.cls_logits.float(), expected.cls_logits, rtol=0, atol=0.2)


# ---- published sizes ----


@pytest.mark.parametrize("size", RELEASED)
def test_only_tower_and_heads_at_the_real_size(size: str) -> None:
    heads = HeadsConfig(source="vision", vision_layers=[15, 23, 31])
    model = build_on_meta(size, heads)
    block = 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    out = RELEASED[size]["hidden_size"]
    tower = 32 * block + 1280 * 2 * 3 * 14 * 14 + (1280 + 5120 * 5120 + 5120 + 5120 * out + out)
    assert sum(p.numel() for p in model.model.visual.parameters()) == tower
    own = sum(p.numel() for module in model.head_modules() for p in module.parameters())
    assert sum(p.numel() for p in model.parameters()) == tower + own
    assert own < 6_000_000
    bundle = set_trainable(
        Bundle(model, None, SpecialTokens()), ["vision_lora"], LoraConfig(), VisionLoraConfig(blocks=[15, 23, 31])
    )
    members = parameter_groups(bundle.model, ["vision_lora"])["vision_lora"]
    assert len(members) == 30
    assert sum(p.numel() for _, p in members) == 1_045_440  # as with the language model: test_adapters_golden


def test_the_language_models_weights_are_not_read(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sharded checkpoint every tensor that is read is counted; only the tower's are."""
    import transformers.modeling_utils as reading

    Qwen2_5_VLForConditionalGeneration.from_pretrained(untied).save_pretrained(
        tmp_path / "base", max_shard_size="100KB"
    )
    load_bundle(ModelConfig(path=str(untied))).processor.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    read: list[str] = []
    original = reading.safe_open

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, key: Any) -> torch.Tensor:
            read.append(self.name)
            return self.inner[key]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class File:
        def __init__(self, *arguments: Any, **more: Any) -> None:
            self.inner = original(*arguments, **more)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(reading, "safe_open", File)
    load(tmp_path / "base")
    assert read
    assert all(name.startswith("visual.") for name in read), [n for n in read if not n.startswith("visual.")][:3]
    read.clear()
    load(tmp_path / "base", language="load")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(read)
