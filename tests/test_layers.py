"""The dependency direction of CONTRIBUTING.md holds, by the import graph and by what is loaded when a module runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "transformers", "peft", "trl", "accelerate", "deepspeed", "datasets")
# Packages and modules that must come up without a deep-learning library.
LIGHT = (
    "finetune",
    "finetune.errors",
    "finetune.schema",
    "finetune.special_tokens",
    "finetune.config",
    "finetune.data.readers",
    "finetune.data.synthesis",
    "finetune.data.storage",
    "finetune.data.splits",
    "finetune.data.duplicates",
    "finetune.data.preparation",
    "finetune.data.audit",
    "finetune.data.regions",
)


def submodules(repo_root: Path, name: str) -> list[str]:
    """`name` and, where it is a package, every module in it."""
    folder = repo_root.joinpath(*name.split("."))
    if name == "finetune" or not folder.is_dir():
        return [name]
    return [name, *(f"{name}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__")]


def test_import_contracts_are_kept(repo_root: Path) -> None:
    pytest.importorskip("importlinter", reason="import-linter is in the `dev` extra")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("name", LIGHT)
def test_import_loads_no_deep_learning_library(repo_root: Path, name: str) -> None:
    names = submodules(repo_root, name)
    code = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == [], (
        f"importing {name} (all of {names}) loads {loaded}; import them inside the function that needs them"
    )
