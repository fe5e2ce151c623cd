"""Heads on the vision tower as folders: saved without their base, opened again, taken over from stage to stage."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import STREAM
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from finetune.config import HeadsConfig, LoraConfig, ModelConfig, VisionLoraConfig
from finetune.errors import ModelLoadError
from finetune.models.adapters import set_trainable
from finetune.models.loading import Bundle, load_bundle, save_bundle
from finetune.models.shared_base import SharedBase
from finetune.models.vision_loading import load_vision, lora_layers

STAGE_A = HeadsConfig(
    source="vision", mask="none", vision_layers=[0, 2], hidden_size=16, num_layers=1, num_heads=2, num_queries=3,
    noise_residual=STREAM,
)  # fmt: skip
STAGE_B = replace(STAGE_A, mask="query")
GRID = torch.tensor([[1, 6, 10], [1, 10, 6], [1, 6, 10]])
LORA = VisionLoraConfig(blocks=[0, 2], r=4, alpha=8)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(180, 1176, generator=torch.Generator().manual_seed(0))


def opened(path: Path | str, heads: HeadsConfig | None = None, **settings: Any) -> Bundle:
    bundle = load_bundle(ModelConfig(path=str(path), dtype="float32", **settings), heads=heads)
    bundle.model.eval()
    return bundle


def outputs(bundle: Bundle, pixels: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = bundle.model(pixel_values=pixels, image_grid_thw=GRID)
    return [found.cls_logits, *(found.mask_logits or [])]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def shaken(bundle: Bundle, *parts: str) -> Bundle:
    """As if trained: noise on every weight whose name has one of `parts`."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if any(part in name for part in parts):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bundle


@pytest.fixture(scope="module")
def stage_a(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as stage A leaves it: neck, classifier and stream; read only."""
    bundle = shaken(opened(tiny_dir, STAGE_A), "cls_head", "neck", "noise_residual")
    bundle.settings = {"trained": {"seed": 7}}
    folder = tmp_path_factory.mktemp("vision") / "a"
    save_bundle(bundle, folder)
    return folder


@pytest.fixture(scope="module")
def stage_c(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as stage C leaves it: all heads and LoRA on two blocks; read only."""
    bundle = set_trainable(
        opened(tiny_dir, STAGE_B), ["neck", "cls_head", "mask_head", "vision_lora"], LoraConfig(), LORA
    )
    folder = tmp_path_factory.mktemp("vision") / "c"
    save_bundle(shaken(bundle, "cls_head", "neck", "mask_", "lora_"), folder)
    return folder


def test_a_folder_of_parts_holds_no_tower(stage_a: Path, stage_c: Path, tiny_dir: Path) -> None:
    files = {path.relative_to(stage_c).as_posix() for path in stage_c.rglob("*.safetensors")}
    assert files == {"heads.safetensors", "vision_lora/adapter_model.safetensors"}
    assert not (stage_a / "vision_lora").exists()
    assert not any(name.startswith("model.") for name in load_file(stage_c / "heads.safetensors"))
    section = json.loads((stage_c / "forensics.json").read_text())["vision"]
    assert section["base"] == str(tiny_dir)
    assert section["vision_layers"] == [0, 2]
    assert section["width"] == 16
    assert json.loads((stage_c / "config.json").read_text())["has_language"] is False


@pytest.mark.parametrize("language", ["skip", "load"])
@pytest.mark.parametrize("stage", ["stage_a", "stage_c"])
def test_a_folder_opened_again_computes_the_same(
    request: pytest.FixtureRequest, pixels: torch.Tensor, tmp_path: Path, stage: str, language: str
) -> None:
    first = opened(request.getfixturevalue(stage))
    second = opened(request.getfixturevalue(stage), language=language)
    assert same(outputs(second, pixels), outputs(first, pixels))
    assert hasattr(second.base, "lm_head") == (language == "load")
    assert not second.has_new_heads
    save_bundle(second, tmp_path / "again")
    assert same(outputs(opened(tmp_path / "again"), pixels), outputs(first, pixels))


def test_settings_beside_the_heads_come_back(stage_a: Path) -> None:
    assert opened(stage_a).settings == {"trained": {"seed": 7}}


def test_heads_and_lora_are_loadable_one_by_one(
    stage_c: Path, tiny_dir: Path, pixels: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = outputs(opened(stage_c), pixels)
    shutil.copytree(stage_c, tmp_path / "heads", ignore=shutil.ignore_patterns("vision_lora"))
    capsys.readouterr()
    found = load_vision(tiny_dir, tmp_path / "heads" / "heads.safetensors", stage_c / "vision_lora")
    assert same(outputs(replace(found, model=found.model.eval()), pixels), whole)
    names = lora_layers(found.model)
    assert len(names) == 10
    assert {name.split(".")[3] for name in names} == {"0", "2"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    without = load_vision(tiny_dir, stage_c, use_lora=False)
    assert without.model is without.base
    assert not same(outputs(replace(without, model=without.model.eval()), pixels), whole)
    with pytest.raises(ModelLoadError, match="trained with LoRA on the tower, and vision_lora is not there"):
        opened(tmp_path / "heads")


def test_plain_peft_puts_the_lora_on_a_plain_model(stage_c: Path, tiny_dir: Path, pixels: torch.Tensor) -> None:
    """No class of ours: the tower with LoRA gives the features that our heads read."""
    from peft import AutoPeftModel, PeftModel

    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_dir, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(plain, stage_c / "vision_lora").eval()
    with torch.no_grad():
        theirs = wrapped.get_base_model().model.get_image_features(pixels, GRID, return_dict=True).last_hidden_state
        base = opened(tiny_dir, STAGE_B).base.model.get_image_features(pixels, GRID, return_dict=True).last_hidden_state
        ours = opened(stage_c).base.model.get_image_features(pixels, GRID, return_dict=True).last_hidden_state
        found = AutoPeftModel.from_pretrained(stage_c / "vision_lora").eval()  # the class, too, is read from the folder
        alone = found.get_base_model().model.get_image_features(pixels, GRID, return_dict=True).last_hidden_state
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert type(found.get_base_model()) is Qwen2_5_VLForConditionalGeneration
    torch.testing.assert_close(alone, ours, rtol=0, atol=1e-6)
    assert not torch.allclose(base, ours, atol=1e-3)
    assert not (stage_c / "vision_lora" / "README.md").exists()


def test_the_next_stage_starts_from_the_verdicts_of_the_one_before(
    stage_a: Path, pixels: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    before = outputs(opened(stage_a), pixels)
    caplog.clear()
    with caplog.at_level(logging.INFO, "finetune"):
        bundle = opened(stage_a, STAGE_B)
    after = outputs(bundle, pixels)
    assert torch.equal(after[0], before[0])  # the new summand from the mask starts at zero
    assert len(after) == 4
    line = next(message for message in caplog.messages if "new:" in message)
    assert all(part in line for part in ("cls_head.evidence", "mask_head", "mask_queries"))
    assert "neck" not in line.split("new:")[1]
    assert not bundle.has_new_heads


def test_a_stage_may_bring_the_expert(tiny_dir: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    bare = replace(STAGE_A, noise_residual=replace(STREAM, enabled=False))
    bundle = shaken(opened(tiny_dir, bare), "cls_head", "neck")
    save_bundle(bundle, tmp_path / "a")
    assert torch.equal(outputs(opened(tmp_path / "a", STAGE_B), pixels)[0], outputs(bundle, pixels)[0])


def test_a_stage_may_search_more_pictures(stage_a: Path) -> None:
    more = replace(STAGE_A, noise_residual=replace(STREAM, similarity_share=0.5))
    first, then = opened(stage_a).base.noise_residual, opened(stage_a, more).base.noise_residual
    assert (first.similarity_share, then.similarity_share) == (1.0, 0.5)
    pairs = zip(first.parameters(), then.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("language", ["skip", "load"])
def test_several_heads_stand_on_one_base(
    tiny_dir: Path, stage_a: Path, stage_c: Path, pixels: torch.Tensor, language: str
) -> None:
    """One tower in memory; each gives what it gives alone, LoRA of one leaves no trace in the others."""
    config = ModelConfig(path=str(tiny_dir), dtype="float32", language=language)
    shared = SharedBase(config)
    released = {name: value.clone() for name, value in shared.base().base.state_dict().items()}
    folders = (stage_c, stage_a)
    bundles = [shared.adapter(folder) for folder in folders]
    own = {id(parameter) for parameter in shared.base().base.parameters()}
    for folder, bundle in zip(folders, bundles, strict=True):
        tower = [p for name, p in bundle.base.model.visual.named_parameters() if ".lora_" not in name]
        assert tower
        assert own >= {id(parameter) for parameter in tower}
        assert bundle.base.config.has_language is (language == "load")
        bundle.model.eval()
        for ours, theirs in zip(outputs(bundle, pixels), outputs(opened(folder), pixels), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert shared.base().base.state_dict().keys() == released.keys()
    for name, value in shared.base().base.state_dict().items():
        assert torch.equal(value, released[name]), name


def test_lora_of_an_earlier_run_is_continued(stage_c: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    first = opened(stage_c)
    groups = ["neck", "vision_lora"]
    wider = set_trainable(opened(stage_c), groups, LoraConfig(), replace(LORA, blocks=[0, 1, 2], r=8, alpha=16))
    wider.model.eval()
    torch.testing.assert_close(outputs(wider, pixels), outputs(first, pixels), rtol=0, atol=1e-6)
    heads_only = set_trainable(opened(stage_c), ["cls_head"], LoraConfig(), LORA)
    trains = [name for name, p in heads_only.model.named_parameters() if p.requires_grad]
    assert trains
    assert all("cls_head" in name for name in trains)
    save_bundle(heads_only, tmp_path / "c")
    assert same(outputs(opened(tmp_path / "c"), pixels), outputs(first, pixels))


def test_whole_models_are_saved_where_the_tower_trained(tiny_dir: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    bundle = set_trainable(opened(tiny_dir, STAGE_B), ["neck", "cls_head", "vision_full"], LoraConfig())
    bundle = shaken(bundle, "visual", "cls_head")
    bundle.model.eval()
    save_bundle(bundle, tmp_path / "whole")
    assert not (tmp_path / "whole" / "heads.safetensors").exists()
    again = opened(tmp_path / "whole")
    for found, expected in zip(outputs(again, pixels), outputs(bundle, pixels), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ModelLoadError, match="saved without its language model"):
        opened(tmp_path / "whole", language="load")


def test_language_lora_beside_vision_heads_is_an_adapter_with_all_of_them(
    stage_c: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    bundle = opened(stage_c, language="load")
    expected = outputs(bundle, pixels)
    bundle = set_trainable(bundle, ["lm_lora"], LoraConfig(r=2))
    save_bundle(bundle, tmp_path / "lm")
    assert (tmp_path / "lm" / "adapter_config.json").is_file()
    again = opened(tmp_path / "lm")
    assert same(outputs(again, pixels), expected)
    assert again.base.config.has_language


def test_a_trained_expert_of_the_token_stages_is_taken_over(saved_model: Path) -> None:
    stored = opened(saved_model)
    stream = stored.base.heads_config.noise_residual
    bundle = opened(saved_model, replace(STAGE_A, noise_residual=stream))
    for name, value in stored.base.noise_residual.state_dict().items():
        assert torch.equal(bundle.base.noise_residual.state_dict()[name], value)
    assert bundle.has_new_heads


def test_operations_may_come_later_and_stay_as_they_are(stage_c: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    told = replace(STAGE_B, operations=["splice", "remove"])
    bundle = opened(stage_c, told)
    assert same(outputs(bundle, pixels), outputs(opened(stage_c), pixels))
    save_bundle(shaken(bundle, "operation_head"), tmp_path)
    weight = bundle.base.operation_head.weight
    assert torch.equal(opened(tmp_path).base.operation_head.weight, weight)
    assert torch.equal(opened(tmp_path, told).base.operation_head.weight, weight)
    for other in (["remove", "splice"], ["dent", "scratch"], ["splice"], []):
        with pytest.raises(
            ModelLoadError, match=r"heads\.operations \['splice', 'remove'\], the configuration asks for"
        ):
            opened(tmp_path, replace(told, operations=other))


WRONG_HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "block list": ({"vision_layers": [1, 2]}, r"heads\.vision_layers \[0, 2\], the configuration asks for \[1, 2\]"),
    "width": ({"hidden_size": 32}, r"heads\.hidden_size 16, the configuration asks for 32"),
    "kind": ({"mask": "grid"}, r"heads\.mask query, the configuration asks for grid"),
    "no mask": ({"mask": "none"}, r"heads\.mask query"),
    "queries": ({"num_queries": 4}, r"heads\.num_queries 3, the configuration asks for 4"),
    "attention heads": ({"num_heads": 4}, r"heads\.num_heads 2"),
    "evidence": ({"cls_uses_mask": False}, r"heads\.cls_uses_mask True, the configuration asks for False"),
    "stream": ({"noise_residual": replace(STREAM, enabled=False)}, r"heads\.noise_residual"),
    "tokens": ({"source": "tokens"}, r"a folder of vision parts"),
}


@pytest.mark.parametrize("case", WRONG_HEADS.values(), ids=WRONG_HEADS)
def test_heads_of_another_kind_are_refused(stage_c: Path, case: tuple[dict[str, Any], str]) -> None:
    changes, message = case
    with pytest.raises(ModelLoadError, match=message) as caught:
        opened(stage_c, replace(STAGE_B, **changes))
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(stage_c: Path, tiny_untied_dir: Path, tied: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"trained on another vision tower \(fingerprint .*model\.base"):
        opened(stage_c, base=str(tied))  # the same shapes
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import TinyShape, build_tiny

    other = build_tiny(tmp_path / "other", tokenizer_corpus()[:50], TinyShape(vision_hidden_size=48, vision_depth=3))
    with pytest.raises(ModelLoadError, match=r"vision tower with hidden_size 32, that of .* has 48"):
        opened(stage_c, base=str(other))
    moved = tmp_path / "moved"
    shutil.copytree(stage_c, moved)
    settings = json.loads((moved / "forensics.json").read_text())
    settings["vision"]["base"] = str(tmp_path / "gone")
    (moved / "forensics.json").write_text(json.dumps(settings))
    with pytest.raises(ModelLoadError, match=r"its base model '.*gone' is not there; .*model\.base"):
        opened(moved)


def test_lora_that_matches_nothing_is_refused(stage_c: Path, tiny_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(stage_c / "vision_lora", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {name.replace("blocks.2.", "blocks.9."): value for name, value in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(ModelLoadError, match=r"adapter tensors do not fit this base model, e\.g\. "):
        load_vision(tiny_dir, stage_c, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config["target_modules"] = r"transformer\.blocks\.\d+\.qkv"
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="the adapter does not fit this base model"):
        load_vision(tiny_dir, stage_c, tmp_path / "lora")
    with pytest.raises(ModelLoadError, match=r"no adapter_config\.json; expected a PEFT folder"):
        load_vision(tiny_dir, stage_c, tmp_path)


def test_incomplete_folders(stage_c: Path, tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(stage_c, tmp_path / "headless")
    (tmp_path / "headless" / "heads.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"vision parts without heads\.safetensors"):
        opened(tmp_path / "headless")
    shutil.copytree(stage_c, tmp_path / "cut")
    file = tmp_path / "cut" / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match="the heads cannot be read"):
        opened(tmp_path / "cut")
    (tmp_path / "bare").mkdir()
    shutil.copy(stage_c / "heads.safetensors", tmp_path / "bare")
    with pytest.raises(ModelLoadError, match=r"no config\.json beside it"):
        load_vision(tiny_dir, tmp_path / "bare")
    with pytest.raises(ModelLoadError, match="no heads there"):
        load_vision(tiny_dir, tmp_path)


# ---- resuming and merging ----


def test_a_checkpoint_of_parts_is_put_back(stage_c: Path, pixels: torch.Tensor) -> None:
    from finetune.training.checkpoint import load_weights

    expected = outputs(opened(stage_c), pixels)
    groups = ["neck", "cls_head", "mask_head", "vision_lora"]
    bundle = shaken(set_trainable(opened(stage_c), groups, LoraConfig(), LORA), "cls_head", "mask_", "neck", "lora_")
    bundle.model.eval()
    assert not same(outputs(bundle, pixels), expected)
    load_weights(bundle, stage_c)
    for found, wanted in zip(outputs(bundle, pixels), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    with pytest.raises(ModelLoadError):
        load_weights(set_trainable(opened(stage_c), groups, LoraConfig(), replace(LORA, blocks=[1])), stage_c)


@pytest.mark.parametrize("is_plain", [False, True])
def test_merged_parts_stand_alone(stage_c: Path, pixels: torch.Tensor, tmp_path: Path, is_plain: bool) -> None:
    """Tower with LoRA in its weights, language model and heads in one folder; base and parts are no longer needed."""
    from finetune.models.export import merge

    report = merge(str(stage_c), None, tmp_path / "merged", plain=is_plain)
    assert 0 <= report["merge"]["masks"] < 1e-4
    assert report["base"] == str(stage_c)
    merged = opened(tmp_path / "merged")
    assert merged.model is merged.base
    for found, expected in zip(outputs(merged, pixels), outputs(opened(stage_c), pixels), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if is_plain:
        plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged")
        tower = dict(opened(tmp_path / "merged", language="load").base.model.visual.named_parameters())
        assert all(torch.equal(p, tower[name]) for name, p in plain.model.visual.named_parameters())
