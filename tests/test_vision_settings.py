"""`config_eval.json` and `config_inference.json`: the users' keys load in both spellings, mistakes are one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.vision_runs import VisionEvalConfig, VisionInferenceConfig, check_output, load_vision_config
from finetune.errors import ConfigError

EVAL_KEYS = {
    "base_model_path": "base",
    "visual_lora.path": "lora",
    "visual_lora.layers": [15, 23, 31],
    "head_checkpoint": "heads",
    "ann_eval": "eval.json",
    "data_root": "data",
    "metrics_csv": "m.csv",
    "inference_output": "out",
    "classification_threshold": 0.4,
    "heatmap_threshold": 0.6,
    "batch_size": 2,
    "num_workers": 3,
}
INFERENCE_KEYS = {
    "head_checkpoint": "heads",
    "system_prompt": "s",
    "chat_system_prompt": "c",
    "user_prompt": "u",
    "generation": {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9},
    "output.csv": "r.csv",
    "output.evidence_dir": "evidence",
}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "config.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def nested(tree: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        section, _, leaf = key.rpartition(".")
        (result.setdefault(section, {}) if section else result)[leaf] = value
    return result


def test_every_key_of_the_users_files_loads_nested_and_dotted(tmp_path: Path) -> None:
    flat = load_vision_config(write(tmp_path, EVAL_KEYS), [], VisionEvalConfig)
    assert flat == load_vision_config(write(tmp_path, nested(EVAL_KEYS)), [], VisionEvalConfig)
    assert (flat.visual_lora.path, flat.visual_lora.layers) == ("lora", [15, 23, 31])
    for key, value in EVAL_KEYS.items():
        if "." not in key:
            assert getattr(flat, key) == value
    one = load_vision_config(write(tmp_path, INFERENCE_KEYS), [], VisionInferenceConfig)
    assert one == load_vision_config(write(tmp_path, nested(INFERENCE_KEYS)), [], VisionInferenceConfig)
    assert (one.output.csv, one.generation.top_p, one.user_prompt) == ("r.csv", 0.9, "u")
    many = load_vision_config(write(tmp_path, INFERENCE_KEYS | {"user_prompt": ["a", "b"]}), [], VisionInferenceConfig)
    assert many.user_prompt == ["a", "b"]


def test_a_table_elsewhere_stays_where_it_was_asked_for(tmp_path: Path) -> None:
    for output, table, kept in (
        ("predictions.jsonl", "runs/keep/metrics.csv", True),
        ("out", "out/sub/m.csv", True),
        ("out", "out/m.csv", False),
        ("out/p.jsonl", "out/m.csv", False),
    ):
        path = write(tmp_path, EVAL_KEYS | {"inference_output": output, "metrics_csv": table})
        config = load_vision_config(path, ["inference_output=elsewhere"], VisionEvalConfig)
        assert config.metrics_csv == (table if kept else None), output


@pytest.mark.parametrize("value", ["runs/c/best/vision_lora", 5, ["x"], True])
def test_a_section_that_is_none_is_named(tmp_path: Path, value: Any) -> None:
    tree = {key: item for key, item in EVAL_KEYS.items() if not key.startswith("visual")} | {"visual_lora": value}
    with pytest.raises(ConfigError, match="visual_lora"):
        load_vision_config(write(tmp_path, tree), [], VisionEvalConfig)


def test_overrides_and_a_missing_lora(tmp_path: Path) -> None:
    path = write(tmp_path, EVAL_KEYS | {"visual_lora.path": None})
    config = load_vision_config(path, ["visual_lora.layers=[1]", "batch_size=7"], VisionEvalConfig)
    assert (config.visual_lora.path, config.visual_lora.layers, config.batch_size) == (None, [1], 7)
    tree = {key: value for key, value in EVAL_KEYS.items() if "visual" not in key} | {"visual_lora": None}
    assert load_vision_config(write(tmp_path, tree), [], VisionEvalConfig).visual_lora.path is None
    nothing = {"base_model_path": None, "metrics_csv": None}
    assert load_vision_config(write(tmp_path, EVAL_KEYS | nothing), [], VisionEvalConfig).base_model_path is None
    nothing = {"system_prompt": None, "chat_system_prompt": None, "user_prompt": None}
    assert load_vision_config(write(tmp_path, INFERENCE_KEYS | nothing), [], VisionInferenceConfig).user_prompt is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("{evidence}", "{evidence}"),
        ("Where: {boxes}", "Where: {boxes}"),
        ("[a, b]", ["a", "b"]),
        ("null", None),
        ("'{\"x\": 1}'", '{"x": 1}'),
    ],
)
def test_a_prompt_is_given_as_it_is(tmp_path: Path, text: str, meant: Any) -> None:
    path = write(tmp_path, INFERENCE_KEYS)
    assert load_vision_config(path, [f"user_prompt={text}"], VisionInferenceConfig).user_prompt == meant


@pytest.mark.parametrize("name", ["config_eval", "config_inference"])
def test_the_ready_files_load_and_name_only_existing_keys(repo_root: Path, name: str) -> None:
    schema = VisionEvalConfig if name == "config_eval" else VisionInferenceConfig
    path = repo_root / "configs" / "eval" / f"{name}.json"
    config = load_vision_config(path, [], schema)
    assert config.visual_lora.layers == [15, 23, 31]
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert set(tree) <= {field.name for field in dataclasses.fields(schema)}
    expected = EVAL_KEYS if name == "config_eval" else INFERENCE_KEYS
    for key in expected:
        node = tree
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clasification_threshold": 0.5}, ["clasification_threshold", "did you mean 'classification_threshold'"]),
        ({"visual_lora.layer": [1]}, ["visual_lora.layer", "did you mean 'layers'"]),
        ({"classification_threshold": 1.2}, ["classification_threshold", "1.2", "0 to 1"]),
        ({"heatmap_threshold": -0.1}, ["heatmap_threshold", "-0.1"]),
        ({"heatmap_threshold": float("nan")}, ["heatmap_threshold", "nan"]),
        ({"heatmap_threshold": "high"}, ["heatmap_threshold", "'high'"]),
        ({"batch_size": 0}, ["batch_size", "from 1 on"]),
        ({"num_workers": -1}, ["num_workers", "from 0 on"]),
        ({"head_checkpoint": ""}, ["head_checkpoint", "missing"]),
        ({"ann_eval": ""}, ["ann_eval", "missing"]),
        ({"visual_lora": {"path": "other"}}, ["visual_lora", "given twice", "keep one"]),
        ({"batch_size.x": 1}, ["batch_size", "no section"]),
        ({"max_pixels": -5}, ["max_pixels", "-5", "from 1 on"]),
        ({"max_pixels": 0}, ["max_pixels", "from 1 on"]),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_vision_config(write(tmp_path, EVAL_KEYS | change), [], VisionEvalConfig)
    for word in ["config.json", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generation": {"temperature": -1}}, ["generation.temperature"]),
        ({"generation": {"top_p": 0}}, ["generation.top_p"]),
        ({"generation": {"max_new_tokens": 0}}, ["generation.max_new_tokens"]),
        ({"min_region_area": 1.0}, ["min_region_area"]),
        ({"language": "fr"}, ["language", "zh, en"]),
        ({"explanation_batch_size": 0}, ["explanation_batch_size", "from 1 on"]),
    ],
)
def test_a_mistake_of_inference_is_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_vision_config(write(tmp_path, INFERENCE_KEYS | change), [], VisionInferenceConfig)
    for word in words:
        assert word in str(error.value)


def test_an_output_that_is_not_named(tmp_path: Path) -> None:
    config = load_vision_config(write(tmp_path, INFERENCE_KEYS | {"output.csv": ""}), [], VisionInferenceConfig)
    with pytest.raises(ConfigError, match=r"'output\.csv' is missing"):
        check_output(config)


@pytest.mark.parametrize("csv", ["out/results.jsonl", "out/run.json", "out/./overlays"])
def test_a_table_in_the_place_of_what_the_folder_holds(tmp_path: Path, csv: str) -> None:
    change = {"output.csv": csv, "output.evidence_dir": "out"}
    config = load_vision_config(write(tmp_path, INFERENCE_KEYS | change), [], VisionInferenceConfig)
    with pytest.raises(ConfigError, match=r"in the evidence folder, which has files of its own"):
        check_output(config)
    config.output.csv = "out/results.csv"
    check_output(config)


HEADS, LORA = "runs/c/best", "runs/c/best/vision_lora"


@pytest.mark.parametrize(
    ("overrides", "heads", "lora"),
    [
        ([], HEADS, LORA),
        (["head_checkpoint=runs/b/best"], "runs/b/best", None),
        (["head_checkpoint=runs/b/best", "visual_lora.path=x"], "runs/b/best", "x"),
        (["head_checkpoint=runs/b/best", f"visual_lora={{path: {LORA}}}"], "runs/b/best", LORA),
        (["visual_lora=null"], HEADS, None),
    ],
)
def test_the_lora_goes_with_the_heads_it_lies_beside(
    tmp_path: Path, overrides: list[str], heads: str, lora: str | None
) -> None:
    """So the scripts' --head_checkpoint evaluates stage B with the file that names stage C."""
    for named in (HEADS, f"{HEADS}/heads.safetensors"):
        tree = {**EVAL_KEYS, "head_checkpoint": named, "visual_lora.path": LORA, "visual_lora.layers": [15]}
        config = load_vision_config(write(tmp_path, tree), overrides, VisionEvalConfig)
        assert config.head_checkpoint == (named if heads == HEADS else heads)
        assert config.visual_lora.path == lora
        assert lora or config.visual_lora.layers is None
    apart = {**EVAL_KEYS, "head_checkpoint": HEADS, "visual_lora.path": "runs/other/vision_lora"}
    config = load_vision_config(write(tmp_path, apart), ["head_checkpoint=runs/b/best"], VisionEvalConfig)
    assert config.visual_lora.path == "runs/other/vision_lora"  # asked for whatever the heads


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"batch_size": 1,}', ["not valid JSON", "line 1"]),
        ("[1]", ["expected an object"]),
        ('{"batch_size": 1, "batch_size": 2}', ["'batch_size'", "twice"]),
    ],
)
def test_a_file_that_is_no_settings_object(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_vision_config(write(tmp_path, text), [], VisionEvalConfig)
    for word in words:
        assert word in str(error.value)
    with pytest.raises(ConfigError, match=r"gone\.json does not exist"):
        load_vision_config(tmp_path / "gone.json", [], VisionEvalConfig)


@pytest.mark.parametrize(
    ("overrides", "folder", "file"),
    [
        ([], "runs/a", "runs/a/metrics.csv"),
        (["inference_output=runs/b"], "runs/b", None),
        (["inference_output=runs/b", "metrics_csv=runs/m.csv"], "runs/b", "runs/m.csv"),
        (["heatmap_threshold=0.4"], "runs/a", "runs/a/metrics.csv"),
        (["inference_output=runs/b", "metrics_csv=runs/a/metrics.csv"], "runs/b", "runs/a/metrics.csv"),
        (["inference_output=runs/b/p.csv"], "runs/b/p.csv", None),
    ],
)
def test_the_table_goes_with_the_folder_it_lies_in(
    tmp_path: Path, overrides: list[str], folder: str, file: str | None
) -> None:
    tree = {**EVAL_KEYS, "inference_output": "runs/a", "metrics_csv": "runs/a/metrics.csv"}
    config = load_vision_config(write(tmp_path, tree), overrides, VisionEvalConfig)
    assert (config.inference_output, config.metrics_csv) == (folder, file)
    apart = {**tree, "metrics_csv": "tables/m.csv"}
    assert load_vision_config(write(tmp_path, apart), overrides, VisionEvalConfig).metrics_csv is not None


def test_the_table_goes_with_a_folder_named_by_its_predictions(tmp_path: Path) -> None:
    tree = {**EVAL_KEYS, "inference_output": "runs/a/p.csv", "metrics_csv": "runs/a/metrics.csv"}
    config = load_vision_config(write(tmp_path, tree), ["inference_output=runs/b/p.csv"], VisionEvalConfig)
    assert config.metrics_csv is None
