"""What a run was made of: versions, commit, configuration and data hashes, seeds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.config import RunConfig, SourceConfig, config_hash, to_dict
from finetune.data.storage import is_stored, stored_hash

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "trl", "datasets", "numpy", "pillow")


def run_record(config: RunConfig) -> dict[str, Any]:
    """Everything needed to say which run this was; plain JSON."""
    return {
        "versions": versions(),
        "commit": commit(),
        "config_hash": config_hash(config),
        "data_hash": {source.path: file_hash(source.path) for source in _sources(config)},
        "seed": config.seed,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "hardware": hardware(),
        "config": to_dict(config),
    }


def hardware() -> dict[str, Any]:
    """The machine of this process: platform, CPU threads that torch uses, names and memory of its GPUs."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return {"platform": platform.platform(terse=True), "cpu_threads": torch.get_num_threads(), "gpus": gpus}


def versions() -> dict[str, str]:
    """Python's and the main packages' versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The source tree's git commit, with `+changes` when it differs; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if dirty else "")


def seen_before(settings: dict[str, Any]) -> list[str]:
    """Hashes of the data files that a model was trained or chosen on, from the settings beside it, and of those that
    the models it came from were; sorted."""
    trained = settings.get("trained", {})
    hashes = {*(trained.get("data_hash") or {}).values(), *trained.get("earlier_data", ())}
    return sorted(value for value in hashes if value is not None)


def file_hash(path: str) -> str | None:
    """First twelve hex digits of the SHA-256 of a data file, or of the hashes of a stored split's files; else None."""
    file = Path(path)
    if is_stored(path):
        return stored_hash(path)[:12]
    if not file.is_file():
        return None
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def _sources(config: RunConfig) -> Sequence[SourceConfig]:
    return [*config.data.train, *config.data.eval]
