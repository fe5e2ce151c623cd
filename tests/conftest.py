"""Shared by all tests: no network, few threads, and the folder of real data where there is one.

Markers (`slow`, `real_data`, `distributed`, `gpu`) are declared in pyproject.toml.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]


def real_data_dir() -> Path | None:
    """FORENSICS_REAL_DATA, or `../shared/data` beside the repository; None where that is no folder."""
    folder = Path(os.environ.get("FORENSICS_REAL_DATA") or REPO_ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has no data or device for, with the reason."""
    has_data = real_data_dir() is not None
    for item in items:
        if "real_data" in item.keywords and not has_data:
            item.add_marker(pytest.mark.skip(reason="no real data: set FORENSICS_REAL_DATA to its folder"))
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Two threads for torch, set only once a test has imported it, so that torch-free tests stay quick."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads") and torch.get_num_threads() != 2:
        torch.set_num_threads(2)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data (photographs, the real tokenizer); skips the test where it is absent."""
    folder = real_data_dir()
    if folder is None:
        pytest.skip("no real data: set FORENSICS_REAL_DATA to its folder")
    return folder
