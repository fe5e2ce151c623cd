"""Inpainting with a local diffusers pipeline, on a tiny random Stable Diffusion built here: only the region comes from
it, the seed decides, and what is missing is said before anything is made. Importing diffusers is what makes it slow."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.synthesis import SynthConfig, synthesize
from finetune.data.synthesis.camera import develop
from finetune.data.synthesis.operations import Donor, OperationSettings, tamper
from finetune.data.synthesis.operations.diffusion import PROMPTS, load_pipeline
from finetune.data.synthesis.photos import find_photos
from finetune.errors import ConfigError, MissingDependencyError
from finetune.torchvision_compat import ensure_torchvision

SIZE_HW = (64, 96)


def save_pipeline(folder: Path, safe: bool = True) -> Path:
    """A Stable Diffusion inpainting pipeline of some 100 k random weights."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `diffusion`")
    ensure_torchvision()
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz," for end in ("", "</w>")),
    ]
    files = folder.parent / "tokenizer_files"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (files / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(files / "vocab.json"),
        merges=str(files / "merges.txt"),
        unk_token="<|endoftext|>",
        model_max_length=32,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=9, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=64,
    )  # fmt: skip
    diffusers.StableDiffusionInpaintPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=diffusers.DDIMScheduler(steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=safe)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("diffusion") / "tiny-inpaint")


@pytest.fixture(scope="module")
def settings(model_dir: Path) -> OperationSettings:
    return replace(OperationSettings(), diffusion_model=str(model_dir), diffusion_steps=2)


def picture(seed: int) -> np.ndarray:
    photos = find_photos().photos
    return develop(photos[seed % len(photos)], SIZE_HW, np.random.default_rng(seed))[0]


def no_donor(rng: np.random.Generator) -> Donor:
    raise AssertionError("inpainting needs no donor")


@pytest.mark.slow
def test_only_the_region_comes_from_the_pipeline(settings: OperationSettings) -> None:
    prompts = set()
    for seed in range(4):
        host = picture(seed)
        result = tamper(host, "inpaint_diffusion", np.random.default_rng(seed), settings, no_donor)
        changed = (host != result.image).any(axis=2)
        assert changed.any()
        assert not (changed & ~result.mask).any()
        p = result.parameters
        assert (p["model"], p["steps"], p["guidance"]) == ("tiny-inpaint", 2, 7.5)
        assert p["prompt"] in PROMPTS
        assert json.loads(json.dumps(p)) == p
        prompts.add(p["prompt"])
    assert len(prompts) > 1


@pytest.mark.slow
def test_the_seed_decides(settings: OperationSettings) -> None:
    host = picture(0)
    first, again, other = (
        tamper(host, "inpaint_diffusion", np.random.default_rng(seed), settings, no_donor) for seed in (5, 5, 6)
    )
    assert np.array_equal(first.image, again.image)
    assert first.parameters == again.parameters
    assert first.parameters["seed"] != other.parameters["seed"]
    assert not np.array_equal(first.image, other.image)


@pytest.mark.slow
def test_a_set_is_made_with_it_and_holds_no_path_of_this_machine(model_dir: Path, tmp_path: Path) -> None:
    config = SynthConfig(
        num_train=4, num_eval=0, num_val=0, sizes_hw=(SIZE_HW,), operations={"inpaint_diffusion": 1.0}, workers=1,
        operation_settings={"diffusion_model": str(model_dir), "diffusion_steps": 1},  # type: ignore[arg-type]
    )  # fmt: skip
    manifest = synthesize(config, tmp_path / "set", progress=False)
    assert manifest["counts"]["train"]["operations"] == {"authentic": 2, "inpaint_diffusion": 2}
    for file in (tmp_path / "set").rglob("*.json*"):
        assert str(model_dir.parent) not in file.read_text(encoding="utf-8"), file.name


def asking(**settings: Any) -> SynthConfig:
    return SynthConfig(operations={"splice": 1.0, "inpaint_diffusion": 0.1}, operation_settings=settings)  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="the extra `diffusion`")
def test_what_is_missing_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "model_index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"diffusion_model is not set; give the folder"):
        asking()
    with pytest.raises(ConfigError, match=r"expected a saved diffusers pipeline .* nothing is downloaded"):
        asking(diffusion_model="stabilityai/stable-diffusion-2-inpainting")
    with pytest.raises(ConfigError, match="diffusion_steps"):
        asking(diffusion_model=str(model_dir), diffusion_steps=0)
    asking(diffusion_model=str(model_dir))
    SynthConfig(operations={"splice": 1.0, "inpaint_diffusion": 0.0})  # not asked for: nothing needed
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    with pytest.raises(MissingDependencyError, match=r"needs diffusers; install with: pip install .*\[diffusion\]"):
        asking(diffusion_model=str(model_dir))


@pytest.mark.slow
def test_a_folder_that_is_no_safe_inpainting_pipeline_is_refused_in_a_line(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    index = json.loads((other / "model_index.json").read_text(encoding="utf-8"))
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}), encoding="utf-8")
    pickled = save_pipeline(tmp_path / "pickled", safe=False)
    for folder, device in ((other, "cpu"), (pickled, "cpu"), (model_dir, "nowhere")):
        with pytest.raises(ConfigError, match="cannot be used on") as caught:
            load_pipeline(str(folder), device)
        assert "\n" not in str(caught.value)
