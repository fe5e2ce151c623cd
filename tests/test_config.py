"""Configuration: every key is known, every value has its type, and a mistake says what to write instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import HeadsConfig, RunConfig, SourceConfig, build, config_hash, load_config, stage_runs, to_dict
from finetune.config.loading import read_tree
from finetune.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write_file


def test_values_and_overrides(write: Any) -> None:
    path = write("seed: 3\ntrain:\n  learning_rate: 1e-4\n  trainable: [cls_head]\nheads: {layer: 2}\n")
    overrides = [
        "train.max_steps=7",
        "data.template=en",
        "heads.layer=weighted",
        "train.group_learning_rates.lm_lora=2e-5",
    ]
    config = load_config(path, overrides)
    assert (config.seed, config.train.max_steps, config.data.template) == (3, 7, "en")
    assert config.train.learning_rate == 1e-4  # YAML 1.1 reads a number without a dot as text
    assert config.train.trainable == ["cls_head"]
    assert config.heads.layer == "weighted"
    assert config.train.group_learning_rates == {"lm_lora": 2e-5}
    assert load_config(path).heads.layer == 2


def test_sources_may_be_bare_paths(write: Any) -> None:
    config = load_config(write("data:\n  train: [a.jsonl, {path: b.json, weight: 2}]\n"))
    assert config.data.train == [SourceConfig("a.jsonl"), SourceConfig("b.json", weight=2.0)]
    assert load_config(write(""), ["data.eval=[c.jsonl]"]).data.eval == [SourceConfig("c.jsonl")]


def test_empty_file_is_the_defaults(write: Any) -> None:
    assert load_config(write("")) == RunConfig()
    assert load_config(write("﻿seed: 0\n")) == RunConfig()


def test_a_section_that_had_no_effect_is_passed_over_and_said(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    """config.yaml of earlier runs, which are continued from, has it; on the command line it is unknown."""
    assert load_config(write("generation: {batch_size: 16}\nseed: 3\n")) == RunConfig(seed=3)
    assert "'generation' has no effect on training" in caplog.text
    with pytest.raises(ConfigError, match="unknown key 'generation'"):
        load_config(None, ["generation.batch_size=16"])


def test_overrides_alone_change_the_defaults() -> None:
    assert load_config(None) == RunConfig()
    assert load_config(None, ["data.template=en"]).data.template == "en"
    with pytest.raises(ConfigError, match=r"defaults: unknown key 'data.templat' .*did you mean 'template'"):
        load_config(None, ["data.templat=en"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traim: {}", "unknown key 'traim' .*did you mean 'train'"),
        ("train: {learning_rat: 1}", "unknown key 'train.learning_rat' .*did you mean 'learning_rate'"),
        ("heads: {noise_residual: {enabeld: true}}", "'heads.noise_residual.enabeld' .*did you mean 'enabled'"),
        ("tokens: {zzz: 1}", "known keys: num_cls, num_mask"),
        ("seed: high", r"'seed' is 'high' \(str\); expected int"),
        ("train: {feature_cache: 3}", r"'train.feature_cache' is 3 \(int\); expected false or a text"),
        ("heads: {layer: [3]}", r"'heads.layer' is \[3\] \(list\); expected a text or int"),
        ("seed: 1.5", r"'seed' is 1.5 \(float\); expected int"),
        ("seed: true", r"'seed' is True \(bool\); expected int"),
        ("train: {learning_rate: fast}", "'train.learning_rate' is 'fast'"),
        ("train: {gradient_checkpointing: 1}", r"\(int\); expected bool"),
        ("train: {trainable: cls_head}", "'train.trainable' is 'cls_head'; expected a list"),
        ("train: {trainable: [1]}", r"'train.trainable\[0\]' is 1"),
        ("data: {layout: text_last}", "'data.layout' is 'text_last'; choose one of tokens_first, text_first"),
        ("data: {train: [{pth: a}]}", r"unknown key 'data.train\[0\].pth' .*did you mean 'path'"),
        ("data: {max_length: null}", "'data.max_length' is None"),
        ("train: 3", "'train' is 3; expected a section with keys"),
        ("train: {group_learning_rates: [1]}", "expected a mapping"),
        ("heads: {layer: 1.5}", "'heads.layer' is 1.5"),
        ("- a\n- b", "expected a mapping of sections"),
        ("train: {a: 1\nb", "is not valid YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(write: Any, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "not of the form key.sub=value"),
        ("=3", "not of the form"),
        ("train.max_stesp=3", "did you mean 'max_steps'"),
        ("seed.x=3", "'seed' is 1, not a section"),
        ("train.trainable=[a", "the value is not YAML"),
    ],
)
def test_bad_overrides(write: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write("seed: 1\n"), [override])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("{evidence}", "{evidence}"),
        ("Look: {regions}? # 1", "Look: {regions}? # 1"),
        ("2024", "2024"),
        ("yes", "yes"),
        ("null", "null"),
        ("", ""),
        ("'it''s a: path'", "it's a: path"),
        ('"two\\nlines"', "two\nlines"),
        ("'half", "'half"),
    ],
)
def test_the_value_of_a_text_is_the_text_it_is(write: Any, text: str, meant: str) -> None:
    """What YAML would make a mapping, a number, a truth value or an error of."""
    path = write("stages: [{name: one, data: {template: zh}}]\n")
    config = load_config(path, [f"output_dir={text}", f"data.template={text}"])
    assert (config.output_dir, config.data.template) == (meant, meant)
    assert stage_runs(config)[0].config.data.template == meant
    config = load_config(path, [f"stages.one.data.template={text}"])
    assert stage_runs(config)[0].config.data.template == meant


def test_a_text_that_may_be_missing_can_be_taken_away(write: Any) -> None:
    path = write("model: {adapter: a}\ntrain: {best_folders: {best_val: eval_f1}}\n")
    for nothing in ("null", "~", ""):
        assert load_config(path, [f"model.adapter={nothing}"]).model.adapter is None
    config = load_config(path, ["model.adapter='null'", "train.best_folders.best_val=1", "heads.layer=2"])
    assert (config.model.adapter, config.train.best_folders, config.heads.layer) == ("null", {"best_val": "1"}, 2)


def test_extends_merges_sections_and_replaces_lists(write: Any) -> None:
    write(
        "seed: 1\ntrain: {max_steps: 5, trainable: [cls_head, mask_head]}\nheads: {noise_residual: {enabled: true}}\n",
        "a.yaml",
    )
    write("extends: a.yaml\ntrain: {trainable: [lm_lora]}\nheads: {noise_residual: {channels: 8}}\n", "b.yaml")
    config = load_config(write("extends: b.yaml\nseed: 2\n"))
    assert (config.seed, config.train.max_steps, config.train.trainable) == (2, 5, ["lm_lora"])
    assert (config.heads.noise_residual.enabled, config.heads.noise_residual.channels) == (True, 8)


def test_extends_that_cannot_work(write: Any) -> None:
    write("extends: run.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(write("extends: b.yaml\n"))
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        load_config(write("extends: gone.yaml\n"))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("output_dir: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_configuration_survives_yaml_and_json() -> None:
    config = RunConfig(seed=4, heads=HeadsConfig(layer=3))
    config.data.train = [SourceConfig("a.jsonl", weight=0.5)]
    assert build(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert build(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_hash_follows_every_value() -> None:
    config = RunConfig()
    first = config_hash(config)
    assert first == config_hash(RunConfig())
    config.heads.noise_residual.enabled = True
    assert config_hash(config) != first


def test_no_default_is_shared() -> None:
    RunConfig().train.trainable.append("lm_full")
    RunConfig().data.train.append(SourceConfig())
    assert "lm_full" not in RunConfig().train.trainable
    assert RunConfig().data.train == []


def test_every_shipped_yaml_loads(repo_root: Path) -> None:
    files = sorted(repo_root.glob("configs/train/*.yaml"))
    assert files
    for path in files:
        load_config(path)


@dataclass
class Ranges:
    sizes_hw: tuple[tuple[int, int], ...] = ((28, 28),)
    areas: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def test_tuples_and_mappings_are_filled_item_by_item() -> None:
    config = build(Ranges, {"sizes_hw": [[224, 196], [84, 84]], "areas": {"splice": [0, 0.5]}})
    assert config == Ranges(((224, 196), (84, 84)), {"splice": (0.0, 0.5)})
    with pytest.raises(ConfigError, match=r"'sizes_hw\[0\]' is \[224\]; expected a list of 2"):
        build(Ranges, {"sizes_hw": [[224]]})
    with pytest.raises(ConfigError, match=r"'sizes_hw' is 224; expected a list$"):
        build(Ranges, {"sizes_hw": 224})


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\ntrain: {max_steps: 2}\nseed: 3\n",
        "train:\n  max_steps: 2\n  max_steps: 3\n",
        "model: {path: a, path: b}\n",
    ],
)
def test_a_key_written_twice_is_named(tmp_path: Path, text: str) -> None:
    """PyYAML would take the last one in silence."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"the key '(seed|max_steps|path)' stands there twice; keep one.*line"):
        load_config(str(tmp_path / "c.yaml"))


def test_a_configuration_of_another_encoding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("# 训练\nseed: 1\n".encode("gbk"))
    with pytest.raises(ConfigError, match=r"is not UTF-8.*save it as UTF-8"):
        load_config(str(tmp_path / "c.yaml"))


def test_keys_that_an_anchor_brings_may_be_replaced(tmp_path: Path) -> None:
    nested = "a: {root: &root {x: 1}, base: &base {<<: *root, x: 2}}\nb: {<<: *base, y: 1}\n"
    (tmp_path / "d.yaml").write_text(nested)
    assert read_tree(tmp_path / "d.yaml")["b"] == {"x": 2, "y": 1}
