"""The region pipeline's YAML: every key of the specification at its place, both spellings, mistakes in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import LoraConfig, RunConfig, load_config
from finetune.errors import ConfigError

SPEC = """
model_name: some/model
output_dir: runs/somewhere
precision: bf16
image_short_side: 448
max_regions_per_image: 8
peft: {enable: true, qlora: true, r: 8, alpha: 24, dropout: 0.1, target_modules: [q_proj, v_proj]}
freeze: {vision_tower: true, projector: false, language: lora_only}
optim:
  {lr_lm: 1e-4, lr_proj: 2e-5, batch_size: 2, grad_accum: 8, epochs: 3, warmup_steps: 50, weight_decay: 0.01,
   grad_checkpointing: true}
data: {train_jsonl: a/train.jsonl, val_jsonl: a/val.jsonl}
trainer:
  {logging_steps: 7, eval_steps: 90, save_steps: 45, save_total_limit: 3, report_to: tensorboard, seed: 3,
   max_steps: -1, lr_scheduler_type: linear, eval_strategy: steps, save_strategy: steps, bf16: true,
   load_best_model_at_end: true,
   metric_for_best_model: loss, greater_is_better: false, dataloader_num_workers: 4, max_grad_norm: 0.5,
   remove_unused_columns: false, adam_beta2: 0.98}
"""
Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`SPEC` with sections replaced and keys changed, e.g. peft={"r": 4}; None removes one."""

    def make(overrides: Sequence[str] = (), **changes: Any) -> RunConfig:
        tree = yaml.safe_load(SPEC)
        for name, value in changes.items():
            if value is None:
                tree.pop(name)
            elif isinstance(value, dict):
                tree[name] = {**tree.get(name, {}), **value}
            else:
                tree[name] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return load_config(path, overrides)

    return make


def test_every_key_of_the_specification_has_its_place(load: Load) -> None:
    config = load()
    assert (config.model.path, config.output_dir, config.seed) == ("some/model", "runs/somewhere", 3)
    assert (config.model.dtype, config.model.quantization, config.train.precision) == ("bfloat16", "nf4", "bf16")
    data, train, lora = config.data, config.train, config.lora
    assert ([each.path for each in data.train], [each.path for each in data.eval]) == (
        ["a/train.jsonl"],
        ["a/val.jsonl"],
    )
    assert (data.image_short_side, data.max_regions, data.num_workers) == (448, 8, 4)
    assert (lora.r, lora.alpha, lora.dropout) == (8, 24, 0.1)
    assert lora.target_modules == r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj)"
    assert train.trainable == ["lm_lora", "projector"]
    assert (train.learning_rate, train.group_learning_rates) == (1e-4, {"projector": 2e-5})
    assert (train.batch_size, train.eval_batch_size, train.gradient_accumulation_steps) == (2, 2, 8)
    assert (train.epochs, train.max_steps, train.warmup_steps, train.weight_decay) == (3.0, -1, 50, 0.01)
    assert (train.gradient_checkpointing, train.max_grad_norm, train.lr_scheduler) == (True, 0.5, "linear")
    assert (train.logging_steps, train.eval_steps, train.save_total_limit) == (7, 90, 3)
    assert (train.metric_for_best, train.report_to) == ("eval_loss", ["tensorboard"])
    assert train.trainer_args == {"save_steps": 45, "adam_beta2": 0.98}


def test_it_trains_on_text_alone(load: Load) -> None:
    config = load()
    assert not config.heads.enabled
    assert not config.data.class_balanced
    weights = ("focal", "dice", "boundary", "authentic", "bce", "evidence", "sparsity", "contrast_region")
    assert config.loss.text == 1
    assert not any(getattr(config.loss, name) for name in weights)


def test_sections_may_be_left_out(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("model_name: some/model\npeft:\nfreeze: {}\ndata: {train_jsonl: [a.jsonl, b.jsonl]}\n")
    config = load_config(path)
    assert config.train.trainable == ["lm_lora", "projector"]
    assert (config.train.learning_rate, config.train.group_learning_rates) == (1e-4, {})
    assert config.lora.target_modules == LoraConfig().target_modules
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert config.data.eval == []
    assert (config.train.warmup_steps, config.train.metric_for_best) == (None, "eval_loss")


@pytest.mark.parametrize(
    ("freeze", "groups"),
    [
        ({"vision_tower": "lora_top_4"}, ["lm_lora", "projector", "vision_lora"]),
        ({"vision_tower": "top_2", "projector": True}, ["lm_lora", "vision_top"]),
        ({"vision_tower": False}, ["lm_lora", "projector", "vision_full"]),
        ({"projector": True}, ["lm_lora"]),
        ({"language": True, "vision_tower": "lora_top_4"}, ["projector", "vision_lora"]),
    ],
)
def test_what_is_not_frozen_trains(load: Load, freeze: dict, groups: list[str]) -> None:
    config = load(freeze=freeze, optim={"lr_vision": 3e-5})
    assert config.train.trainable == groups
    rates = {"projector": 2e-5, "vision_lora": 3e-5, "vision_top": 3e-5, "vision_full": 3e-5}
    assert config.train.group_learning_rates == {group: rates[group] for group in groups if group in rates}
    assert config.vision_lora.blocks == ([-4, -3, -2, -1] if "vision_lora" in groups else [-1])
    assert (config.vision_lora.r, config.vision_lora.alpha) == (8, 24)
    assert (config.vision_top.blocks, config.vision_top.merger) == (2 if "vision_top" in groups else 1, False)


def test_the_language_model_may_train_whole(load: Load) -> None:
    config = load(freeze={"language": False}, peft={"enable": False, "qlora": False})
    assert config.train.trainable == ["lm_full", "projector"]
    assert config.model.quantization == "none"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], LoraConfig().target_modules),
        ("all-linear", LoraConfig().target_modules),
        ("o_proj", r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(o_proj)"),
        (r".*layers\.[01]\.mlp\..*", r".*layers\.[01]\.mlp\..*"),
    ],
)
def test_target_modules_are_names_or_one_pattern(load: Load, value: Any, found: str) -> None:
    assert load(peft={"target_modules": value}).lora.target_modules == found


def test_names_match_the_language_model_alone(tiny_dir: Path, load: Load) -> None:
    """The vision tower's MLPs have layers of the same names."""
    from finetune.config import ModelConfig
    from finetune.models.adapters import lora_matches
    from finetune.models.loading import load_bundle

    model = load_bundle(ModelConfig(path=str(tiny_dir))).base
    found = lora_matches(model, load(peft={"target_modules": ["q_proj", "up_proj"]}).lora.target_modules)
    assert len(found) == 4
    assert all(name.startswith("model.language_model.layers.") for name in found)


def test_overrides_in_either_spelling_win_over_the_file(load: Load) -> None:
    config = load(
        [
            "optim.lr_lm=5e-4", "train.max_steps=2", "model.path=runs/tiny/model", "train.epochs=9", "seed=8",
            "data.train_jsonl=[x.jsonl]", "data.eval=[y.jsonl]", "peft.r=64", "lora.alpha=99", "data.max_pixels=12544",
            "freeze.vision_tower=top_1", "trainer.eval_steps=11", "precision=fp32", "trainer.bf16=false",
            "train.resume=auto",
        ]
    )  # fmt: skip
    assert (config.train.learning_rate, config.train.max_steps, config.train.epochs) == (5e-4, 2, 9)
    assert (config.model.path, config.seed, config.train.resume) == ("runs/tiny/model", 8, "auto")
    assert [source.path for source in (*config.data.train, *config.data.eval)] == ["x.jsonl", "y.jsonl"]
    assert (config.lora.r, config.lora.alpha, config.data.max_pixels) == (64, 99, 12544)
    assert (config.train.trainable[-1], config.train.eval_steps) == ("vision_top", 11)
    assert (config.train.precision, config.model.dtype) == ("fp32", "float32")


def test_sections_of_a_run_stand_beside(load: Load) -> None:
    beside = {"model": {"adapter": "runs/before/best"}, "train": {"early_stopping_patience": 3}, "seed": 5}
    config = load(trainer=None, data={"max_length": 777}, **beside)
    assert (config.model.adapter, config.model.path, config.seed) == ("runs/before/best", "some/model", 5)
    assert (config.train.early_stopping_patience, config.train.learning_rate) == (3, 1e-4)
    assert (config.data.max_length, len(config.data.train)) == (777, 1)


def test_region_features_train_where_they_are_switched_on(load: Load) -> None:
    for config in (load(model={"region_features": True}), load(["model.region_features=true"])):
        assert config.model.region_features
        assert config.train.trainable == ["lm_lora", "projector", "region_features"]
    assert load(["model.region_features=false"]).train.trainable == ["lm_lora", "projector"]


def test_extends_keeps_the_spelling(load: Load, tmp_path: Path) -> None:
    load()
    child = tmp_path / "child.yaml"
    child.write_text("extends: run.yaml\noutput_dir: runs/b\nfreeze: {vision_tower: top_1}\noptim: {lr_lm: 1e-5}\n")
    config = load_config(child)
    assert (config.output_dir, config.train.learning_rate, config.lora.r) == ("runs/b", 1e-5, 8)
    assert config.train.trainable == ["lm_lora", "projector", "vision_top"]


@pytest.mark.parametrize(
    ("given", "place", "value"),
    [
        ({"warmup_ratio": 0.1}, "warmup_ratio", 0.1),
        ({"warmup_steps": 0.2}, "warmup_ratio", 0.2),
        ({"warmup_steps": 12}, "warmup_steps", 12),
        ({"report_to": "none"}, "report_to", []),
        ({"report_to": ["tensorboard", "wandb"]}, "report_to", ["tensorboard", "wandb"]),
        ({"lr_scheduler_type": "constant_with_warmup"}, "lr_scheduler", "constant"),
        ({"resume_from_checkpoint": True}, "resume", "auto"),
        ({"resume_from_checkpoint": "runs/x/checkpoint-5"}, "resume", "runs/x/checkpoint-5"),
        ({"optim": "adamw_torch_fused"}, "trainer_args", {"optim": "adamw_torch_fused"}),
    ],
)
def test_trainer_arguments_find_their_place(load: Load, given: dict, place: str, value: Any) -> None:
    (name, argument) = next(iter(given.items()))
    config = load([f"trainer.{name}={yaml.safe_dump(argument, default_flow_style=True)}"], trainer=None, optim=None)
    assert getattr(config.train, place) == value


MISTAKES = {
    "top-level key": ({"modle_name": "x"}, r"unknown key 'modle_name' \(value 'x'\); did you mean 'model_name'\?"),
    "native key": ({"sed": 1}, r"unknown key 'sed' .*did you mean 'seed'\?"),
    "key of peft": ({"peft": {"target_module": ["q_proj"]}}, r"'peft.target_module' .*did you mean 'target_modules'\?"),
    "key of optim": ({"optim": {"grad_acum": 2}}, r"'optim.grad_acum' \(value 2\); did you mean 'grad_accum'\?"),
    "key of data": ({"data": {"train_json": "x"}}, r"'data.train_json' .*did you mean 'train_jsonl'\?"),
    "native key of data": ({"data": {"max_pixel": 5}}, r"'data.max_pixel' .*did you mean 'max_pixels'\?"),
    "type": ({"optim": {"batch_size": "two"}}, r"'optim.batch_size' is 'two' \(str\); expected int"),
    "section": ({"freeze": "all"}, r"'freeze' is 'all'; expected a section"),
    "precision": ({"precision": "bf8"}, r"'precision' is 'bf8'; choose one of auto, fp32"),
    "no model": ({"model_name": None}, r"'model_name' is missing"),
    "vision tower": ({"freeze": {"vision_tower": "top_0"}}, r"'freeze.vision_tower' is 'top_0'; choose true, fal"),
    "language": ({"freeze": {"language": "lora"}}, r"'freeze.language' is 'lora'; choose lora_only, true or false"),
    "module": ({"peft": {"target_modules": ["q_porj"]}}, r"lists 'q_porj'; did you mean 'q_proj'\?"),
    "no modules": ({"peft": {"target_modules": []}}, r"'peft.target_modules' lists ''; choose from q_proj"),
    "qlora without peft": ({"peft": {"enable": False}, "freeze": {"language": True}}, r"'peft.qlora' is true and"),
    "lora without peft": ({"peft": {"enable": False}}, r"'peft.enable' is false and 'freeze.language' is lora_only"),
    "vision lora without peft": (
        {"peft": {"enable": False}, "freeze": {"language": True, "vision_tower": "lora_top_2"}},
        r"'peft.enable' is false and 'freeze.vision_tower' is lora_top_2",
    ),
    "peft for nothing": ({"freeze": {"language": True}}, r"'peft.enable' is true and 'freeze' asks for no LoRA"),
    "4 bits train whole": (
        {"freeze": {"language": False, "vision_tower": "lora_top_1"}},
        r"'peft.qlora' is true and 'freeze.language' is false",
    ),
    "whole and vision lora": (
        {"freeze": {"language": False, "vision_tower": "lora_top_1"}, "peft": {"qlora": False}},
        r"an adapter folder would have to hold the whole language model",
    ),
    "frozen": (
        {"freeze": {"language": True, "projector": True}, "peft": {"enable": False, "qlora": False}},
        r"'freeze' freezes everything",
    ),
    "tower alone": ({"freeze": {"vision_tower": False, "projector": True}}, r"which trains the projector too"),
    "twice": ({"train": {"epochs": 3}}, r"'optim.epochs' and 'train.epochs' say the same thing; keep one"),
    "twice, groups": ({"train": {"trainable": ["lm_lora"]}}, r"'freeze.language' and 'train.trainable' say"),
    "twice, data": ({"data": {"train": ["x.jsonl"]}}, r"'data.train_jsonl' and 'data.train' say the same thing"),
    "twice, short side": ({"data": {"image_short_side": 5}}, r"'image_short_side' and 'data.image_short_side' say"),
    "twice, trainer": ({"trainer": {"num_train_epochs": 1}}, r"'optim.epochs' and 'trainer.num_train_epochs' say"),
    "twice, warm-up": ({"trainer": {"warmup_ratio": 0.1}}, r"'optim.warmup_steps' and 'trainer.warmup_ratio' say"),
    "twice, blocks": (
        {"freeze": {"vision_tower": "lora_top_2"}, "vision_lora": {"blocks": [1]}},
        r"'freeze.vision_tower' and 'vision_lora.blocks' say",
    ),
    "bf16": ({"precision": "fp16"}, r"'trainer.bf16' is True and 'precision' is fp16; keep one"),
    "by epoch": ({"trainer": {"eval_strategy": "epoch"}}, r"'trainer.eval_strategy' is 'epoch'; validation runs"),
    "worst model": ({"trainer": {"greater_is_better": True}}, r"'trainer.greater_is_better' is True, and the"),
    "schedule": ({"trainer": {"lr_scheduler_type": "polynomial"}}, r"is 'polynomial'; choose one of cosine, linear"),
    "stages": ({"stages": [{"name": "a"}]}, r"'stages' cannot stand beside peft"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_words(load: Load, name: str) -> None:
    changes, words = MISTAKES[name]
    with pytest.raises(ConfigError, match=words) as caught:
        load(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.epochs=1", "train.epochs=2"], r"overrides 'optim.epochs' and 'train.epochs' say the same thing"),
        (["optm.lr_lm=1"], r"unknown key 'optm' .*did you mean 'optim'\?"),
        (["optim.lr=1"], r"unknown key 'optim.lr' "),
        (["data.val_json=x"], r"unknown key 'data.val_json' .*did you mean 'val_jsonl'\?"),
        (["train.max_step=2"], r"unknown key 'train.max_step' .*did you mean 'max_steps'\?"),
    ],
)
def test_mistakes_in_overrides(load: Load, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(overrides)


def test_a_slip_in_another_file_is_not_taken_for_this_spelling(tmp_path: Path) -> None:
    path = tmp_path / "native.yaml"
    path.write_text("model: {path: x}\nprecision: bf16\n")
    with pytest.raises(ConfigError, match="unknown key 'precision'"):
        load_config(path)
    path.write_text("model: {path: x}\n")
    with pytest.raises(ConfigError, match="unknown key 'optim'"):
        load_config(path, ["optim.lr_lm=1e-4", "peft.r=4"])
