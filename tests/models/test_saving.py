"""What is saved is what is loaded: full and adapter folders, new heads by seed; broken folders are refused in words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import SMALL, STREAM, assert_same, collate, forward, load, record_named, samples_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from finetune.config import HeadsConfig, LoraConfig, ModelConfig, NoiseResidualConfig
from finetune.errors import ConfigError, ModelLoadError
from finetune.models.adapters import set_trainable
from finetune.models.configuration import HEAD_MODULES, REGION_MODULE, TOWER_HEADS
from finetune.models.loading import Bundle, load_bundle, load_model, save_bundle
from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration
from finetune.models.vision_loading import load_vision
from finetune.special_tokens import SpecialTokens

NAMES = ("real_84x140", "unmasked_140x84", "text")
RICH: dict[str, Any] = {
    "layer": "weighted",
    "noise_residual": replace(STREAM, to_language=True),
    "operations": ["splice", "retouch.grain"],
}
LORA = LoraConfig(r=4, dropout=0.0)
TOKEN_HEADS = set(HEAD_MODULES) - {*TOWER_HEADS, REGION_MODULE}
"""Every module of heads on tokens."""


def batch_for(bundle: Bundle, records: Path) -> dict[str, Any]:
    return collate(bundle, samples_of(bundle, record_named(records, *NAMES)))


def disturb(bundle: Bundle) -> Bundle:
    """Give every trainable parameter another value, as training would."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    bundle.model.eval()
    return bundle


def heads_of(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {n: p for n, p in bundle.base.named_parameters() if n.split(".")[0] in HEAD_MODULES}


@pytest.fixture(scope="module")
def full_dir(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours, every parameter away from its initial value; read only."""
    folder = tmp_path_factory.mktemp("saved") / "full"
    bundle = disturb(load(untied, **RICH))
    bundle.settings["template"] = "en"
    save_bundle(bundle, folder)
    return folder


@pytest.fixture(scope="module")
def adapter_dir(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder with rows, heads and LoRA on the plain untied checkpoint; read only."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    groups = ["new_tokens", "cls_head", "mask_head", "noise_residual", "lm_lora"]
    save_bundle(disturb(set_trainable(load(untied, **RICH), groups, LORA)), folder)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Any:
    """A copy of a folder that a test may break."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- round trips ----


def test_full_folder_comes_back(checkpoint: Path, photo_records: Path, tmp_path: Path) -> None:
    bundle = disturb(load(checkpoint, **RICH))
    bundle.settings["template"] = "en"
    batch = batch_for(bundle, photo_records)
    before = forward(bundle.model, batch)
    save_bundle(bundle, tmp_path)
    back = load_bundle(ModelConfig(path=str(tmp_path), dtype="float32"))  # heads and tokens from the folder
    back.model.eval()
    assert_same(forward(back.model, batch), before)
    assert back.tokens == bundle.tokens
    assert back.settings == {"template": "en"}
    assert back.base.config.tie_word_embeddings == bundle.base.config.tie_word_embeddings
    again = batch_for(back, photo_records)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert torch.equal(again["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize(
    "groups", [["new_tokens", "cls_head", "mask_head", "lm_lora"], ["cls_head", "mask_head", "lm_lora"]]
)
def test_adapter_folder_comes_back(checkpoint: Path, photo_records: Path, tmp_path: Path, groups: list[str]) -> None:
    """With and without trained token rows: without them the rows are initialised as they were in training."""
    bundle = load(checkpoint, layer="weighted")
    bundle.settings["layout"] = "text_first"
    bundle = disturb(set_trainable(bundle, groups, LORA))
    batch = batch_for(bundle, photo_records)
    before = forward(bundle.model, batch)
    save_bundle(bundle, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    back = load_bundle(ModelConfig(path=str(tmp_path), dtype="float32"))
    back.model.eval()
    assert_same(forward(back.model, batch), before, atol=1e-5)
    assert back.settings == {"layout": "text_first"}
    named = load_bundle(ModelConfig(path=str(checkpoint), adapter=str(tmp_path), dtype="float32"))
    named.model.eval()
    assert_same(forward(named.model, batch), before, atol=1e-5)


def test_adapter_holds_rows_and_not_matrices(adapter_dir: Path) -> None:
    with safe_open(adapter_dir / "adapter_model.safetensors", "pt") as stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in list(stored.keys())}
    rows = [shape for key, shape in shapes.items() if "token" in key]
    assert rows == [(33, 64), (33, 64)]
    assert {name for name in HEAD_MODULES if any(name in key for key in shapes)} == TOKEN_HEADS
    assert not [key for key, shape in shapes.items() if shape and shape[0] >= 600]


def test_weights_on_disk_have_the_released_names(full_dir: Path) -> None:
    with safe_open(full_dir / "model.safetensors", "pt") as stored:
        prefixes = {
            ".".join(key.split(".")[:2]) for key in list(stored.keys()) if key.split(".")[0] not in HEAD_MODULES
        }
    assert prefixes == {"visual.patch_embed", "visual.blocks", "visual.merger", "model.embed_tokens", "model.layers",
                        "model.norm", "lm_head.weight"}  # fmt: skip


def test_auto_classes_open_our_folder(full_dir: Path, photo_records: Path) -> None:
    ours = load_bundle(ModelConfig(path=str(full_dir)))
    auto = AutoModelForImageTextToText.from_pretrained(full_dir)
    assert type(auto) is QwenForensicsForConditionalGeneration
    assert AutoConfig.from_pretrained(full_dir).model_type == "qwen_forensics"
    assert type(AutoProcessor.from_pretrained(full_dir)) is type(ours.processor)
    batch = batch_for(ours, photo_records)
    assert_same(forward(auto.eval(), batch), forward(ours.model.eval(), batch))


def test_base_class_can_read_our_folder(full_dir: Path) -> None:
    """Serving tools that only know Qwen2.5-VL find every weight they need."""
    config = Qwen2_5_VLForConditionalGeneration.config_class.from_pretrained(full_dir)
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(full_dir, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == TOKEN_HEADS


def test_tokenizer_state_of_an_earlier_call_is_not_saved(tied: Path, tmp_path: Path) -> None:
    bundle = load(tied)
    bundle.tokenizer(["a", "a much longer text"], truncation=True, max_length=3, padding="max_length")
    assert bundle.tokenizer.backend_tokenizer.truncation  # the trap is there
    save_bundle(bundle, tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None


def test_pixel_bounds_are_saved_and_can_be_replaced(tied: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(tied))
    bundle = load_bundle(config, heads=HeadsConfig(enabled=False), min_pixels=12544, max_pixels=50176)
    save_bundle(bundle, tmp_path)
    back = load_bundle(ModelConfig(path=str(tmp_path)))
    size = back.processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (12544, 50176)
    assert type(back.processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    replaced = load_bundle(ModelConfig(path=str(tmp_path)), max_pixels=100352).processor.image_processor.size
    assert (replaced["shortest_edge"], replaced["longest_edge"]) == (12544, 100352)


@pytest.mark.parametrize("other", [[], ["retouch.grain", "splice"], ["dent", "scratch"], ["splice"]])
def test_operations_of_another_list_are_refused(full_dir: Path, adapter_dir: Path, other: list[str]) -> None:
    for folder in (full_dir, adapter_dir):
        with pytest.raises(
            ModelLoadError, match=r"heads\.operations \['splice', 'retouch.grain'\], the configuration"
        ) as found:
            load(folder, **{**RICH, "operations": other})
        assert "\n" not in str(found.value)
        assert load(folder, **RICH).base.heads_config.operations == RICH["operations"]


def test_heads_without_operations_gain_none(untied: Path, tmp_path: Path) -> None:
    save_bundle(load(untied), tmp_path)
    with pytest.raises(ModelLoadError, match=r"heads\.operations \[\], the configuration asks for \['splice'\]"):
        load(tmp_path, operations=["splice"])


def test_other_tokens_or_layers_than_trained_heads_have_are_refused(full_dir: Path, adapter_dir: Path) -> None:
    """Not said, a run would record 32 mask tokens and train on 8, or let trained heads read a layer new to them."""
    for folder in (full_dir, adapter_dir):
        saved = load(folder, **RICH)
        heads = replace(saved.base.heads_config)
        own, other = saved.tokens, SpecialTokens(saved.tokens.num_cls, saved.tokens.num_mask + 1)
        path = ModelConfig(path=str(folder))
        for asked in (own, None):
            assert load_bundle(path, asked, heads).tokens == own
        with pytest.raises(
            ModelLoadError, match=rf"num_mask: {own.num_mask}\}}, the configuration asks for tokens"
        ) as found:
            load_bundle(path, other, heads)
        assert "\n" not in str(found.value)
        depth = saved.base.config.vision_config.depth
        same = [n - depth if n >= 0 else n + depth for n in heads.vision_layers]
        load_bundle(path, own, replace(heads, vision_layers=same))  # the same blocks, counted from the other end
        with pytest.raises(ModelLoadError, match=r"heads\.layer .*, the configuration asks for 1"):
            load_bundle(path, own, replace(heads, layer=1))
        with pytest.raises(ModelLoadError, match=r"heads\.vision_layers .*, the configuration asks for"):
            load_bundle(path, own, replace(heads, vision_layers=[n + 1 for n in same]))


# ---- new heads ----


def test_new_heads_follow_their_seed_alone(tied: Path) -> None:
    torch.manual_seed(1)
    first = load(tied, **RICH)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = load(tied, **RICH)
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = heads_of(first), heads_of(second)
    assert {name.split(".")[0] for name in ours} == TOKEN_HEADS
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    built = QwenForensicsForConditionalGeneration(first.base.config)  # nothing is left to transformers' initialisation
    assert all(torch.equal(p, ours[n]) for n, p in built.named_parameters() if n.split(".")[0] in HEAD_MODULES)
    other = heads_of(load(tied, seed=1, **RICH))
    same = {name for name, p in other.items() if torch.equal(p, ours[name])}
    constant = {name for name in same if ours[name].unique().numel() == 1}  # norms, biases of norms, zeros
    assert same == constant
    assert {"cls_head.embed.weight", "mask_head.kernel.weight"}.isdisjoint(same)


def test_several_tokens_size_the_heads(tied: Path, photo_records: Path, tmp_path: Path) -> None:
    tokens = SpecialTokens(num_cls=2, num_mask=4)
    bundle = load(tied, tokens, mask="grid")
    assert (bundle.base.config.num_cls, bundle.base.config.num_mask) == (2, 4)
    batch = batch_for(bundle, photo_records)
    output = forward(bundle.model, batch)
    assert output.cls_logits.shape == (2,)
    save_bundle(bundle, tmp_path)
    back = load_bundle(ModelConfig(path=str(tmp_path)))
    assert back.tokens == tokens
    assert_same(forward(back.model.eval(), batch), output)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_heads_in_fp32(tied: Path, photo_records: Path, tmp_path: Path, dtype: str) -> None:
    bundle = load(tied, dtype=dtype, **RICH)
    assert bundle.base.lm_head.weight.dtype == getattr(torch, dtype)
    assert {p.dtype for p in heads_of(bundle).values()} == {torch.float32}
    disturb(bundle)
    batch = batch_for(bundle, photo_records)
    before = forward(bundle.model, batch)
    assert {tensor.dtype for tensor in (before.cls_logits, *before.mask_logits)} == {torch.float32}
    save_bundle(bundle, tmp_path)
    back = load_bundle(ModelConfig(path=str(tmp_path)))  # dtype: auto, as saved
    assert back.base.lm_head.weight.dtype == getattr(torch, dtype)
    assert all(torch.equal(p, heads_of(bundle)[n]) for n, p in heads_of(back).items())
    assert_same(forward(back.model.eval(), batch), before)


# ---- folders that cannot be used ----


def rewrite(folder: Path, change: Any, name: str = "model.safetensors") -> Path:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("pattern", ["cls_head.out", "mask_head", "layer_mix"])
def test_some_head_weights_missing(full_dir: Path, copy_of: Any, pattern: str) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if key.startswith(pattern)]:
            del weights[key]

    with pytest.raises(ModelLoadError, match=rf"head weights are missing, e\.g\. '{pattern}"):
        load_bundle(ModelConfig(path=str(rewrite(copy_of(full_dir), drop))))


def test_other_weights_missing(full_dir: Path, copy_of: Any) -> None:
    folder = rewrite(copy_of(full_dir), lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"1 weights are missing, e\.g\. .*up_proj"):
        load_bundle(ModelConfig(path=str(folder)))


def test_heads_that_do_not_fit_the_folder(full_dir: Path) -> None:
    config = ModelConfig(path=str(full_dir))
    with pytest.raises(ModelLoadError, match=r"no place for|cannot be loaded"):
        load_bundle(config, heads=HeadsConfig(**{**SMALL, **RICH, "noise_residual": NoiseResidualConfig()}))
    with pytest.raises(ModelLoadError, match=r"cannot be loaded"):
        load_bundle(config, heads=HeadsConfig(**{**SMALL, **RICH, "hidden_size": 64}))


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors", "cannot be loaded"), ("config.json", "config.json"), ("tokenizer.json", "tokenizer")],
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_incomplete_folder(full_dir: Path, copy_of: Any, name: str, message: str, damage: str) -> None:
    folder = copy_of(full_dir)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_bundle(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model folder '.*gone' does not exist"):
        load_bundle(ModelConfig(path=str(tmp_path / "gone")))


def test_a_path_like_a_hub_name_is_first_of_all_a_missing_folder(vision_parts: Path) -> None:
    """`runs/none` could be either; the folder is what its user meant."""
    said = r"^model folder 'runs/none' does not exist, and no model of that name could be read from the hub \("
    with pytest.raises(ModelLoadError, match=said):
        load_bundle(ModelConfig(path="runs/none"))
    with pytest.raises(ModelLoadError, match=said):
        load_vision("runs/none", vision_parts)
    with pytest.raises(ModelLoadError, match=said):  # the processor is there, the weights are not
        load_model("runs/none", ModelConfig(), {})


def test_adapter_with_a_foreign_key(adapter_dir: Path, copy_of: Any) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        key = next(key for key in weights if "q_proj.lora_A" in key)
        weights[key.replace("q_proj", "qq_proj")] = weights.pop(key)

    folder = rewrite(copy_of(adapter_dir), rename, "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match=r"2 of .* adapter tensors do not fit this base model, e\.g\. .*qq?_proj"):
        load_bundle(ModelConfig(path=str(folder)))


def test_adapter_of_another_model(adapter_dir: Path, tiny_dir: Path) -> None:
    """Its rows train an lm_head of its own, which a tied model does not have."""
    with pytest.raises(ModelLoadError, match=r"do not fit|does not fit"):
        load_bundle(ModelConfig(path=str(tiny_dir), adapter=str(adapter_dir)))


def test_adapter_folder_without_weights(adapter_dir: Path, copy_of: Any) -> None:
    folder = copy_of(adapter_dir)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no adapter_model\.safetensors"):
        load_bundle(ModelConfig(path=str(folder)))


def test_adapter_whose_base_is_gone(adapter_dir: Path, copy_of: Any) -> None:
    folder = copy_of(adapter_dir)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder / "base")}))
    with pytest.raises(ModelLoadError, match="does not exist"):
        load_bundle(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    "heads", [{"layer": 3}, {"layer": "middle"}, {"layer": -4}, {"vision_layers": [3]}, {"vision_layers": []}]
)
def test_layers_the_model_does_not_have(tied: Path, heads: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"heads\.(layer|vision_layers) is .*; expected"):
        load(tied, **heads)
