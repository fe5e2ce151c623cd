"""Resuming: the same losses as without the interruption, and no checkpoint that looks complete and is not.

Runs are really killed (`kill -9` on a process), disks are really full (a size limit of the system on written files).
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from child_process import At, killed_at, killed_while_saving, run_in_child
from safetensors.torch import load_file

from finetune.cli import main
from finetune.config import RunConfig
from finetune.data.region_masking import RegionMasking
from finetune.errors import CheckpointError, ForensicsError
from finetune.training import run
from finetune.training.checkpoint import MANIFEST, STAGING, checkpoint_problem, checkpoints, resume_point
from finetune.training.run import build_trainer, train
from finetune.training.stages import run_stage

Make = Callable[..., RunConfig]
LORA = ["new_tokens", "cls_head", "mask_head", "noise_residual", "lm_lora"]
TIMES = ("runtime", "per_second", "seconds", "memory")


def section(**changes: Any) -> dict[str, Any]:
    """Ten steps, epochs of six; saved every two, logged every three, evaluated every four; with dropout."""
    trainer_args = {"disable_tqdm": True, "save_steps": 2}
    train = {"trainable": LORA, "max_steps": 10, "eval_steps": 4, "logging_steps": 3, "trainer_args": trainer_args}
    return {
        "train": {**train, **changes},
        "lora": {"r": 4, "dropout": 0.2},
        "heads": {"dropout": 0.1},
        "data": {"max_eval_samples": 4},
    }


def numbers(out_dir: str | Path) -> list[dict[str, float]]:
    """Every logged number that does not measure time."""
    history = json.loads(Path(out_dir, "history.json").read_text())
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMES)} for entry in history]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, synth_dir: Path, write_small: Callable[..., Path]
) -> Path:
    """The folder of an uninterrupted run of `section()`."""
    from conftest import merge

    from finetune.config import load_config

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    data = {split: [str(synth_dir / f"{split}.jsonl")] for split in ("train", "eval")}
    changes = merge(section(), {"output_dir": str(out), "model": {"path": str(tiny_dir)}, "data": data})
    train(load_config(write_small(out.with_suffix(".yaml"), **changes)))
    return out


def test_killed_twice_ends_bit_equal_to_the_uninterrupted_run(whole: Path, make_config: Make) -> None:
    """Killed in the middle of step 6, then while checkpoint-8 is being written; every logged number is the same."""
    config = make_config("killed", **section(resume="auto"))
    assert run_in_child(killed_at("on_pre_optimizer_step", 5), config) == -signal.SIGKILL
    assert [path.name for path in checkpoints(config.output_dir)] == ["checkpoint-2", "checkpoint-4"]
    assert run_in_child(killed_while_saving(8), config) == -signal.SIGKILL
    assert [path.name for path in checkpoints(config.output_dir)] == ["checkpoint-4", "checkpoint-6"]
    assert Path(config.output_dir, STAGING, "checkpoint-8", "trainer_state.json").is_file()
    train(config)
    assert numbers(config.output_dir) == numbers(whole)
    assert {path.name for path in Path(config.output_dir).iterdir()} == {path.name for path in whole.iterdir()}
    for folder in ("checkpoint-10", "best"):
        ours, theirs = (load_file(Path(out, folder, "adapter_model.safetensors")) for out in (config.output_dir, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), folder


@pytest.mark.slow
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_evaluate", "on_save"])
@pytest.mark.parametrize("step", [4, 7])
def test_killed_at_any_moment(whole: Path, make_config: Make, event: str, step: int) -> None:
    step = step if event in ("on_step_begin", "on_step_end") else 8
    config = make_config("killed", **section(resume="auto"))
    assert run_in_child(killed_at(event, step), config) == -signal.SIGKILL
    train(config)
    assert numbers(config.output_dir) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"class_balanced": False, "max_eval_samples": 4}},
        {"data": {"num_workers": 2, "max_eval_samples": 4}},
        {"train": section(batch_size=1, gradient_accumulation_steps=3)["train"]},
        {"train": section(trainable=["cls_head", "mask_head", "noise_residual", "lm_full", "vision_full"])["train"]},
        {"train": section(early_stopping_patience=1, max_steps=12, eval_steps=2)["train"]},
        {"train": section(gradient_checkpointing=True)["train"]},
    ],
    ids=["shuffled", "workers", "accumulated", "full", "early_stop", "checkpointing"],
)
def test_other_runs_resume_bit_equal(make_config: Make, changes: dict[str, Any]) -> None:
    settings = {**section(), **changes}
    uninterrupted = make_config("uninterrupted", **settings)
    train(uninterrupted)
    config = make_config("killed", **{**settings, "train": {**settings["train"], "resume": "auto"}})
    assert run_in_child(killed_at("on_pre_optimizer_step", 3), config) == -signal.SIGKILL
    train(config)
    assert numbers(config.output_dir) == numbers(uninterrupted.output_dir)


@pytest.mark.slow
def test_killed_stage_with_masking_and_attacks_ends_bit_equal(make_config: Make) -> None:
    """All that moves over a run at once: the second of two stages, regions masked more and more, attacked batches."""
    moving = {
        "region_masking": {"enabled": True, "begin": 0.0, "finish": 1.0, "start_share": 0.1, "end_share": 0.6},
        "adversarial": {"share": 0.5, "steps": 2, "method": "pgd", "target": "features", "radius": 0.1},
    }
    first = {"name": "first", "train": {"max_steps": 2, "trainable": LORA[:-1]}}
    settings = {**section(logging_steps=1), "stages": [first, {"name": "second", **moving}]}
    outs = {name: make_config(name, **settings) for name in ("uninterrupted", "killed")}

    def killed_body(config: RunConfig) -> None:
        build = run.build_trainer

        def building(config: RunConfig) -> Any:
            built = build(config)
            built[0].add_callback(At("on_pre_optimizer_step", 7, signal.SIGKILL))
            return built

        run.build_trainer = building
        run_stage(config, "second")

    for name, config in outs.items():
        assert run_stage(config, "first") == 0
        if name == "killed":
            assert run_in_child(killed_body, config) == -signal.SIGKILL
            assert checkpoints(Path(config.output_dir, "stage2"))[-1].name == "checkpoint-6"
        assert run_stage(config, "second") == 0
    ours, theirs = (Path(outs[name].output_dir, "stage2") for name in ("killed", "uninterrupted"))
    assert numbers(ours) == numbers(theirs)
    logged = [entry for entry in numbers(ours) if "adversarial_gain" in entry]
    assert logged[-1]["step"] > 7
    one, two = (load_file(out / "checkpoint-10" / "adapter_model.safetensors") for out in (ours, theirs))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# ---- no hidden source of chance ----


@pytest.mark.parametrize("changes", [{}, {"layout": "text_first"}, {"class_balanced": False}])
def test_samples_and_batches_draw_from_no_global_generator(
    make_config: Make, mixed_records: Path, changes: dict[str, Any]
) -> None:
    """A resumed run passes over the batches that were seen: a draw while they are made would be missing from then on.

    So the generators are as before after every sample and batch, and a sample does not depend on where they stand.
    """
    data = {"train": [str(mixed_records)], "eval": [], "template": "zh", **changes}
    masking = {"enabled": True, "start_share": 0.5, "probability": 1.0, "fill": "noise"}
    config = make_config(data=data, region_masking=masking)
    trainer = build_trainer(config)[0]
    draws = list(trainer._get_train_sampler())
    trainer.train_dataset.region_masking = RegionMasking(config.region_masking, config.seed, len(draws))
    found = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states = global_states()
        samples = []
        for draw in draws:
            samples.append(trainer.train_dataset[draw])
            assert global_states() == states, f"record {samples[-1].record_id}: made with a global generator"
        batch = trainer.data_collator(samples)
        assert global_states() == states, "the collator draws from a global generator"
        found.append(batch)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        same = torch.equal(value, found[1][key]) if isinstance(value, torch.Tensor) else True
        assert same, f"{key} depends on a global generator"


def global_states() -> tuple[Any, ...]:
    """Python's, NumPy's and torch's global generators, comparable."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()  # type: ignore[union-attr]


# ---- stop on request ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_writes_a_checkpoint_and_ends_with_its_status(
    whole: Path, make_config: Make, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """Told twice in step 6, as launchers do; the run that goes on is the uninterrupted one."""
    config = make_config("stopped", **section(resume="auto"))
    shutil.copytree(whole / "checkpoint-8", Path(config.output_dir, "checkpoint-8"))

    def body() -> int:
        build = run.build_trainer

        def building(config: RunConfig) -> Any:
            built = build(config)
            for _ in range(2):
                built[0].add_callback(At("on_pre_optimizer_step", 8, number))
            return built

        run.build_trainer = building
        path = Path(config.output_dir).with_suffix(".yaml")
        return main(["train", "--config", str(path), "--resume"])

    assert run_in_child(body) == 128 + number
    assert f"stopped by {signal.Signals(number).name} at step 9; checkpoint-9 is complete" in capfd.readouterr().out
    assert checkpoint_problem(Path(config.output_dir, "checkpoint-9")) is None
    assert json.loads(Path(config.output_dir, "run_record.json").read_text())["exit_status"] == 128 + number
    train(config)
    assert numbers(config.output_dir) == numbers(whole)


# ---- broken checkpoints ----


def truncate(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return act


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BREAKAGES = {
    "weights truncated": (truncate("adapter_model.safetensors"), "adapter_model.safetensors"),
    "no optimizer": (remove("optimizer.pt"), "optimizer.pt"),
    "optimizer truncated": (truncate("optimizer.pt"), "optimizer.pt"),
    "no random numbers": (remove("rng_state.pth"), "rng_state.pth is missing"),
    "bad state": (truncate("trainer_state.json"), "JSON"),
    "bad manifest": (truncate(MANIFEST), "JSON"),
    "empty": (shutil.rmtree, "no trainer_state.json"),
}


@pytest.mark.parametrize("name", BREAKAGES)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_broken_last_checkpoint_is_passed_over(
    whole: Path, tmp_path: Path, name: str, has_manifest: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that another tool wrote, without a list of its files."""
    if not has_manifest and name in ("bad manifest", "no random numbers"):
        pytest.skip("nothing to find without the list")
    out = tmp_path / "run"
    for step in (8, 10):
        shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
        if not has_manifest:
            (out / f"checkpoint-{step}" / MANIFEST).unlink()
    act, message = BREAKAGES[name]
    act(out / "checkpoint-10")
    (out / "checkpoint-10").mkdir(exist_ok=True)
    assert message in (checkpoint_problem(out / "checkpoint-10") or "")
    with caplog.at_level("WARNING"):
        assert resume_point(out, "auto") == out / "checkpoint-8"
    assert "checkpoint-10 is passed over" in caplog.text
    assert {path.name for path in out.iterdir()} == {"checkpoint-8", "checkpoint-10.broken"}


def test_named_checkpoint_that_is_broken_is_an_error(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-8", tmp_path / "checkpoint-8")
    remove("scheduler.pt")(tmp_path / "checkpoint-8")
    with pytest.raises(CheckpointError, match=r"checkpoint-8: cannot be resumed from: scheduler.pt is missing"):
        resume_point(tmp_path, str(tmp_path / "checkpoint-8"))


def test_auto_without_checkpoints_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert resume_point(tmp_path, "auto") is None
    assert "starting from the beginning" in caplog.text


def test_new_run_keeps_the_checkpoints_of_an_earlier_one(whole: Path, tmp_path: Path) -> None:
    """Otherwise they would mix with its own, and the limit would delete them."""
    for _ in range(2):
        shutil.copytree(whole / "checkpoint-8", tmp_path / "checkpoint-8")
        assert resume_point(tmp_path, None) is None
    assert {path.name for path in (tmp_path / "earlier").iterdir()} == {"checkpoint-8", "checkpoint-8.2"}
    assert checkpoints(tmp_path) == []


def test_last_written_is_taken_not_the_highest_step(whole: Path, tmp_path: Path) -> None:
    """After going back to checkpoint-8, a later checkpoint-9 continues that run, not the abandoned checkpoint-10."""
    shutil.copytree(whole / "checkpoint-10", tmp_path / "checkpoint-10")
    shutil.copytree(whole / "checkpoint-8", tmp_path / "checkpoint-9")
    manifest = json.loads((tmp_path / "checkpoint-9" / MANIFEST).read_text())
    later = json.loads((tmp_path / "checkpoint-10" / MANIFEST).read_text())["written"] + 1
    (tmp_path / "checkpoint-9" / MANIFEST).write_text(json.dumps({**manifest, "written": later}))
    assert resume_point(tmp_path, "auto") == tmp_path / "checkpoint-9"


# ---- no room ----


def test_full_disk_loses_no_checkpoint(whole: Path, make_config: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights or optimizer do not fit; with a limit of one checkpoint, the old one goes when the new is there."""
    weights = (whole / "checkpoint-8" / "adapter_model.safetensors").stat().st_size
    optimizer = (whole / "checkpoint-8" / "optimizer.pt").stat().st_size
    assert weights < optimizer
    for limit in (weights // 2, (weights + optimizer) // 2):
        config = make_config(f"full{limit}", **section(save_total_limit=1, resume="auto"), overrides=["data.eval=[]"])
        shutil.copytree(whole / "checkpoint-8", Path(config.output_dir, "checkpoint-8"))

        def body(config: RunConfig = config, limit: int = limit) -> int:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            path = Path(config.output_dir).with_suffix(".yaml")
            return main(["train", "--config", str(path), "--resume", "data.eval=[]"])

        assert run_in_child(body) == 2
        printed = capfd.readouterr().err
        assert "a checkpoint could not be written" in printed
        assert "earlier checkpoints are untouched: checkpoint-8" in printed
        assert "Traceback" not in printed
        assert checkpoint_problem(Path(config.output_dir, "checkpoint-8")) is None
        assert [path.name for path in checkpoints(config.output_dir)] == ["checkpoint-8"]
    train(config)
    assert [path.name for path in checkpoints(config.output_dir)] == ["checkpoint-10"]
    assert not Path(config.output_dir, STAGING).exists()


def test_changed_run_is_named(whole: Path, make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config("changed", **section(batch_size=3, max_steps=9, resume=str(whole / "checkpoint-8")))
    with caplog.at_level("WARNING"):
        train(config)
    assert "another batch_size: 2 -> 3" in caplog.text
    assert "another max_steps: 10 -> 9" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("engine", "DeepSpeed ZeRO-2 on 2 ranks", "was written with engine DeepSpeed ZeRO-2 on 2 ranks, this run"),
        ("optimizer", ["adafactor"], r"was written with optimizer \['adafactor'\]"),
    ],
)
def test_a_state_that_cannot_be_taken_up_is_refused(
    whole: Path, make_config: Make, name: str, value: Any, found: str
) -> None:
    """Adam and the schedule began anew without a word, or DeepSpeed ended in a traceback."""
    config = make_config("other", **section(resume="auto"))
    shutil.copytree(whole, config.output_dir)
    for folder in checkpoints(config.output_dir):
        manifest = json.loads((folder / MANIFEST).read_text())
        assert manifest["run"]["engine"] == "no DeepSpeed"
        manifest["run"][name] = value
        (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=found):
        train(config)


def test_rates_of_the_checkpoint_that_hold_on_are_named(
    whole: Path, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    changes = section(resume="auto", learning_rate=1e-5, max_steps=11)
    config = make_config("rates", **changes, loss={"dice": 2.0})
    shutil.copytree(whole, config.output_dir)
    train(config)
    assert "resumed with another learning_rate: 0.001 -> 1e-05: the checkpoint's holds on" in caplog.text
    assert "resumed with another loss.dice: 1.0 -> 2.0: the losses will not be those of one run" in caplog.text


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_finished_run_trains_no_further(whole: Path, make_config: Make, is_recorded: bool) -> None:
    """Also one that was killed between its last checkpoint and the files written at the end."""
    config = make_config("finished", **section(resume="auto"))
    out = Path(config.output_dir)
    shutil.copytree(whole, out)
    for name in () if is_recorded else ("history.json", "run_record.json"):
        (out / name).unlink()
    for _ in range(2):
        record = train(config)
        assert record["steps"] == 10
        assert record["best"] == pytest.approx(json.loads((whole / "run_record.json").read_text())["best"])
    lost = 0 if is_recorded else 1  # the mean over the run, which stood in the lost file alone
    assert numbers(out) == numbers(whole)[: len(numbers(whole)) - lost]
    assert (out / "log.csv").read_text() == (whole / "log.csv").read_text()
    assert (out / "best" / "best.json").read_text() == (whole / "best" / "best.json").read_text()
    assert [path.name for path in checkpoints(out)] == [path.name for path in checkpoints(whole)]
    (name,) = (path.name for path in (whole / "best").glob("*.safetensors"))
    ours, theirs = load_file(out / "best" / name), load_file(whole / "best" / name)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_going_back_leaves_no_best_of_the_run_that_was_left(whole: Path, make_config: Make) -> None:
    """A loss that is weighted otherwise is larger, so the value of the abandoned steps would never be met."""
    changes = section(metric_for_best="eval_loss", resume=None, save_steps=2)
    changes["train"]["trainer_args"]["save_total_limit"] = 9
    del changes["train"]["save_steps"]
    config = make_config("back", **changes)
    train(config)
    out = Path(config.output_dir)
    before = json.loads((out / "best" / "best.json").read_text())
    assert before["step"] > 2
    again = make_config("back", ["loss.dice=9"], **changes)
    again.train.resume = str(out / "checkpoint-2")
    record = train(again)
    found = json.loads((out / "best" / "best.json").read_text())
    values = {e["step"]: e["eval_loss"] for e in json.loads((out / "history.json").read_text()) if "eval_loss" in e}
    assert found["value"] == pytest.approx(values[found["step"]])
    assert found["value"] == pytest.approx(min(values.values()))
    assert record["best"] == pytest.approx(found["value"])
    assert found["value"] > before["value"] + 1


def test_an_early_stop_holds_after_a_resume(make_config: Make) -> None:
    changes = section(early_stopping_patience=1, metric_for_best="eval_recall_real", max_steps=40, eval_steps=2)
    config = make_config("early", **changes)
    steps = train(config)["steps"]
    assert steps < 40
    config.train.resume = "auto"
    assert train(config)["steps"] == steps


def test_a_table_that_was_cut_off_does_not_stop_a_resume(whole: Path, make_config: Make) -> None:
    config = make_config("cut", **section(resume="auto", max_steps=12))
    shutil.copytree(whole, config.output_dir)
    table = Path(config.output_dir, "log.csv")
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]) + lines[-1].split(",")[0])  # within the last row, before its step
    train(config)
    steps = [row.split(",")[1] for row in table.read_text().splitlines()[1:]]
    assert steps == ["4", "8", "12"]
    assert not table.with_name("log.csv.writing").exists()


def test_two_runs_do_not_share_a_folder(make_config: Make) -> None:
    config = make_config("shared", **section())
    with (
        run._alone_in(Path(config.output_dir)),
        pytest.raises(ForensicsError, match=r"another process is training in .*shared; wait for it"),
    ):
        train(config)
    assert not Path(config.output_dir).exists()
    assert not list(Path(config.output_dir).parent.glob(".*.lock"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_script_hands_a_signal_on(write_config: Callable[..., Path], repo_root: Path, number: int) -> None:
    """As a scheduler sends it, to the script alone: a checkpoint, its status, and nothing left running."""
    path = write_config("signalled", **section(max_steps=400, eval_steps=400))
    environment = {**os.environ, "ACCELERATE_CONFIG": "cpu", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(repo_root / "script" / "sft_llm.sh"), str(path), "train.logging_steps=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("step 3/"):
                process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    assert f"stopped by {signal.Signals(number).name} at step " in printed[-1]
    assert "is complete" in printed[-1]
