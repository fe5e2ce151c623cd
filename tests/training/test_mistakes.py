"""A user's mistake is one line on stderr and exit status 2, before any training, through the door `sft_llm.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli import train_main
from finetune.config import RunConfig, SourceConfig
from finetune.data.template import load_template
from finetune.errors import ConfigError, DataFormatError, ModelLoadError
from finetune.training.checks import check_run, run_problems
from finetune.training.doctor import check_config
from finetune.training.run import build_trainer, train


def launch(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        train_main(["--config", str(path), *overrides])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def write_records(path: Path, synth_dir: Path, **changes: Any) -> Path:
    """The first two training records with absolute paths; the second one changed."""
    records = [json.loads(line) for line in (synth_dir / "train.jsonl").read_text().splitlines()[:2]]
    for record in records:
        record["images"] = [str(synth_dir / name) for name in record["images"]]
        record["masks"] = [str(synth_dir / name) if "." in str(name) else name for name in record["masks"]]
    records[1].update(changes)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.trainable=[cls_haed]", "train.trainable names 'cls_haed'; did you mean 'cls_head'?"),
        ("train.metric_for_best=eval_aurok", "train.metric_for_best is 'eval_aurok'; did you mean 'eval_auroc'?"),
        ("data.train=[]", "data.train is empty"),
        ("data.train=[nowhere.jsonl]", "nowhere.jsonl"),
        ("model.path=./no_such_model", "model folder './no_such_model' does not exist"),
        ("train.learning_rat=1", "unknown key 'train.learning_rat'"),
        ("train.trainer_args={optim: adamm}", "adamm"),
        ("train={trainer_args: {optim: sgd}, muon_groups: [cls_head], trainable: [cls_head]}", "needs AdamW"),
        ("train.trainer_args={warmup_step: 3}", "did you mean 'warmup_steps'?"),
        ("train.trainable=[lm_lora, lm_full]", "choose one"),
        ("lora.target_modules=nothing", "matches no linear layer"),
        ("data.max_length=20", "too many tokens"),
        ("train.resume=runs/none", "train.resume is 'runs/none'"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    override: str, expected: str, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trainable = ["new_tokens", "lm_lora"] if override.startswith("lora") else ["cls_head"]
    path = write_config(train={"trainable": trainable})
    status, out, err = launch(capsys, path, override)
    assert status == 2, err
    assert expected in err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "loss" not in out  # nothing was trained
    assert not list((tmp_path / "config").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": [2]}, "2"),
        ({"images": ["missing.png"]}, "missing.png"),
        ({"masks": ["missing_mask.png"], "labels": [1]}, "missing_mask.png"),
    ],
)
def test_bad_record_is_named(
    changes: dict[str, Any],
    expected: str,
    write_config: Callable[..., Path],
    synth_dir: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for split in ("train", "eval"):
        data = write_records(tmp_path / f"{split}.jsonl", synth_dir, **changes)
        status, _, err = launch(capsys, write_config(), f"data.{split}=[{data}]")
        assert status == 2
        assert "train-000001" in err
        assert expected in err
        assert "Traceback" not in err


def test_an_auroc_needs_both_classes(
    write_config: Callable[..., Path], synth_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = [line for line in (synth_dir / "train.jsonl").read_text().splitlines() if json.loads(line)["labels"] == [0]]
    path = tmp_path / "only_real.jsonl"
    path.write_text("\n".join(real[:2]) + "\n", encoding="utf-8")
    data = f"data.eval=[{{path: {path}, root: {synth_dir}}}]"
    status, _, error = launch(capsys, write_config(), "train.metric_for_best=eval_auroc", data)
    assert status == 2
    assert "all labelled images of data.eval are real" in error
    status, _, error = launch(capsys, write_config(), "train.best_folders={best_val_auc: eval_auroc}", data)
    assert status == 2
    assert "train.best_folders.best_val_auc is eval_auroc" in error


@pytest.mark.slow
def test_launched_as_a_process(repo_root: Path, write_config: Callable[..., Path]) -> None:
    command = [sys.executable, str(repo_root / "sft_llm.py"), "--config", str(write_config())]
    done = subprocess.run(
        [*command, "train.early_stopping_patience=0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr == "error: train.early_stopping_patience is 0; expected 1 or more, or null\n"


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("train", {"trainable": []}, "train.trainable is empty"),
        ("train", {"group_learning_rates": {"lm_full": 1e-4}}, "'lm_full', which does not train"),
        ("train", {"muon_groups": ["noise_residul"]}, "train.muon_groups names 'noise_residul', which does not train"),
        ("train", {"muon_learning_rate": -0.02}, "train.muon_learning_rate is -0.02"),
        ("train", {"group_learning_rates": {"cls_head": -1.0}}, "group_learning_rates.cls_head is -1.0"),
        ("train", {"batch_size": 0}, "train.batch_size is 0"),
        ("train", {"eval_steps": 0}, "train.eval_steps is 0"),
        ("train", {"learning_rate": float("nan")}, "train.learning_rate is nan"),
        ("train", {"warmup_ratio": 10.0}, "train.warmup_ratio is 10.0"),
        ("train", {"max_steps": 0}, "train.max_steps is 0"),
        ("train", {"epochs": 0.0}, "train.epochs is 0.0"),
        ("train", {"max_seconds": 0.0}, "train.max_seconds is 0.0"),
        ("train", {"early_stopping_patience": 3}, "needs data.eval"),
        ("loss", dict.fromkeys(("text", "focal", "dice", "boundary", "authentic", "contrast_region"), 0.0), "is 0"),
        ("loss", {"operation_authentic_weight": -0.3}, "loss.operation_authentic_weight is -0.3"),
        ("loss", {"focal_alpha": 2.0}, "loss.focal_alpha is 2.0; expected a weight of tampered images from 0 to 1, or"),
        ("loss", {"focal_gamma": -1.0}, "loss.focal_gamma is -1.0"),
        ("data", {"num_workers": -1}, "data.num_workers is -1"),
        ("data", {"max_eval_samples": 0}, "data.max_eval_samples is 0; expected at least 1, or null"),
        ("data", {"max_pixels": 100}, "data.max_pixels is 100; expected at least data.min_pixels, 3136"),
        ("data", {"train": [SourceConfig("a.jsonl", weight=float("nan"))]}, "weight of a.jsonl is nan"),
        ("data", {"eval": [SourceConfig("a.jsonl", weight=float("inf"))]}, "weight of a.jsonl is inf"),
        ("lora", {"r": 0}, "lora.r is 0; expected at least 1"),
        ("lora", {"dropout": 2.0}, "lora.dropout is 2.0; expected a share from 0 to below 1"),
        ("vision_lora", {"alpha": 0}, "vision_lora.alpha is 0"),
        ("train", {"report_to": ["tensorboard", "foo"]}, "train.report_to names 'foo'; choose from: all, "),
        ("", {"seed": -1}, "seed is -1; expected a whole number from 0"),
        ("", {"seed": 2**40}, "seed is 1099511627776"),
        ("loss", {"operation": 0.5}, "loss.operation is 0.5, but heads.operations names none"),
    ],
)
def test_every_problem_is_found(section: str, values: dict[str, Any], expected: str) -> None:
    config = RunConfig()
    assert run_problems(config) == []
    for name, value in values.items():
        setattr(getattr(config, section) if section else config, name, value)
    problems = run_problems(config)
    assert len(problems) == 1
    assert expected in problems[0]
    assert "\n" not in problems[0]


def test_template_without_tokens_is_refused_unless_the_heads_are_off(tmp_path: Path) -> None:
    """Such a run would train no head and say nothing; a text-only model wants just that."""
    tree = load_template("zh").to_dict()
    del tree["name"]
    tree["answers"]["tokens_first"] = "{result}: {evidence}"
    path = tmp_path / "report.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    config = RunConfig()
    config.data.template = str(path)
    (problem,) = run_problems(config)
    assert f"data.template {path}: answers.tokens_first holds no forensic token; expected {{tokens}}, once" in problem
    with pytest.raises(ConfigError, match=r"answers\.tokens_first holds no forensic token"):
        check_run(config)
    config.heads.enabled = False
    assert run_problems(config) == []


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_of_a_loss_is_a_number_from_zero_on(value: float) -> None:
    config = RunConfig()
    config.loss.dice = value
    assert any(
        "loss.dice is" in problem and "expected a weight from 0 on" in problem for problem in run_problems(config)
    )
    config.loss.dice = 0.0
    assert not any("loss.dice" in problem for problem in run_problems(config))


def test_evaluating_on_training_pictures_is_said(
    make_config: Callable[..., RunConfig], synth_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A line copied in the YAML would give a perfect figure that is worth nothing; by the doctor and by training."""
    same = [{"path": str(synth_dir / "train.jsonl"), "root": str(synth_dir)}]
    for sources, is_said in ((same, True), (None, False)):
        config = make_config("c", **({"data": {"eval": sources}} if sources else {}))
        warnings = [problem.message for problem in check_config(config) if problem.severity == "warning"]
        assert any("pictures of data.eval are also in data.train" in warning for warning in warnings) is is_said
        caplog.clear()
        build_trainer(config)
        assert ("pictures of data.eval are also in data.train" in caplog.text) is is_said


def test_a_wrong_data_path_is_known_before_the_model_is_loaded(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a 7B model a minute later, and without a network after two minutes of asking the hub."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("finetune.training.run.load_bundle", never)
    for part in ("train", "eval"):
        with pytest.raises(DataFormatError, match=r"nowhere\.jsonl\): data file not found"):
            train(make_config("c", data={part: ["nowhere.jsonl"]}))


def test_a_model_with_other_tokens_than_the_configuration_asks_for(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Refused by training and by the doctor alike, who would otherwise advise what is set already."""
    trained = make_config("first", output_dir=str(tmp_path / "first"), train={"max_steps": 1})
    train(trained)
    config = make_config("c", [f"model.path={tmp_path}/first/best", "tokens.num_mask=9", "train.max_steps=1"])
    with pytest.raises(
        ModelLoadError, match=r"its heads stand on the tokens .* asks for tokens: .*num_mask: 9"
    ) as caught:
        train(config)
    assert str(caught.value) in [problem.message for problem in check_config(config)]
