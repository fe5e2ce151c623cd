"""script/{scan_labels,prepare_regions,build_sft_jsonl}.sh lead from the committed samples to conversations."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "script" / f"{name}.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_three_scripts_lead_from_label_files_to_conversations(tmp_path: Path) -> None:
    out = f"out_dir={tmp_path / 'a set'}"
    for name, *more in (
        ("scan_labels", "configs/data/regions.yaml"),
        ("prepare_regions", "seed=3"),
        ("build_sft_jsonl", "--template", "both"),
    ):
        done = script(name, out, *more)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a set" / "prepare_report.json").read_text(encoding="utf-8"))["config"]["seed"] == 3
    records = (tmp_path / "a set" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(record)["provenance"]["language"] for record in records} == {"zh", "en"}


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = script("prepare_regions", f"out_dir={tmp_path}", "min_boxsize=3")
    assert done.returncode == 2
    assert "unknown key 'min_boxsize'" in done.stderr
    assert "did you mean 'min_box_size'?" in done.stderr
    assert "Traceback" not in done.stderr
