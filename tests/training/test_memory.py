"""The memory estimate: exact counts for the released shapes, sane in every switch, near what tiny runs really take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.config import RunConfig, load_config
from finetune.errors import ConfigError
from finetune.training.memory import (
    CONTEXT_GB,
    GB,
    LAYOUTS,
    Layout,
    estimate,
    memory_report,
    parse_hardware,
    trainable_numbers,
)
from finetune.training.planned_model import meta_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
LORA = ["new_tokens", "cls_head", "mask_head", "noise_residual", "lm_lora"]
SINGLE, ZERO2, ZERO2_OFFLOAD, ZERO3, ZERO3_OFFLOAD = LAYOUTS


def config_of(size: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"stage1_{size}.yaml", overrides)


@pytest.mark.parametrize(("size", "numbers"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_released_shapes_have_their_published_numbers(size: str, numbers: int) -> None:
    model = meta_model(config_of(size))
    heads = sum(p.numel() for module in model.head_modules() for p in module.parameters())
    assert sum(p.numel() for p in model.parameters()) - heads == numbers
    assert all(p.is_meta for p in model.parameters())


def test_counts_are_those_of_a_real_run(make_config: Callable[..., RunConfig]) -> None:
    """Token rows and LoRA, which PEFT adds, are computed; here against the model that training builds."""
    from finetune.models.groups import parameter_groups
    from finetune.training.run import build_trainer

    config = make_config(train={"trainable": LORA}, lora={"r": 4}, data={"eval": []})
    trainer = build_trainer(config)[0]
    real = {
        group: sum(p.numel() for _, p in parameters)
        for group, parameters in parameter_groups(trainer.model, LORA).items()
    }
    assert trainable_numbers(config, meta_model(config)) == real


@pytest.mark.parametrize("name", ["regions_phase1", "regions_phase2", "regions_phase3"])
def test_counts_of_the_region_phases_are_those_of_the_golden_lists(name: str) -> None:
    """Tower blocks, the projector and LoRA on the tower, at the size of 3B."""
    config = load_config(CONFIGS / f"{name}.yaml")
    golden = (CONFIGS.parents[1] / "tests" / "golden" / "trainable" / f"{name}.txt").read_text("utf-8")
    lines = [re.match(r"(\w+): \d+ tensors, ([\d,]+) parameters", line) for line in golden.splitlines()]
    expected = {found[1]: int(found[2].replace(",", "")) for found in lines if found}
    assert trainable_numbers(config, meta_model(config)) == expected


def test_switches_move_the_parts_they_should() -> None:
    full = "train.trainable=[lm_full,cls_head,mask_head,noise_residual]"
    config = config_of("3b", full)
    model = meta_model(config)
    single, zero2, offload, zero3, zero3_offload = (estimate(config, layout, 4, model) for layout in LAYOUTS)
    assert single.gradients == pytest.approx(4 * zero2.gradients, rel=0.01)
    assert zero2.weights == pytest.approx(single.weights, rel=0.01)  # DeepSpeed holds the heads in bf16
    heads = sum(p.numel() for module in model.head_modules() for p in module.parameters())
    whole = 2 * (151936 * 2048 + heads)  # the embedding while it is used, and the heads always
    assert zero3.weights == pytest.approx(zero2.weights / 4 + whole, rel=1e-6)
    assert offload.optimizer == 0 < zero2.optimizer == offload.host
    assert zero3_offload.weights < zero3.weights
    assert zero3_offload.total < zero3.total < zero2.total
    lora = estimate(config_of("3b", "train.trainable=[lm_lora]"), SINGLE, 1, model)
    assert lora.optimizer < 0.02 * single.optimizer
    plain = estimate(config_of("3b", full, "train.gradient_checkpointing=false"), SINGLE, 1, model)
    tokens = 2 * (1024 + 320)  # two records: image tokens at the pixel limit, and text
    layer = 2 * tokens * (10 * 2048 + 4 * 256 + 4 * 11008)  # by hand: what a layer keeps, in bytes
    saved = 35 * layer - 36 * 2 * tokens * 2048  # all layers but one; their inputs stay
    assert plain.activations - single.activations == pytest.approx(saved, rel=1e-6)
    nf4 = estimate(config_of("3b", "model.quantization=nf4"), SINGLE, 1, model)
    assert nf4.weights < 0.55 * single.weights
    doubled = estimate(config_of("3b", full, "train.batch_size=4"), SINGLE, 1, model)
    assert doubled.activations == pytest.approx(2 * single.activations, rel=0.01)
    assert doubled.weights == single.weights


def test_a_shorter_side_bounds_the_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    full = "train.trainable=[lm_full]"
    model = meta_model(config_of("3b", full))

    def activations(*overrides: str) -> float:
        return estimate(config_of("3b", full, *overrides), SINGLE, 1, model).activations

    assert activations("data.image_short_side=448", "data.max_pixels=802816") == activations("data.max_pixels=401408")
    assert activations("data.image_short_side=448", "data.image_padding=square") == activations(
        "data.max_pixels=802816"
    )
    assert activations("data.image_short_side=2000") == activations()  # max_pixels holds all the same
    path = str(CONFIGS / "regions_phase2.yaml")
    assert main(["doctor", "--config", path, "--hardware", "4 GB"]) == 1
    assert "data.image_short_side=470: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "bytes_each"),
    [
        (["train.trainer_args.optim=sgd"], 0),
        (["train.trainer_args.optim=adafactor"], 0),
        (["train.trainer_args.optim=adamw_8bit"], 2),
        (["train.trainer_args.optim=lion_32bit"], 4),
        (["train.muon_groups=[lm_lora]"], 4),
        ([], 8),
    ],
)
def test_optimizers_keep_what_they_keep(overrides: list[str], bytes_each: int) -> None:
    """Adapters train in float32 on one GPU: two moments of Adam are eight bytes a number."""
    config = config_of("3b", "train.trainable=[lm_lora]", *overrides)
    model = meta_model(config)
    number = sum(trainable_numbers(config, model).values())
    assert estimate(config, SINGLE, 1, model).optimizer == bytes_each * number
    in_deepspeed = 4 + bytes_each  # a float32 copy of the weights is there in any case
    assert estimate(config, ZERO2, 2, model).optimizer == pytest.approx(in_deepspeed * number / 2)


def test_report_says_what_fits_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "stage1_3b.yaml")
    assert main(["doctor", "--config", path, "--hardware", "1x24GB"]) == 0
    printed = capsys.readouterr().out
    assert "estimated (not measured on a GPU), for 1 x 24 GB" in printed
    assert "fits with single / ddp" in printed
    full = ["train.trainable=[lm_full]", "train.batch_size=4", "train.gradient_checkpointing=false"]
    assert main(["doctor", "--config", path, "--hardware", "8 GB", *full]) == 1
    printed = capsys.readouterr().out
    assert "does not fit: at least" in printed
    for words in ("train.gradient_checkpointing=true", "train.batch_size=1", "LoRA in place of whole weights"):
        assert words in printed
    lines, _ = memory_report(config_of("3b", "model.quantization=nf4"), "24G")
    assert not any("zero3" in line for line in lines)


@pytest.mark.parametrize("text", ["24", "two", "0x24GB", "2x24MB", ""])
def test_hardware_in_another_form_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"e\.g\. 2x24GB"):
        parse_hardware(text)


def test_hardware_forms() -> None:
    for text in ("2x24GB", "2*24gb", "2 x 24 GiB"):
        assert parse_hardware(text) == (2, 24 * GB)
    assert parse_hardware("80G") == (1, 80 * GB)


def test_unknown_model_is_one_line() -> None:
    with pytest.raises(ConfigError, match="neither 3B nor 7B"):
        meta_model(config_of("3b", "model.path=org/some-model"))


# ---- against real runs ----


@pytest.fixture(scope="module")
def medium_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for its own memory to stand out from the interpreter's: 70 million parameters."""
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import TinyShape, build_tiny

    shape = TinyShape(
        hidden_size=512, num_layers=16, num_heads=8, num_kv_heads=2, intermediate_size=2048, vision_hidden_size=128,
        vision_depth=4, vision_num_heads=4, vision_intermediate_size=256, fullatt_block_indexes=(1, 3), vocab_size=900,
    )  # fmt: skip
    return build_tiny(tmp_path_factory.mktemp("medium") / "model", tokenizer_corpus(), shape)


CASES: dict[str, dict[str, Any]] = {
    "full": {"trainable": ["cls_head", "mask_head", "noise_residual", "lm_full", "vision_full"]},
    "full checkpointed": {"trainable": ["cls_head", "mask_head", "lm_full"], "gradient_checkpointing": True},
    "lora": {"trainable": LORA},
    "stage 1": {"trainable": LORA[:-1]},
}


def longest(config: RunConfig) -> int:
    """Tokens of the longest training record."""
    from finetune.data.dataset import load_dataset
    from finetune.models.loading import load_vocabulary

    processor, tokens, _ = load_vocabulary(config.model.path, None, config.data.min_pixels, config.data.max_pixels)
    dataset = load_dataset(config.data.train, "train", processor, tokens, config.data)
    return max(map(dataset.num_tokens, range(len(dataset))))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_estimate_is_near_the_measured_growth(
    name: str, medium_dir: Path, write_config: Callable[..., Path], synth_dir: Path, tmp_path: Path
) -> None:
    """Resident memory of the process beyond what a run of the smallest model has already taken."""
    train = {**CASES[name], "batch_size": 6, "max_steps": 2, "precision": "fp32", "text_retention": False}
    trainer_args = {"save_strategy": "no", "disable_tqdm": True}
    data = {"eval": [], "max_pixels": 28 * 28 * 12}
    small = write_config("small", data=data, train={**train, "batch_size": 1, "trainer_args": trainer_args})
    path = write_config(
        "measured", data=data, model={"path": str(medium_dir)}, train={**train, "trainer_args": trainer_args}
    )
    probe = Path(__file__).with_name("memory_probe.py")
    done = subprocess.run(
        [sys.executable, str(probe), str(small), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = int(done.stdout.rsplit("grew by", 1)[1])
    config = load_config(path)
    config.data.max_length = longest(config)  # what is estimated for unknown data is known here
    found = estimate(config, Layout("cpu"), 1)
    expected = found.total - found.workspace
    print(json.dumps({"case": name, "estimated": expected / 1e6, "measured": measured / 1e6, "parts": vars(found)}))
    print(f"{name}: estimated {expected / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, {expected / measured:.2f}")
    assert found.workspace > CONTEXT_GB * GB
    assert 0.6 < expected / measured < 1.6


def test_heads_on_the_tower_need_no_language_model() -> None:
    """Weights are tower and heads; LoRA of the named blocks counts: five layers of 1280, 3840 and 3420 channels."""
    config = load_config(CONFIGS / "vision_c.yaml")
    model = meta_model(config)
    assert not model.config.has_language
    assert sum(p.numel() for p in model.parameters()) < 0.7e9
    assert trainable_numbers(config, model)["vision_lora"] == 3 * 16 * (5120 + 2560 + 3 * 4700)
    without = estimate(config, SINGLE, 1)
    config.model.language = "load"
    assert meta_model(config).config.has_language
    assert estimate(config, SINGLE, 1).weights > without.weights + 6e9
