"""Start-up with the language model left out, measured in processes of their own by bench/vision_loading.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_memory_and_bytes_do_not_grow_with_the_language_model(repo_root: Path, tmp_path: Path) -> None:
    """A tower of 12 M parameters under language models of 0.16 and 0.47 GB in shards."""
    command = [sys.executable, str(repo_root / "bench" / "vision_loading.py"), "--tower", "small"]
    command += ["--language-gb", "0.1", "0.4", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    small, large = ([row for row in rows if row["language"] == "skip"][i] for i in (0, 1))
    assert large["language_gb"] > small["language_gb"] + 0.25
    assert large["parameters"] == small["parameters"]
    assert large["read_gb"] == small["read_gb"] < 0.05
    assert abs(large["peak_gb"] - small["peak_gb"]) < 0.05
    loaded = [row for row in rows if row["language"] == "load"]
    for row, without in zip(loaded, (small, large), strict=True):
        assert row["read_gb"] > row["language_gb"]
        assert row["peak_gb"] > without["peak_gb"] + 0.9 * row["language_gb"]
