"""Memory does not grow with the number of samples; bench/memory.py, smaller than its results in bench/results/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_peak_memory_is_flat_in_the_number_of_samples(repo_root: Path) -> None:
    command = [sys.executable, "bench/memory.py", "--counts", "500", "4000", "--side", "64", "--access-rows", "400"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ratios = {(line["what"], line["storage"]): line["peak_ratio"] for line in lines if "peak_ratio" in line}
    assert set(ratios) == {(what, storage) for what in ("write", "read") for storage in ("jsonl", "parquet")}
    assert max(ratios.values()) <= 1.1, ratios
    (access,) = [line for line in lines if line["what"] == "access"]
    assert access["rows"] == 400
    assert access["fetch_median_ms_wall"] < 5
