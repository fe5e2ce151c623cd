"""An output folder is one run's: another one is refused, goes on with --resume, or moves what was there aside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.config import RunConfig, load_config
from finetune.errors import ConfigError
from finetune.training.output_folder import take_folder, take_folder_of_stages
from finetune.training.run import train

Make = Callable[..., RunConfig]
SHORT = {"train": {"max_steps": 1, "trainable": ["cls_head"], "trainer_args": {"disable_tqdm": True, "save_steps": 1}}}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_run_is_not_written_over(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line, with what the user keeps in the same folder."""
    out = tmp_path / "config"
    train(make_config(**SHORT))
    (out / "data").mkdir()
    for own in ("data/a.jsonl", "report.html"):
        (out / own).write_text("mine")
    command = ["train", "--config", str(tmp_path / "config.yaml")]
    before = names(out)
    assert {"run_record.json", "best", "checkpoint-1", "config.yaml", "history.json"} <= before
    monkeypatch.setattr("finetune.training.run.load_bundle", None)  # said before anything is loaded
    assert main([*command, "train.learning_rate=1e-5"]) == 2
    error = capsys.readouterr().err
    assert f"{out} holds a run already; add --resume to go on with it, --overwrite to start anew" in error
    assert main([*command, "--overwrite", "train.metric_for_best=eval_nothing"]) == 2  # a mistake moves nothing
    assert names(out) == before
    monkeypatch.undo()
    assert main([*command, "--overwrite", "train.learning_rate=1e-5"]) == 0
    assert f"the run in {out} is now in {out / 'earlier' / 'run-1'}" in capsys.readouterr().out
    assert {"run_record.json", "best", "checkpoint-1"} <= names(out / "earlier" / "run-1")
    assert "data" not in names(out / "earlier" / "run-1")
    assert json.loads((out / "run_record.json").read_text())["config"]["train"]["learning_rate"] == 1e-5
    assert (out / "data" / "a.jsonl").read_text() == (out / "report.html").read_text() == "mine"
    assert main([*command, "--resume", "train.learning_rate=1e-5"]) == 0
    assert names(out / "earlier") >= {"run-1"}


def begun(folder: Path, record: str) -> Path:
    folder.mkdir(parents=True)
    (folder / record).write_text("{}")
    return folder


def test_the_second_run_moved_aside_has_a_place_of_its_own(tmp_path: Path) -> None:
    config = load_config(None, [f"output_dir={tmp_path / 'run'}"])
    assert take_folder(config, overwrite=True) is None  # nothing there
    for number in (1, 2):
        begun(tmp_path / "run" / "best", "best.json")
        begun(tmp_path / "run" / "checkpoint-4", "trainer_state.json")
        (tmp_path / "run" / "run_record.json").touch()
        assert f"run-{number}" in str(take_folder(config, overwrite=True))
    assert names(tmp_path / "run") == {"earlier"} | {
        f"earlier/run-{n}{name}"
        for n in (1, 2)
        for name in ("", "/best", "/best/best.json", "/checkpoint-4", "/checkpoint-4/trainer_state.json",
                     "/run_record.json")
    }  # fmt: skip


@pytest.mark.parametrize("key", ["path", "adapter", "base"])
def test_the_model_to_start_from_is_not_moved(tmp_path: Path, key: str) -> None:
    best = begun(tmp_path / "run" / "best", "config.json")
    begun(tmp_path / "run" / "tiny", "config.json")
    (tmp_path / "run" / "run_record.json").touch()
    config = load_config(None, [f"output_dir={tmp_path / 'run'}", f"model.{key}={best}"])
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=rf"model\.{key} is .*best, which --overwrite would move"):
        take_folder(config, overwrite=True)
    assert names(tmp_path) == before
    beside = load_config(None, [f"output_dir={tmp_path / 'run'}", f"model.{key}={tmp_path / 'run' / 'tiny'}"])
    assert take_folder(beside, overwrite=True) is not None
    assert (tmp_path / "run" / "tiny" / "config.json").is_file()


def test_stages_and_a_run_without_do_not_share_a_folder(tmp_path: Path) -> None:
    """`best` of the stages would replace that of the run, and the other way round."""
    stages: dict[str, Any] = {"config": load_config(None, [f"output_dir={tmp_path / 'a'}"])}
    stages["stage_dirs"] = [str(tmp_path / "a" / "stage1")]
    begun(tmp_path / "a", "run_record.json")
    with pytest.raises(ConfigError, match="holds a run without stages; add --overwrite"):
        take_folder_of_stages(**stages, overwrite=False)
    assert take_folder_of_stages(**stages, overwrite=True) is not None
    assert take_folder_of_stages(**stages, overwrite=False) is None
    begun(tmp_path / "a" / "stage1", "stage.json")
    assert take_folder_of_stages(**stages, overwrite=False) is None  # goes on, or refuses, stage by stage
    with pytest.raises(ConfigError, match="holds a run already"):
        take_folder(stages["config"], overwrite=False)
    assert take_folder_of_stages(**stages, overwrite=True) is not None
    assert names(tmp_path / "a") == {
        "earlier", "earlier/run-1", "earlier/run-1/run_record.json",
        "earlier/run-2", "earlier/run-2/stage1", "earlier/run-2/stage1/stage.json",
    }  # fmt: skip


@pytest.mark.parametrize("other", ["--resume", "--stage=one"])
def test_overwrite_is_for_the_whole_run(make_config: Make, tmp_path: Path, other: str, capsys: Any) -> None:
    make_config(**SHORT)
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--overwrite", other]) == 2
    assert "--overwrite starts the whole run anew" in capsys.readouterr().err
