"""A folder of vision parts: heads, and LoRA of the vision tower, beside a Qwen2.5-VL that is not copied.

`heads.safetensors`, `config.json`, processor, `forensics.json` with the section `vision` (which base, and a fingerprint
of its tower), and where LoRA trained a PEFT folder `vision_lora` of its own that `peft` alone can load. Opening such a
folder is `finetune.models.vision_loading`'s part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from finetune.config.model_folder import ADAPTER_CONFIG, MODEL_CONFIG
from finetune.errors import ModelLoadError
from finetune.models.configuration import QwenForensicsConfig
from finetune.models.groups import plain_name
from finetune.models.plain import HEADS_FILE, SETTINGS_FILE, is_head, read_config

PARTS_SECTION = "vision"
"""Key of forensics.json that makes a folder one of vision parts."""
LORA_DIR = "vision_lora"
_SAMPLES = 256
"""Values of each weight that the fingerprint reads."""


@dataclass(frozen=True)
class BaseTower:
    """The model that vision parts stand on: `path` as the user gave it, and a fingerprint of its tower."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class StoredHeads:
    """Heads found in a folder of any kind: the configuration they were saved with, and their weights by name.

    other_keys: what else an adapter folder holds, LoRA and token rows; () for folders of other kinds.
    """

    folder: Path
    config: QwenForensicsConfig
    tensors: dict[str, Tensor]
    other_keys: tuple[str, ...] = ()


def tower_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits from a sample of every weight of the tower, rounded to bfloat16.

    The same for float32 and bfloat16 copies of one checkpoint; LoRA beside the weights does not change it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.get_submodule("model.visual").named_parameters():
        if ".lora_" in name:
            continue
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16).cpu()
        digest.update(name.replace(".base_layer", "").encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _for_plain_models(folder: Path) -> None:
    """Have a LoRA folder name Qwen2.5-VL itself as what it belongs on, so that `peft.AutoPeftModel` opens it without
    this package; PEFT's empty model card goes."""
    file = folder / ADAPTER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["auto_mapping"] = {
        "base_model_class": Qwen2_5_VLForConditionalGeneration.__name__,
        "parent_library": Qwen2_5_VLForConditionalGeneration.__module__,
    }
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def parts_section(folder: str | Path) -> dict[str, Any] | None:
    """The section `vision` of a folder's forensics.json; None where it is no folder of vision parts.

    Raises:
        ModelLoadError: the file is not valid JSON.
    """
    file = Path(folder) / SETTINGS_FILE
    if not file.is_file():
        return None
    try:
        section = json.loads(file.read_text(encoding="utf-8")).get(PARTS_SECTION)
    except ValueError as error:
        raise ModelLoadError(f"{folder}: {SETTINGS_FILE} is not valid JSON ({error}); copy the folder again") from error
    return section if isinstance(section, dict) else None


def write_parts(
    model: Any, tower: BaseTower, folder: Path, state: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Write heads, configuration and LoRA; returns the section for forensics.json.

    Args:
        model: the forensic model, or a PeftModel of vision LoRA around it.
        state: weights under the model's names where they are gathered elsewhere (ZeRO-3).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights = state if state is not None else model.state_dict()
    named = {plain_name(name): value for name, value in weights.items()}
    heads = {name: value.detach().cpu().contiguous() for name, value in named.items() if is_head(name)}
    save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
    base.config.save_pretrained(folder)
    has_lora = base is not model
    if has_lora:
        model.save_pretrained(folder / LORA_DIR, state_dict=state, save_embedding_layers=False)
        _for_plain_models(folder / LORA_DIR)
    elif (folder / LORA_DIR).is_dir():
        shutil.rmtree(folder / LORA_DIR)  # of an earlier save: it is not part of this model
    blocks = [block % base.config.vision_config.depth for block in base.heads_config.vision_layers]
    return {
        "base": tower.path,
        "fingerprint": tower.fingerprint,
        "vision_layers": blocks,
        "width": base.heads_config.hidden_size,
        "has_lora": has_lora,
    }


# ---- reading ----


def read_heads(place: str | Path) -> StoredHeads | None:
    """Heads of a folder: vision parts, a plain model with heads beside it, a whole model of ours, or our adapter.

    Args:
        place: the folder, or its `heads.safetensors`.

    Returns:
        None for a folder without heads, such as a released Qwen2.5-VL.

    Raises:
        ModelLoadError: the files are incomplete or damaged.
    """
    folder = Path(place).parent if Path(place).is_file() else Path(place)
    if (folder / HEADS_FILE).is_file() and not (folder / MODEL_CONFIG).is_file():
        raise ModelLoadError(f"{folder}: {HEADS_FILE} has no config.json beside it; copy the whole folder")
    try:
        config = read_config(folder)
        if config is None:
            return None
        files = [folder / HEADS_FILE] if (folder / HEADS_FILE).is_file() else sorted(folder.glob("*.safetensors"))
        tensors: dict[str, Tensor] = {}
        others: list[str] = []
        for file in files:
            with safe_open(file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118  (not a dict)
                    name = plain_name(key)
                    if is_head(name):
                        tensors[name] = stored.get_tensor(key)
                    elif file.name.startswith("adapter_"):
                        others.append(key)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelLoadError(f"{folder}: the heads cannot be read ({reason}); copy the folder again") from error
    if not tensors and parts_section(folder) is not None:
        raise ModelLoadError(f"{folder}: a folder of vision parts without {HEADS_FILE}; copy the whole folder")
    return StoredHeads(folder, config, tensors, tuple(others)) if tensors else None
