"""`script/regions.sh`: raw files to metrics with one command, on the tiny model, which learns to tell defects."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest


def run(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = ["bash", "script/regions.sh", *arguments]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, env=environment)


def test_help_and_mistakes(repo_root: Path, tmp_path: Path) -> None:
    done = run(repo_root, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: bash script/regions.sh" in done.stdout
    for arguments, words in (
        (("--seconds", "soon"), "--seconds is 'soon'"),
        (("--normal", str(tmp_path)), "--normal goes with --abnormal"),
        (("--abnormal", str(tmp_path / "none")), "no folder"),
        (("--what",), "unknown argument '--what'"),
    ):
        done = run(repo_root, *arguments)
        assert done.returncode == 1
        assert words in done.stderr


@pytest.mark.slow
def test_regions_from_raw_files_to_metrics(repo_root: Path, tmp_path: Path) -> None:
    """Held-out scenes: clearly above calling every region abnormal; how long it takes is in docs/regions.md."""
    out = tmp_path / "with a blank"
    done = run(repo_root, "--seconds", "900", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((out / "report" / "metrics.json").read_text("utf-8"))
    regions = metrics["test"]["roi"]
    assert regions["n"] > 150
    assert regions["f1"] > regions["all_positive_f1"] + 0.2
    assert regions["auroc"] > 0.8
    assert (out / "report" / "report.html").stat().st_size > 100_000
