"""`forensics merge`: a merged folder computes what the adapter did, in our class and as a plain Qwen2.5-VL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import SMALL, STREAM, assert_same, collate, forward, load, record_named, samples_of
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration

import finetune.models.export as export
from finetune.cli import main
from finetune.config import HeadsConfig, LoraConfig, ModelConfig
from finetune.errors import ConfigError, ModelLoadError
from finetune.models.adapters import set_trainable
from finetune.models.export import merge
from finetune.models.loading import Bundle, load_adapter, load_bundle, save_bundle
from finetune.models.shared_base import SharedBase
from finetune.models.verification import TOLERANCE, worst
from finetune.special_tokens import SpecialTokens
from finetune.training.checkpoint import load_weights

LORA = LoraConfig(r=4, dropout=0.0)
HEADS = ["new_tokens", "cls_head", "mask_head"]
NAMES = ("real_84x140", "unmasked_140x84", "text")


def train(bundle: Bundle, folder: Path, groups: list[str] | None = None, seed: int = 7) -> Path:
    """An adapter folder whose every trainable tensor has been moved, as training would."""
    bundle.settings.update({"layout": "tokens_first", "trained": {"seed": seed}})
    bundle = set_trainable(bundle, groups or [*HEADS, "lm_lora"], LORA)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter))
    save_bundle(bundle, folder)
    return folder


def outputs(bundle: Bundle, records: Path) -> Any:
    batch = collate(bundle, samples_of(bundle, record_named(records, *NAMES)))
    return forward(bundle.model.eval(), batch)


def names_in(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as stored:
            shapes.update({key: tuple(stored.get_slice(key).get_shape()) for key in list(stored.keys())})
    return shapes


@pytest.fixture(scope="module")
def adapter_dir(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA, rows and heads on the tied checkpoint; read only."""
    return train(load(tied, layer="weighted"), tmp_path_factory.mktemp("adapters") / "lora")


# ---- the merged folder computes the same ----


@pytest.mark.parametrize(
    ("groups", "plain"),
    [
        ([*HEADS, "lm_lora"], True),
        (HEADS, False),
        (["cls_head", "mask_head", "lm_lora", "projector"], False),
        pytest.param([*HEADS, "lm_lora"], False, marks=pytest.mark.slow),
        pytest.param(HEADS, True, marks=pytest.mark.slow),
    ],
)
def test_merged_folder_equals_the_adapter(
    checkpoint: Path, photo_records: Path, tmp_path: Path, groups: list[str], plain: bool
) -> None:
    """Tied and untied, with and without LoRA, with and without rows; through our own loader."""
    adapter = train(load(checkpoint), tmp_path / "adapter", groups)
    expected = outputs(load_bundle(ModelConfig(path=str(adapter), dtype="float32")), photo_records)
    report = merge(str(adapter), None, tmp_path / "out", plain=plain)
    for name in ("merge", "reload", *(["plain"] if plain else [])):
        for key in ("logits", "scores", "masks"):
            assert report[name][key] is None or report[name][key] <= TOLERANCE * max(1, report[name]["largest_logit"])
    back = load_bundle(ModelConfig(path=str(tmp_path / "out"), dtype="float32"))
    assert back.model is back.base  # no PEFT is left
    assert not back.has_new_heads
    assert back.settings == {"layout": "tokens_first", "trained": {"seed": 7}}
    assert_same(outputs(back, photo_records), expected, atol=1e-4)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report
    assert back.base.config.tie_word_embeddings == (back.base.lm_head.weight is back.base.get_input_embeddings().weight)


def test_plain_folder_is_a_released_qwen(checkpoint: Path, photo_records: Path, tmp_path: Path) -> None:
    """Names, shapes, configuration and files as in the base; transformers' class loads it without any left over."""
    adapter = train(load(checkpoint), tmp_path / "adapter")
    ours = load_bundle(ModelConfig(path=str(adapter), dtype="float32"))
    merge(str(checkpoint), str(adapter), tmp_path / "out", plain=True)
    folder = tmp_path / "out"
    assert names_in(folder) == names_in(checkpoint)
    config = json.loads((folder / "config.json").read_text())
    base_config = json.loads((checkpoint / "config.json").read_text())
    assert config == {**base_config, "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = collate(ours, samples_of(ours, record_named(photo_records, *NAMES)))
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    with torch.no_grad():
        logits = model.eval()(**{key: batch[key] for key in keys}).logits
    torch.testing.assert_close(logits, forward(ours.model.eval(), batch).logits, rtol=0, atol=1e-4)
    heads = load_file(folder / "heads.safetensors")
    assert {name.split(".")[0] for name in heads} == {"cls_head", "mask_head"}


@pytest.mark.parametrize("plain", [False, True])
def test_what_belongs_to_a_model_travels_with_it(adapter_dir: Path, tied: Path, tmp_path: Path, plain: bool) -> None:
    assert not (adapter_dir / "calibration.json").exists()
    shutil.copytree(adapter_dir, tmp_path / "adapter")
    (tmp_path / "adapter" / "calibration.json").write_text('{"method": "none"}')
    merge(str(tmp_path / "adapter"), None, tmp_path / "out", plain=plain)
    assert (tmp_path / "out" / "calibration.json").read_text() == '{"method": "none"}'
    source = AutoProcessor.from_pretrained(adapter_dir)
    found = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(found) is type(source)
    assert found.chat_template == source.chat_template
    assert found.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    assert found.tokenizer.encode(SpecialTokens().run) == source.tokenizer.encode(SpecialTokens().run)
    assert found.image_processor.size == source.image_processor.size
    ours, base = (GenerationConfig.from_pretrained(folder) for folder in (tmp_path / "out", tied))
    assert ours.eos_token_id == base.eos_token_id
    assert ours.pad_token_id == base.pad_token_id
    if plain:
        old = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
        assert old["image_processor_type"] == "Qwen2VLImageProcessor"
        assert old["max_pixels"] == found.image_processor.size["longest_edge"]
        assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "qwen2_5_vl"


@pytest.mark.parametrize("tokens", [SpecialTokens(), SpecialTokens(2, 3)])
def test_a_model_without_heads_becomes_plain(tied: Path, tmp_path: Path, tokens: SpecialTokens) -> None:
    """No heads are put beside it, and none are made up when it is read again; nor are other tokens."""
    bundle = load_bundle(ModelConfig(path=str(tied), dtype="float32"), tokens, HeadsConfig(enabled=False))
    save_bundle(set_trainable(bundle, ["lm_lora"], LoraConfig(r=4)), tmp_path / "adapter")
    report = merge(str(tmp_path / "adapter"), None, tmp_path / "out", plain=True)
    assert worst(report["plain"]) <= TOLERANCE
    assert report["plain"]["scores"] is None
    assert not (tmp_path / "out" / "heads.safetensors").exists()


def test_whole_model_becomes_plain(untied: Path, photo_records: Path, tmp_path: Path) -> None:
    """A whole model of ours, whose configuration is not a released one."""
    bundle = load(untied, noise_residual=STREAM)
    save_bundle(bundle, tmp_path / "full")
    expected = outputs(bundle, photo_records)
    report = merge(str(tmp_path / "full"), None, tmp_path / "out", plain=True)
    assert "merge" not in report
    assert names_in(tmp_path / "out") == names_in(untied)
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())) & {"heads", "cls_token_ids"} == set()
    assert_same(outputs(load_bundle(ModelConfig(path=str(tmp_path / "out"))), photo_records), expected, atol=1e-5)


def test_rows_of_the_released_matrices_are_kept(untied: Path, tmp_path: Path) -> None:
    rows = load_file(untied / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    report = merge(str(train(load(untied), tmp_path / "a")), None, tmp_path / "out", plain=True)
    assert report["vocabulary_rows"] == rows
    assert names_in(tmp_path / "out")["model.embed_tokens.weight"][0] == rows
    assert names_in(tmp_path / "out")["lm_head.weight"][0] == rows


def test_an_adapter_trained_in_4_bit_is_merged_into_the_full_base(
    tied: Path, photo_records: Path, tmp_path: Path
) -> None:
    """QLoRA: the adapter sees a rounded base in training; its weights are added to the original one."""
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(path=str(tied), dtype="float32", quantization="nf4")
    adapter = train(load_bundle(config, heads=HeadsConfig(**SMALL)), tmp_path / "qlora")
    full = load_bundle(ModelConfig(path=str(tied), adapter=str(adapter), dtype="float32"))
    expected = outputs(full, photo_records)
    four_bit = outputs(
        load_bundle(ModelConfig(path=str(tied), adapter=str(adapter), dtype="float32", quantization="nf4")),
        photo_records,
    )
    quantised = load_bundle(config, heads=HeadsConfig(**SMALL)).base
    four_bit_layers = {n for n, m in quantised.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(four_bit_layers) == 14  # seven projections in two layers; neither tower nor lm_head nor heads
    assert all(".language_model.layers." in name for name in four_bit_layers)
    assert (four_bit.logits - expected.logits).abs().max() > 1e-2  # the base really was rounded
    merge(str(adapter), None, tmp_path / "out")
    back = load_bundle(ModelConfig(path=str(tmp_path / "out"), dtype="float32"))
    assert not hasattr(back.base.config, "quantization_config")
    assert_same(outputs(back, photo_records), expected, atol=1e-4)


def test_stored_type_and_shards(adapter_dir: Path, photo_records: Path, tmp_path: Path) -> None:
    report = merge(str(adapter_dir), None, tmp_path / "out", dtype="bfloat16", max_shard_size="200KB")
    assert report["rounding"]["logits"] > 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    back = load_bundle(ModelConfig(path=str(tmp_path / "out")))
    assert back.base.dtype == torch.bfloat16
    assert {p.dtype for p in back.base.cls_head.parameters()} == {torch.float32}
    again = merge(str(tmp_path / "out"), None, tmp_path / "again", plain=True)  # auto: as stored
    assert again["dtype"] == "bfloat16"
    assert again["rounding"]["logits"] == 0


@pytest.mark.parametrize("groups", [[*HEADS, "lm_lora"], [*HEADS, "lm_lora", "vision_lora", "projector"]])
def test_rounding_alone_refuses_no_merge(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: list[str]
) -> None:
    """float32 differs by more than the tolerance, float64 does not: the second one counts, and is said."""
    adapter = train(load(tied, noise_residual={"enabled": True}), tmp_path / "adapter", groups)
    monkeypatch.setattr(export, "TOLERANCE", 1e-9)
    monkeypatch.setattr(export, "_verify", lambda *_, **__: None)
    report = merge(str(adapter), None, tmp_path / "out")
    assert worst(report["merge"]) > 1e-9
    assert worst(report["merge_float64"]) <= 1e-9
    assert "merge_float64" in export.describe(report)


def test_a_wrong_merge_is_refused(adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that adds half of the LoRA differs in float64 too."""
    whole = export._merged

    def half(bundle: Bundle) -> Bundle:
        for module in bundle.model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: value / 2 for name, value in module.scaling.items()}
        return whole(bundle)

    monkeypatch.setattr(export, "_merged", half)
    with pytest.raises(ModelLoadError, match=r"'merge_float64' differs by .*nothing was"):
        merge(str(adapter_dir), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- refusals ----


def test_nothing_is_left_of_a_failed_merge(adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while writing, and found different on reload: neither leaves a folder, nor harms the one there."""
    out = tmp_path / "out"
    merge(str(adapter_dir), None, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_bundle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(str(adapter_dir), None, out, overwrite=True)

    def damaged(bundle: Bundle, folder: Path, **_: Any) -> None:
        with torch.no_grad():
            bundle.base.cls_head.out.bias.add_(1)
        save_bundle(bundle, folder)
        with torch.no_grad():
            bundle.base.cls_head.out.bias.sub_(1)

    monkeypatch.setattr(export, "save_bundle", damaged)
    with pytest.raises(ModelLoadError, match=r"'reload' differs by .*nothing was"):
        merge(str(adapter_dir), None, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_replaced_on_request_only(adapter_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        merge(str(adapter_dir), None, out)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        merge(str(adapter_dir), None, out, overwrite=True)
    (out / "config.json").write_text("{}")
    merge(str(adapter_dir), None, out, overwrite=True)
    assert not (out / "notes.txt").exists()
    assert (out / "model.safetensors").is_file()


def test_sources_are_never_overwritten(adapter_dir: Path, tied: Path) -> None:
    for out in (adapter_dir, tied, tied.parent):
        with pytest.raises(ConfigError, match="is or contains"):
            merge(str(tied), str(adapter_dir), out, overwrite=True)


def test_what_cannot_be_merged_is_said_in_words(tied: Path, tmp_path: Path) -> None:
    save_bundle(load(tied, noise_residual=STREAM), tmp_path / "full")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(str(tmp_path / "full"), None, tmp_path / "out")
    with pytest.raises(ModelLoadError, match="does not exist"):
        merge(str(tmp_path / "gone"), None, tmp_path / "out", plain=True)
    from dataclasses import replace

    save_bundle(load(tied, noise_residual=replace(STREAM, to_language=True)), tmp_path / "stream")
    with pytest.raises(ConfigError, match="to_language"):
        merge(str(tmp_path / "stream"), None, tmp_path / "out", plain=True)
    assert not (tmp_path / "out").exists()


def test_heads_beside_a_plain_model_must_be_complete(adapter_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(str(adapter_dir), None, out, plain=True)
    heads = load_file(out / "heads.safetensors")
    save_file({**heads, "cls_head.out.bias": torch.zeros(7)}, out / "heads.safetensors")
    with pytest.raises(ModelLoadError, match=r"cls_head\.out\.bias"):
        load_bundle(ModelConfig(path=str(out)))
    (out / "heads.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no heads\.safetensors"):
        load_bundle(ModelConfig(path=str(out)))
    (out / "forensics.json").unlink()
    assert load_bundle(ModelConfig(path=str(out))).has_new_heads  # plain now, and said so


def test_pickles_are_refused_wherever_a_folder_is_loaded(tied: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """A file that would run code if it were unpickled; nothing may open it."""
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    def pickled(source: Path, name: str, weights: str) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / name))
        (folder / weights).unlink()
        for file in (f"{Path(weights).stem}.bin", "pytorch_model.bin", "weights.pt"):
            (folder / file).write_bytes(pickle.dumps(Bomb()))
        return folder

    model = pickled(tied, "model", "model.safetensors")
    adapter = pickled(adapter_dir, "adapter", "adapter_model.safetensors")
    full = tmp_path / "full"
    save_bundle(load(tied), full)
    whole = pickled(full, "whole", "model.safetensors")
    adapted = load_bundle(ModelConfig(path=str(adapter_dir)))
    attempts = [
        lambda: load_bundle(ModelConfig(path=str(model))),
        lambda: load_bundle(ModelConfig(path=str(whole))),
        lambda: load_bundle(ModelConfig(path=str(adapter))),
        lambda: load_bundle(ModelConfig(path=str(tied), adapter=str(adapter))),
        lambda: load_adapter(load(tied).base, adapter),
        lambda: SharedBase(ModelConfig(path=str(model))),
        lambda: merge(str(adapter), None, tmp_path / "out"),
    ]
    for attempt in attempts:
        with pytest.raises(ModelLoadError, match=r"pickle \(.*expected \.safetensors"):
            attempt()
    for bundle, folder in ((load(tied), whole), (adapted, adapter)):  # resume
        with pytest.raises(ModelLoadError, match=r"pickle \(.*expected \.safetensors"):
            load_weights(bundle, folder)
    assert not (tmp_path / "exploded").exists()


def test_the_command(adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", "--model", str(adapter_dir), "--out", str(tmp_path / "out"), "--plain"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for word in ("logits", "scores", "masks", "merge ", "reload ", "plain ", "heads.safetensors"):
        assert word in printed
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err


# ---- several adapters on one base ----


def test_adapters_share_one_base_and_switch_without_a_trace(
    checkpoint: Path, photo_records: Path, tmp_path: Path
) -> None:
    """Different heads and token counts on one base: each equals the adapter loaded alone, and A, B, A changes no bit.

    Outputs are compared to 1e-6: the last bit of a sum depends on where the allocator puts a tensor, even for one model
    that is asked twice. The weights, all of them, are compared exactly.
    """
    first = train(load(checkpoint), tmp_path / "first")
    second = train(load(checkpoint, SpecialTokens(2, 4), mask="grid", hidden_size=16), tmp_path / "second", seed=8)
    third = train(load(checkpoint), tmp_path / "third", HEADS, seed=9)
    alone = {path: outputs(load_bundle(ModelConfig(path=str(path))), photo_records) for path in (first, second, third)}
    shared = SharedBase(ModelConfig(path=str(checkpoint)))
    released = {name: value.clone() for name, value in shared.base().base.state_dict().items()}
    bundles = {path: shared.adapter(path) for path in (first, second, third)}
    before = {
        path: {name: value.clone() for name, value in bundle.model.state_dict().items()}
        for path, bundle in bundles.items()
    }
    for path in (first, second, first, third, first):
        assert_same(outputs(bundles[path], photo_records), alone[path], atol=1e-6)
    for path, bundle in bundles.items():
        after = bundle.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before[path].items())
    for name, value in shared.base().base.state_dict().items():
        assert torch.equal(value, released[name]), name  # the base is as released, embedding rows included
    frozen = "model.language_model.layers.0.mlp.up_proj"
    pointers = {
        bundle.base.get_submodule(frozen).get_base_layer().weight.data_ptr()
        for bundle in (bundles[first], bundles[second])
    }
    assert pointers == {shared.base().base.get_submodule(frozen).weight.data_ptr()}
    rows = {
        bundles[path].base.get_input_embeddings().token_adapter.base_layer.weight.data_ptr() for path in (first, third)
    }
    assert len(rows) == 1  # the same tokens: one copy of the embedding for both


def test_adapters_on_a_base_with_trained_heads(tied: Path, photo_records: Path, tmp_path: Path) -> None:
    """The base is a whole model of ours; an adapter without heads keeps the base's."""
    save_bundle(load(tied), tmp_path / "full")
    with_heads = train(load_bundle(ModelConfig(path=str(tmp_path / "full"))), tmp_path / "a")
    without = train(load_bundle(ModelConfig(path=str(tmp_path / "full"))), tmp_path / "b", ["lm_lora"])
    shared = SharedBase(ModelConfig(path=str(tmp_path / "full")))
    base = outputs(shared.base(), photo_records)
    for path in (with_heads, without, with_heads):
        bundle = shared.adapter(path)
        assert not bundle.has_new_heads
        alone = outputs(load_bundle(ModelConfig(path=str(path))), photo_records)
        assert_same(outputs(bundle, photo_records), alone, atol=1e-6)
    assert_same(outputs(shared.base(), photo_records), base, atol=1e-6)


def test_an_adapter_without_heads_on_a_plain_base_has_no_verdict(tied: Path, tmp_path: Path) -> None:
    adapter = train(load(tied), tmp_path / "a", ["new_tokens", "lm_lora"])
    assert load_bundle(ModelConfig(path=str(adapter))).has_new_heads
    assert SharedBase(ModelConfig(path=str(tied))).adapter(adapter).has_new_heads


def test_configuration_of_a_released_folder_is_kept_as_it_is(untied: Path, photo_records: Path, tmp_path: Path) -> None:
    """Released folders have a flat config.json of an older transformers, which serving tools know: it is copied."""
    import shutil

    base = Path(shutil.copytree(untied, tmp_path / "base"))
    tree = json.loads((base / "config.json").read_text())
    text = tree.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types", "dtype"):
        text.pop(name, None)
    vision = {**tree.pop("vision_config"), "in_chans": 3, "spatial_patch_size": 14}
    vision.pop("rope_parameters", None)
    flat = {
        **text,
        **tree,
        "vision_config": vision,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": tree.pop("dtype"),
        "transformers_version": "4.41.2",
    }
    flat.pop("dtype")
    (base / "config.json").write_text(json.dumps(flat))
    adapter = train(load(base), tmp_path / "adapter")
    expected = outputs(load_bundle(ModelConfig(path=str(adapter), dtype="float32")), photo_records)
    merge(str(adapter), None, tmp_path / "out", plain=True, dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**flat, "torch_dtype": "bfloat16"}
    again = merge(str(adapter), None, tmp_path / "again", plain=True)
    assert again["dtype"] == "float32"
    assert_same(outputs(load_bundle(ModelConfig(path=str(tmp_path / "again"))), photo_records), expected, atol=1e-4)
