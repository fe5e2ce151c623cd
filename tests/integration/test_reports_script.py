"""`script/reports.sh`: raw files to metrics with one command, on the tiny model, which learns kind and severity."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_reports_from_raw_files_to_metrics(repo_root: Path, tmp_path: Path) -> None:
    """Held-out walls: clearly above a constant answer; how long it takes is in docs/reports.md."""
    out = tmp_path / "with a blank"
    done = subprocess.run(
        ["bash", "script/reports.sh", "--seconds", "600", "--out", str(out)],
        cwd=repo_root,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((out / "report" / "results.json").read_text("utf-8"))["metrics"]
    level = metrics["level"]
    assert level["n"] > 40
    assert level["accuracy"] > level["majority"] + 0.3
    assert level["quadratic_kappa"] > 0.6
    assert metrics["fields"]["风险描述"]["exact"] > 0.6
    assert metrics["form"]["complete"] > 0.95
    assert (out / "report" / "report.html").stat().st_size > 100_000
