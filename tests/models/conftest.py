"""Checkpoints whose weights are large enough to matter: with the usual 0.02 every state is nearly its own embedding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tied(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied tiny checkpoint with attention and MLPs that change the states."""
    return _enlarged(tiny_dir, tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def untied(tiny_untied_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an lm_head of its own."""
    return _enlarged(tiny_untied_dir, tmp_path_factory.mktemp("models") / "untied")


@pytest.fixture(params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Both kinds of checkpoint, one after the other."""
    return Path(request.getfixturevalue(request.param))


def _enlarged(source: Path, folder: Path) -> Path:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    shutil.copytree(source, folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(10 if "embed_tokens" in name or "lm_head" in name else 5)
    model.save_pretrained(folder)
    return folder
