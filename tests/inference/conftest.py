"""What several tests of inference build in the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.config import LoraConfig, ModelConfig
from finetune.models.adapters import set_trainable
from finetune.models.loading import load_bundle, save_bundle

MakeAdapter = Callable[[Path, str, float], Path]


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make_adapter(model, name, strength)`: an adapter on a model, its heads and LoRA moved at random; read only."""

    def make(model: Path, name: str, strength: float) -> Path:
        bundle = set_trainable(
            load_bundle(ModelConfig(path=str(model))), ["cls_head", "mask_head", "lm_lora"], LoraConfig(r=4)
        )
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in bundle.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * strength)
        folder = tmp_path_factory.mktemp(name) / "adapter"
        save_bundle(bundle, folder)
        return folder

    return make
