"""The generator's configuration: ready files, what wins over what, and mistakes named in one line."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli import main
from finetune.data.synthesis import SynthConfig
from finetune.data.synthesis.config import load_synth_config
from finetune.data.synthesis.conversations import RECORD_KINDS
from finetune.data.synthesis.operations import OperationSettings
from finetune.errors import ConfigError


def test_ready_configurations_load(repo_root: Path) -> None:
    folder = repo_root / "configs" / "data"
    default = load_synth_config(folder / "synth_default.yaml")
    assert default == SynthConfig()
    listed = yaml.safe_load((folder / "synth_default.yaml").read_text(encoding="utf-8"))
    assert set(listed) == {item.name for item in fields(SynthConfig)}
    assert set(listed["operation_settings"]) == {item.name for item in fields(OperationSettings)}
    instruct = load_synth_config(folder / "synth_instruct.yaml")
    assert set(instruct.record_kinds) == set(RECORD_KINDS)
    assert min(instruct.record_kinds.values()) > 0
    assert replace(instruct, record_kinds={}, language="zh", evidence_detail="short") == default


def test_options_win_over_overrides_and_overrides_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "synth.yaml"
    path.write_text("seed: 3\nnum_train: 5\noperation_settings: {area_ranges: {splice: [0.1, 0.2]}}\n")
    config = load_synth_config(path, ["num_train=6", "record_kinds.comparison=0.5"], {"num_train": 7, "num_eval": 1})
    assert (config.seed, config.num_train, config.num_eval) == (3, 7, 1)
    assert config.record_kinds == {"single": 1.0, "comparison": 0.5}
    ranges = config.operation_settings.area_ranges
    assert ranges["splice"] == (0.1, 0.2)
    assert ranges["erase"] == SynthConfig().operation_settings.area_ranges["erase"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_trian: 5", r"unknown key 'num_trian'.*did you mean 'num_train'\?"),
        ("operation_settings: {max_fether: 1}", r"unknown key 'operation_settings.max_fether'.*'max_feather'"),
        ("num_train: many", "'num_train' is 'many'.*expected int"),
        ("sizes_hw: [[224]]", r"'sizes_hw\[0\]' is \[224\]; expected a list of 2"),
        ("record_kinds: {dialogue: 1}", "record_kinds.*expected names of single"),
        ("image_format: tiff", "image_format is 'tiff', expected png or jpeg or webp"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "synth.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["synth", "--out", str(tmp_path / "set"), "--config", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    "bad",
    [
        {"num_train": 0, "num_eval": 0},
        {"tampered_fraction": 1.5},
        {"operations": {"paint": 1.0}},
        {"operations": {"splice": 0.0}},
        {"degradations": {"jpg": 1.0}},
        {"sizes_hw": ()},
        {"language": "fr"},
        {"record_kinds": {"single": 2.0}},
        {"record_kinds": {"single": 0.0}},
        {"record_kinds": {"comparison": -1.0}},
        {"metadata": "keep"},
        {"coordinates": "pixels"},
        {"image_quality": (95, 80)},
        {"evidence_detail": "long"},
        {"operation_settings": {"mask_convention": "source"}},
        {"operation_settings": {"area_ranges": {"splice": (0.3, 0.1)}}},
        {"operation_settings": {"feather": 1}},
    ],
)
def test_bad_configuration_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        SynthConfig(**bad)
