"""The command line: quick help, exit codes, and one line instead of a traceback for every user's mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.cli import build_parser, main
from finetune.models.tiny import _FILES

VERBS = (
    "train",
    "precompute",
    "predict",
    "chat",
    "merge",
    "evaluate",
    "doctor",
    "preview",
    "audit",
    "tiny",
    "synth",
    "vision",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_help_is_quick_and_names_every_verb() -> None:
    """Under half a second: the best of three, so that a busy machine does not decide."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert min(seconds) < 0.5
    for verb in VERBS:
        assert re.search(rf"^    {verb}( |$)", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("verb", [*VERBS, "vision evaluate", "vision infer", "vision annotate"])
def test_help_of_each_verb_imports_nothing_heavy(verb: str) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'numpy', 'cv2')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "from finetune.cli import build_parser\n"
        f"build_parser().parse_args([*{verb.split()}, '--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config", "missing.yaml"], ["missing.yaml", "does not exist"]),
        (["train", "--config", "configs/train/quickstart.yaml", "train.max_step=3"], ["train.max_step", "max_steps"]),
        (["train", "--config", "configs/train/quickstart.yaml", "model.path=no/such/folder"], ["no/such/folder"]),
        (["predict", "no.png", "--model", "nowhere/best"], ["no.png", "does not exist"]),
        (["evaluate", "--model", "nowhere/best", "--data", "no.json", "--out", "out"], ["no.json", "not found"]),
        (["doctor", "--data", "no.jsonl"], ["no.jsonl", "not found"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_never_a_traceback(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(repo_root)
    if arguments[0] == "train":  # runs/quickstart is there where somebody has run the quick start
        arguments = [*arguments, f"output_dir={tmp_path}/run"]
    status = main(arguments)
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("verb", "option", "name"),
    [
        ("train --config c.yaml", "--resume", "overrides"),
        ("doctor --config c.yaml", "--num-mask 8", "overrides"),
        ("synth --out d", "--overwrite", "overrides"),
        ("prepare --config c.yaml", "--overwrite", "overrides"),
        ("audit", "--out d", "data"),
        ("predict --model m", "--no-text", "images"),
    ],
)
def test_values_may_stand_before_and_behind_an_option(verb: str, option: str, name: str) -> None:
    for order in (f"a=1 b=2 {option}", f"{option} a=1 b=2", f"a=1 {option} b=2"):
        arguments = build_parser().parse_args(f"{verb} {order}".split())
        assert getattr(arguments, name) == ["a=1", "b=2"]
        assert getattr(arguments, option.split()[0].lstrip("-").replace("-", "_"))


@pytest.mark.parametrize("verb", ["train --config c.yaml", "synth --out d", "prepare --config c.yaml"])
def test_without_values_the_list_is_empty_and_a_mistyped_option_is_refused(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_parser().parse_args(verb.split()).overrides == []
    for words, message in ((f"{verb} a=1 --overwritten", "--overwritten"), (verb.split()[0], "required")):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args(words.split())
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1.5", "-0.1", "x", "nan"])
def test_a_threshold_outside_0_1_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["predict", "a.png", "--model", "m", "--threshold", value])
    assert stop.value.code == 2
    assert "between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--batch-size", "0"], ["--max-new-tokens", "-1"], ["--batch-size", "two"]],
)
def test_a_count_below_one_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["predict", "a.png", "--model", "m", *arguments])
    assert stop.value.code == 2
    assert "no whole number above 0" in capsys.readouterr().err


def test_an_untrained_model_gives_no_verdict(
    tiny_dir: Path, photo_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random heads would print scores that look like any others."""
    assert main(["predict", str(photo_records.parent / "a.png"), "--model", str(tiny_dir)]) == 2
    assert "no trained heads" in capsys.readouterr().err


def test_every_unreadable_image_of_a_folder_is_named_first(
    saved_model: Path, photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photo_records.parent / "a.png").read_bytes()
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[:300])
    (tmp_path / "text.jpg").write_text("no picture")
    arguments = ["predict", str(tmp_path), "--model", str(saved_model), "--no-text", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "2 of 3 images cannot be read" in error
    assert "cut.png" in error
    assert "text.jpg" in error
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_is_told_from_its_model(
    photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "best").mkdir()
    assert main(["predict", str(photo_records.parent / "a.png"), "--model", str(tmp_path)]) == 2
    assert f"not of a model; give {tmp_path / 'best'}" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(
    saved_model: Path, photo_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(photo_records.parent / "a.png"), "--model", str(saved_model), "--device", "cuda:99"]
    assert main(arguments) == 2
    assert "--device cuda:99" in capsys.readouterr().err


def test_overrides_without_a_config_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "heads.layer=1"]) == 2
    assert "needs --config" in capsys.readouterr().err


def test_doctor_finds_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every bad input of the list: one line each with record, value and what to do; exit status 1."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "good.png")
    image.save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:600])
    Image.new("L", (30, 30)).save(tmp_path / "small.png")
    ask = {"role": "user", "content": "<image>真伪?"}

    def answer(text: str) -> list[dict[str, str]]:
        return [ask, {"role": "assistant", "content": text}]

    records = [
        {"id": "fine", "images": ["good.png"], "labels": [0]},
        {"id": "gone", "images": ["gone.png"], "labels": [0]},
        {"id": "cut", "images": ["cut.jpg"], "labels": [0]},
        {"id": "size", "images": ["good.png"], "labels": [1], "masks": ["small.png"]},
        {"id": "token", "images": ["good.png"], "messages": answer("<mask_40>x")},
        {"id": "count", "images": ["good.png"], "messages": answer("<cls><mask_1><mask_2>x")},
        {"id": "label", "images": ["good.png"], "labels": [2]},
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    assert main(["doctor", "--data", str(data)]) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    for name in ("gone", "cut", "size", "token", "count", "label"):
        assert sum(f"'{name}'" in line for line in errors) >= 1, name
    assert not any("'fine'" in line for line in errors)
    assert "fix:" in "".join(errors)


@pytest.mark.parametrize("verb", ["doctor", "train"])
@pytest.mark.parametrize("setting", ["tokens.num_mask=0", "tokens.num_cls=0"])
def test_a_vocabulary_without_tokens_is_one_line(verb: str, setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--config", "configs/train/quickstart.yaml", setting]) in (1, 2)
    captured = capsys.readouterr()
    assert setting.split("=")[0] in captured.out + captured.err
    assert "Traceback" not in captured.err


def test_doctor_on_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert main(["doctor", "--data", str(empty)]) == 1
    assert "error:" in capsys.readouterr().err


def test_doctor_prints_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "gpu" in printed


def test_tiny_and_synth_write_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--out", str(tmp_path / "tiny")]) == 0
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    arguments = ["synth", "--out", str(tmp_path / "data"), "--num-train", "4", "--num-val", "2", "--num-eval", "2"]
    assert main([*arguments, "--workers", "1"]) == 0
    for name in ("train.jsonl", "val.jsonl", "eval.jsonl", "eval_annotations.json", "manifest.json"):
        assert (tmp_path / "data" / name).is_file()
    assert main([*arguments, "--workers", "1"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_tiny_replaces_a_tiny_model_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny"
    assert main(["tiny", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == _FILES
    before = (out / "model.safetensors").read_bytes()
    assert main(["tiny", "--out", str(out), "--seed", "1"]) == 0
    after = (out / "model.safetensors").read_bytes()
    assert after != before
    (out / "forensics.json").write_text("{}")  # as beside a trained model
    assert main(["tiny", "--out", str(out)]) == 2
    assert "holds 'forensics.json', which is no part of a tiny model" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == after
    (out / "forensics.json").unlink()
    with (out / "model.safetensors").open("r+b") as stream:
        stream.truncate(100 * 2**20)
    assert main(["tiny", "--out", str(out)]) == 2
    assert "holds 'model.safetensors'" in capsys.readouterr().err
    assert main(["tiny", "--out", str(out / "config.json")]) == 2
    assert "is a file" in capsys.readouterr().err
