"""How a process ends that is in a process group."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN = """
import atexit, sys
import torch.distributed as dist
from finetune.cli import main

if sys.argv[1] == "grouped":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print("exit handlers; in a group:", dist.is_initialized()))
status = main(["train", "--config", *sys.argv[2:]])
print("status", status)
"""
STAGES = "stages=[{name: one}]"


@pytest.mark.parametrize("options", [["train.max_steps=1"], ["train.max_steps=1", STAGES, "--stage", "one"]])
def test_a_process_of_a_group_ends_at_once(write_config: Callable[..., Path], options: list[str]) -> None:
    """The interpreter's own end is where a thread of gloo can abort it; exit handlers still run."""
    command = [sys.executable, "-c", TRAIN, "grouped", str(write_config("config")), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "best model is in" in done.stdout
    assert done.stdout.splitlines()[-1] == "exit handlers; in a group: False"


def test_a_process_without_a_group_goes_on(write_config: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", TRAIN, "alone", str(write_config("config")), "train.max_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["status 0", "exit handlers; in a group: False"]
