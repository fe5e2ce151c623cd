"""Progress is a bar on a terminal and lines in a log; a short job leaves a log empty."""

from __future__ import annotations

import io
import os
import pty
import time

import pytest
from tqdm import tqdm

from finetune import progress
from finetune.progress import progress_bar


def test_a_short_job_writes_nothing_into_a_log() -> None:
    log = io.StringIO()
    assert list(progress_bar(range(5), total=5, unit="image", file=log)) == [0, 1, 2, 3, 4]
    assert log.getvalue() == ""


def test_a_long_job_writes_lines_into_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    log = io.StringIO()
    for _ in progress_bar(range(8), total=8, unit="image", file=log, desc="inspecting"):
        time.sleep(0.03)
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= 9
    assert all(line.startswith("inspecting:") and "/8" in line for line in lines)
    assert "\r" not in log.getvalue()
    assert "8/8" in lines[-1]


def test_a_job_of_unknown_length_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    log = io.StringIO()
    for _ in progress_bar(iter(range(8)), total=None, unit="record", file=log, desc="reading"):
        time.sleep(0.03)
    assert "8record" in log.getvalue().splitlines()[-1]
    silent = io.StringIO()
    for _ in progress_bar(iter(range(3)), total=None, unit="record", file=silent, disable=True):
        time.sleep(0.06)
    assert silent.getvalue() == ""


def test_what_is_written_between_does_not_bring_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tqdm.write` refreshes every bar after each text."""
    log, said = io.StringIO(), io.StringIO()
    for number in progress_bar(range(5), total=5, unit="image", file=log):
        tqdm.write(f"picture {number}", file=said)
    assert log.getvalue() == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    for number in progress_bar(range(5), total=5, unit="image", file=log):
        time.sleep(0.015)
        tqdm.write(f"picture {number}", file=said)
    assert len(said.getvalue().splitlines()) == 10
    assert 1 <= len(log.getvalue().splitlines()) <= 6
    assert log.getvalue().endswith("\n")


def test_a_terminal_that_reports_no_width_still_shows_a_bar() -> None:
    """As under `script`, in containers and in CI: the pseudo terminal has 0 columns."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        assert terminal.isatty()
        with progress_bar(total=4, unit="image", file=terminal, mininterval=0) as bar:
            bar.update(3)
    assert b"3/4" in os.read(reader, 10_000)
    os.close(reader)
