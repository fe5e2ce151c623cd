"""script/vision_{a,b,c}.sh: every flag becomes the key it names, mistakes are one line, help is in both languages."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from finetune.config import RunConfig, load_config
from finetune.training.checks import run_problems

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--epochs", "--batch_size", "--lr", "--val_ratio", "--data_root", "--train_ann", "--val_ann", "--clsA_dir",
    "--out_dir", "--model_path", "--evi_alpha", "--sparse_w", "--contrast_w", "--pos-weight", "--accelerate-config",
)  # fmt: skip


def script(stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "script" / f"vision_{stage}.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "tests")  # no runs/ there


def config_of(stage: str, *arguments: str) -> RunConfig:
    """The configuration that the script's command trains."""
    done = script(stage, *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    bash, launcher, config, *overrides = shlex.split(done.stdout)
    assert (bash, Path(launcher).name) == ("bash", "sft_llm.sh")
    return load_config(config, [word for word in overrides if "=" in word])


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What a stage leaves behind, as far as the script looks at it; the name needs quoting."""
    folder = tmp_path / "stage before: 'x'"
    for name in ("best", "best_val_auc"):
        (folder / name).mkdir(parents=True)
        (folder / name / "heads.safetensors").touch()
    return folder


def test_stage_a_takes_the_flags_users_know(tmp_path: Path) -> None:
    config = config_of(
        "a", "--epochs", "3", "--batch_size", "6", "--lr", "2e-4", "--train_ann", "it's.json", "--data_root", "/d: x",
        "--val_ratio", "0.25", "--out_dir", str(tmp_path), "--model_path", "models/3B", "--pos-weight", "2.5",
        "--no-balance", "data.max_pixels=50176",
    )  # fmt: skip
    train, data = config.train, config.data
    assert (train.epochs, train.max_steps, train.batch_size, train.learning_rate) == (3.0, -1, 6, 2e-4)
    assert [(source.path, source.root) for source in data.train] == [("it's.json", "/d: x")]
    assert (data.eval, data.val_ratio, data.class_balanced, data.max_pixels) == ([], 0.25, False, 50176)
    assert (config.output_dir, config.model.path, config.loss.cls_pos_weight) == (str(tmp_path), "models/3B", 2.5)
    assert run_problems(config) == []


@pytest.mark.parametrize("stage", ["b", "c"])
def test_later_stages_start_from_the_one_before(stage: str, trained: Path) -> None:
    config = config_of(
        stage, "--clsA_dir", str(trained), "--evi_alpha=0.7", "--sparse-w", "0.3", "--contrast_w", "0.2",
        "--train_ann", "t.json", "--val_ann", "v.json", "--data_root", "root",
    )  # fmt: skip
    assert config.model.path == str(trained / "best_val_auc")
    assert config.model.base is None  # the one that the folder names
    assert (config.loss.evidence, config.loss.sparsity, config.loss.contrast_region) == (0.7, 0.3, 0.2)
    assert [(s.path, s.root) for s in (*config.data.train, *config.data.eval)] == [
        ("t.json", "root"),
        ("v.json", "root"),
    ]
    assert config.data.val_ratio == 0
    assert run_problems(config) == []
    moved = config_of(stage, "--clsA_dir", str(trained / "best"), "--model_path", "elsewhere/3B")
    assert (moved.model.path, moved.model.base) == (str(trained / "best"), "elsewhere/3B")


def test_without_a_validation_file_a_tenth_is_set_aside() -> None:
    assert config_of("a", "--train_ann", "t.json").data.val_ratio == 0.1
    assert config_of("a").data.eval  # the configuration's own files where no annotation is given


def test_another_base_configuration() -> None:
    config = config_of("a", "--config", "configs/train/vision_a_tiny.yaml", "--epochs", "1")
    assert config.heads.vision_layers == [0, 1]
    assert config.train.max_steps == -1  # else the YAML's number of steps would win over --epochs


@pytest.mark.parametrize(
    ("stage", "arguments", "found"),
    [
        ("a", ["--epoch", "3"], "unknown option '--epoch'"),
        ("a", ["--epochs"], "--epochs needs a value"),
        ("a", ["--epochs", "three"], "--epochs is 'three', expected a number"),
        ("a", ["--evi_alpha", "1"], "stage A has not"),
        ("a", ["--clsA_dir", "x"], "stage A is the first one"),
        ("b", ["--clsA_dir", "nowhere"], "no heads.safetensors in nowhere"),
        ("c", ["--train_ann", "t", "--val_ann", "v", "--val_ratio", "0.1"], "exclude each other"),
        ("c", ["--val_ann", "v"], "need --train_ann"),
        ("a", ["--config", "nothing.yaml"], "no file"),
        ("b", ["stray"], "unknown argument 'stray'"),
        ("b", ["--out_dir", "--overwrite"], "--out_dir needs a value"),
        ("a", ["--train_ann", "--val_ann", "v"], "--train_ann needs a value"),
    ],
)
def test_a_mistake_is_said_in_one_line(stage: str, arguments: list[str], found: str) -> None:
    done = script(stage, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("==> error:")]
    assert len(errors) == 1
    assert found in errors[0]


def test_what_to_do_with_a_run_that_is_there_is_handed_on(tmp_path: Path) -> None:
    """Training itself refuses the folder (tests/training/test_output_folder.py)."""
    for way_out in ("--resume", "--overwrite"):
        done = script("a", "--out_dir", str(tmp_path), way_out, "--dry-run")
        assert way_out in shlex.split(done.stdout)
        assert config_of("a", "--out_dir", str(tmp_path), way_out).output_dir == str(tmp_path)


@pytest.mark.parametrize("stage", ["a", "b", "c"])
def test_help_names_every_flag_in_both_languages(stage: str) -> None:
    shown = script(stage, "--help").stdout
    expected = [
        f for f in FLAGS if stage != "a" or f not in ("--clsA_dir", "--evi_alpha", "--sparse_w", "--contrast_w")
    ]
    assert [flag for flag in expected if f"  {flag} " not in shown] == []
    assert "训练" in shown
    assert "learning rate" in shown
