"""The shape of the model to be trained, from every spelling of config.json and from names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config import RunConfig, load_config
from finetune.errors import ConfigError
from finetune.models.qwen_forensics_model import QwenForensicsConfig
from finetune.models.shapes import RELEASED, VISION, released_shape
from finetune.training.planned_model import meta_model, planned_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "train" / "stage1_3b.yaml"


def config_of(path: str | Path, *overrides: str) -> RunConfig:
    return load_config(CONFIG, [f"model.path={path}", *overrides])


def write(folder: Path, tree: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """As the releases spell it: the language model's keys beside the others, no `text_config`."""
    text = {key: value for key, value in RELEASED["3B"].items() if key != "tie_word_embeddings"}
    vision = {**{key: value for key, value in VISION.items() if key != "patch_size"}, "out_hidden_size": 2048}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    own = {"model_type": "qwen2_5_vl", "tie_word_embeddings": True, "rope_scaling": rope, "torch_dtype": "bfloat16"}
    return write(tmp_path / "published", {**text, **own, "vision_config": vision})


def test_every_spelling_is_one_model(published: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    QwenForensicsConfig.from_pretrained(published).save_pretrained(again)
    for path in (published, again, "Qwen/Qwen2.5-VL-3B-Instruct"):
        planned = planned_config(config_of(path))
        assert planned is not None, path
        assert planned.text_config.num_hidden_layers == 36, path
        assert planned.text_config.vocab_size == 151936, path
        assert planned.vision_config.out_hidden_size == 2048, path
        assert planned.tie_word_embeddings is planned.text_config.tie_word_embeddings is True, path
        assert len(planned.mask_token_ids) == 32, path
    counts = [sum(p.numel() for p in meta_model(config_of(path)).parameters()) for path in (published, again)]
    assert counts[0] == counts[1] > 3e9


def test_heads_are_those_asked_for_and_language_as_in_training(published: Path) -> None:
    planned = planned_config(config_of(published, "heads.num_layers=3"))
    assert planned is not None
    assert planned.heads_config.num_layers == 3
    assert planned.has_language
    left_out = planned_config(config_of(published, "model.language=skip"))
    assert left_out is not None
    assert not left_out.has_language
    with pytest.raises(ConfigError, match=r"heads\.source: tokens reads the language model, which is left out"):
        meta_model(config_of(published, "model.language=skip"))


@pytest.mark.parametrize("text", ['{"a": ', "[]", '"x"', "null", '{"vision_config": {"depth": "many"}}'])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be used") as caught:
        planned_config(config_of(write(tmp_path / "odd", text)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 28), ("models/Qwen2.5-VL-3B_sft/", 36), ("qwen2.5-vl-3b", 36),
        ("/data/3b/Qwen2.5-VL-72B-Instruct", None), ("exp3b", None), ("org/v1.3B", None), ("org/model", None),
    ],
)  # fmt: skip
def test_sizes_in_names(name: str, layers: int | None) -> None:
    found = released_shape(name)
    assert (None if found is None else found["text_config"]["num_hidden_layers"]) == layers


def test_a_folder_is_not_judged_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "Qwen2.5-VL-3B-adapter").mkdir()
    assert planned_config(config_of(tmp_path / "Qwen2.5-VL-3B-adapter")) is None
