"""script/vision_eval.sh and vision_infer.sh: every flag sets the key it names, mistakes are one line, two languages."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from pathlib import Path

import pytest

from finetune.cli import build_parser
from finetune.config.vision_runs import VisionEvalConfig, VisionInferenceConfig, load_vision_config

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "script" / f"vision_{name}.sh"), *arguments], capture_output=True, text=True, check=False
    )


def parsed(name: str, *arguments: str) -> argparse.Namespace:
    """What the script's command means to the console script."""
    done = script(name, *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    program, *words = shlex.split(done.stdout)
    assert program == "forensics"
    return build_parser().parse_args(words)


def test_flags_of_the_evaluation_set_their_keys() -> None:
    found = parsed(
        "eval", "--model_path", "it's a base", "--head_checkpoint", "runs/c: x", "--lora=runs/lora",
        "--ann_eval", "e.json", "--data_root", "d",
        "--out_dir", "o", "--metrics_csv", "m.csv", "--cls_thr", "0.4", "--heat-thr", "0.6",
        "--batch_size", "3", "--num_workers", "2", "--tta", "flips", "--overwrite", "worst_cases=5",
    )  # fmt: skip
    config = load_vision_config(found.config, found.overrides, VisionEvalConfig)
    assert (config.base_model_path, config.head_checkpoint) == ("it's a base", "runs/c: x")
    assert (config.visual_lora.path, config.ann_eval, config.data_root) == ("runs/lora", "e.json", "d")
    assert (config.inference_output, config.metrics_csv) == ("o", "m.csv")
    assert (config.classification_threshold, config.heatmap_threshold) == (0.4, 0.6)
    assert (config.batch_size, config.num_workers, config.worst_cases) == (3, 2, 5)
    assert config.tta == "flips"
    assert found.overwrite


def test_flags_of_the_inspection_set_their_keys(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.jpg"
    odd.touch()
    found = parsed(
        "infer", "x y.jpg", "--csv", "r.csv", "--evidence_dir", "e", "--language", "en", "--seed", "7", "--no-explain",
        str(odd), "--tta", "hflip", "--chat", "overlay_as_second_image=true",
    )  # fmt: skip
    config = load_vision_config(found.config, found.overrides, VisionInferenceConfig)
    assert found.images == ["x y.jpg", str(odd)]
    assert (config.output.csv, config.output.evidence_dir) == ("r.csv", "e")
    assert (config.language, config.seed, config.explain, config.overlay_as_second_image) == ("en", 7, False, True)
    assert config.tta == "hflip"
    assert found.chat
    assert not found.overwrite


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("eval", ["--nothing", "3"], "unknown option '--nothing'"),
        ("eval", ["image.jpg"], "unknown argument 'image.jpg'"),
        ("eval", ["--chat"], "unknown option '--chat'"),
        ("eval", ["--heat_thr"], "--heat_thr needs a value"),
        ("infer", ["--ann_eval", "x"], "unknown option '--ann_eval'"),
        ("infer", ["--csv", ""], "--csv needs a value"),
    ],
)
def test_a_mistake_is_one_line(name: str, arguments: list[str], words: str) -> None:
    done = script(name, *arguments, "--dry-run")
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert words in error


@pytest.mark.parametrize("name", ["eval", "infer"])
def test_help_is_in_both_languages(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    for words in ("usage:", "--head_checkpoint", "配置文件", "阈值"):
        assert words in done.stdout
