"""Interrupted synthesis: nothing half made is seen, what is finished is kept, and the result is the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from finetune.data.synthesis import SynthConfig, generator, synthesize
from finetune.data.synthesis.samples import Sample, SampleTask
from finetune.errors import ForensicsError

KINDS = {"multi_turn": 0.5, "comparison": 0.5, "multi_image": 0.25}
CONFIG = SynthConfig(
    num_train=40, num_eval=6, num_val=2, seed=9, sizes_hw=((84, 112),), record_kinds=KINDS, image_format="jpeg"
)


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed") / "set"
    synthesize(replace(CONFIG, workers=1), root, progress=False)
    return digests(root)


def count_made(monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> list[str]:
    """The ids of the samples that are made from now on; the one after `limit` is interrupted, as by Ctrl-C."""
    made: list[str] = []
    make_sample = generator.make_sample

    def make(task: SampleTask, *arguments: Any) -> Sample:
        if len(made) == limit:
            raise KeyboardInterrupt
        made.append(task.id)
        return make_sample(task, *arguments)

    monkeypatch.setattr(generator, "make_sample", make)
    return made


def interrupt_after(count: int, config: SynthConfig, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        count_made(patch, limit=count)
        with pytest.raises(KeyboardInterrupt):
            synthesize(config, target, progress=False, overwrite=True)


def children(pid: int) -> list[int]:
    """Processes started by a process, on Linux."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_midway(target: Path, config: SynthConfig) -> int:
    """Run the command in a process of its own and kill it once some images are finished; returns how many."""
    changed = {key: value for key, value in asdict(config).items() if value != getattr(SynthConfig(), key)}
    command = [sys.executable, "-m", "finetune.cli", "synth", "--out", str(target)]
    command += [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        journal = next(target.parent.glob(f".{target.name}.partial-*/journal.jsonl"), None)
        if journal is not None and journal.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.005)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not any(map(runs, workers)), "workers outlived the killed run"
    assert journal is not None, "nothing was made"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, num_train=40, num_eval=0, num_val=0, sizes_hw=((336, 336),), workers=2)
    for attempt in range(3):  # on a busy machine the run may be over before it is killed
        target = tmp_path / str(attempt) / "set"
        target.parent.mkdir()
        if finished := kill_midway(target, config):
            break
    assert 5 <= finished < 40
    assert not target.exists()
    synthesize(replace(config, workers=1), target, progress=False)
    assert f"continuing an interrupted run: {finished} of 40 images" in caplog.text
    synthesize(replace(config, workers=1), tmp_path / "undisturbed", progress=False)
    assert digests(target) == digests(tmp_path / "undisturbed")
    assert [path.name for path in target.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("damage", ["torn line", "lost file", "changed file", "half-written file"])
def test_only_what_is_whole_is_kept(
    damage: str, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, workers=1)
    interrupt_after(20, config, tmp_path / "set", monkeypatch)
    (partial,) = tmp_path.glob(".set.partial-*")
    kept = 20
    if damage == "torn line":
        journal = partial / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-300])
        kept = 19
    elif damage == "lost file":
        (partial / "train/images/000012.jpg").unlink()
        kept = 12
    elif damage == "changed file":
        (partial / "train/images/000007.jpg").write_bytes(b"")
        kept = 7
    else:
        (partial / "train/images/.000020.jpg.77.tmp").write_bytes(b"half")
        (partial / "train/images/000020.jpg").write_bytes(b"half")
    with monkeypatch.context() as patch:
        made = count_made(patch)
        synthesize(config, tmp_path / "set", progress=False)
    assert len(made) == 48 - kept
    assert digests(tmp_path / "set") == undisturbed


def test_leftovers_of_another_configuration_are_replaced_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, workers=1, num_train=8, num_eval=0, num_val=0)
    interrupt_after(5, config, tmp_path / "set", monkeypatch)
    assert "5 finished images are kept" in caplog.text
    (mine := tmp_path / ".set.partial-notes").mkdir()  # no journal: not ours
    with monkeypatch.context() as patch:
        made = count_made(patch)
        synthesize(replace(config, seed=10), tmp_path / "set", progress=False)
    assert len(made) == 8
    assert "5 samples of an interrupted run with another configuration" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "set"]


def test_the_number_of_workers_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, workers=1, num_train=40, num_eval=0, num_val=0)
    interrupt_after(5, config, tmp_path / "set", monkeypatch)
    synthesize(replace(config, workers=2), tmp_path / "set", progress=False)
    assert "continuing an interrupted run: 5 of 40 images" in caplog.text


def test_two_processes_do_not_write_one_set(tmp_path: Path) -> None:
    config = replace(CONFIG, workers=1, num_train=4, num_eval=0, num_val=0)
    with (tmp_path / ".set.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ForensicsError, match="another process is making"):
            synthesize(config, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()
    synthesize(config, tmp_path / "set", progress=False)  # a lock file without a holder, as a killed process leaves it
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_earlier_set_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, workers=1, num_train=6, num_eval=0, num_val=0)
    synthesize(config, tmp_path / "set", progress=False)
    before = digests(tmp_path / "set")
    interrupt_after(3, replace(config, seed=1), tmp_path / "set", monkeypatch)
    assert digests(tmp_path / "set") == before
    synthesize(replace(config, seed=1), tmp_path / "set", progress=False, overwrite=True)
    assert digests(tmp_path / "set") != before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
