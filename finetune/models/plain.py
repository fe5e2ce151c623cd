"""A plain Qwen2.5-VL folder with the heads beside it: `heads.safetensors`, and the `heads` section of forensics.json.

Tools that only know Qwen2.5-VL read `config.json` and the weights and ignore the two files; `load_bundle` reads all.
Writing such a folder is `finetune.models.export`'s part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.config.model_folder import MODEL_CONFIG
from finetune.errors import ModelLoadError
from finetune.models.qwen_forensics_model import (
    HEAD_MODULES,
    QwenForensicsConfig,
    QwenForensicsForConditionalGeneration,
)

HEADS_FILE = "heads.safetensors"
SETTINGS_FILE = "forensics.json"
SECTION = "heads"
"""Key of forensics.json that holds `CONFIG_FIELDS` of a plain folder."""

CONFIG_FIELDS = ("heads", "cls_token_ids", "mask_token_ids", "num_cls", "num_mask", "image_mean", "image_std")
"""What `QwenForensicsConfig` adds to Qwen2.5-VL's configuration."""


def is_head(name: str) -> bool:
    """Whether a parameter name of the model belongs to a head, not to Qwen2.5-VL."""
    return name.split(".")[0] in HEAD_MODULES


def heads_settings(config: QwenForensicsConfig) -> dict[str, Any]:
    """`CONFIG_FIELDS` of a model as plain JSON."""
    return {name: getattr(config, name) for name in CONFIG_FIELDS}


def write_heads(model: QwenForensicsForConditionalGeneration, folder: Path) -> None:
    """Write every head weight to `folder`/heads.safetensors, in its own dtype."""
    heads = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if is_head(name)}
    save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})


def saved_heads(folder: str | Path) -> QwenForensicsConfig | None:
    """Our configuration of a plain folder that has heads beside it; None where it has none.

    Raises:
        ModelLoadError: one of the two files is missing or unreadable.
    """
    settings_path, heads_path = Path(folder) / SETTINGS_FILE, Path(folder) / HEADS_FILE
    section = None
    if settings_path.is_file():
        try:
            section = json.loads(settings_path.read_text(encoding="utf-8")).get(SECTION)
        except ValueError as error:
            raise ModelLoadError(
                f"{folder}: {SETTINGS_FILE} is not valid JSON ({error}); copy the folder again"
            ) from error
    if section is None and not heads_path.is_file():
        return None
    if section is None or not heads_path.is_file():
        missing = f"no '{SECTION}' in {SETTINGS_FILE}" if section is None else f"no {HEADS_FILE}"
        raise ModelLoadError(
            f"{folder}: heads beside a plain model need {HEADS_FILE} and {SETTINGS_FILE}, found {missing}; copy the "
            "folder again, or remove both to use the plain model"
        )
    config = QwenForensicsConfig.from_pretrained(folder)
    for name in CONFIG_FIELDS:
        setattr(config, name, section[name])
    return config


def read_config(place: str | Path) -> QwenForensicsConfig | None:
    """Our configuration of a folder; None for a plain Qwen2.5-VL without heads, and for hub names.

    Raises:
        ModelLoadError: config.json is not valid JSON.
    """
    folder = Path(place)
    if not (folder / MODEL_CONFIG).is_file():
        return None
    try:
        kind = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ModelLoadError(f"{folder}: config.json is not valid JSON ({error}); copy the folder again") from error
    if kind == QwenForensicsConfig.model_type:
        found: QwenForensicsConfig = QwenForensicsConfig.from_pretrained(folder)
        return found
    return saved_heads(folder)


def attach_heads(model: QwenForensicsForConditionalGeneration, folder: str | Path) -> None:
    """Fill the model's heads from `folder`/heads.safetensors; every weight must find its place.

    Raises:
        ModelLoadError: names or shapes that differ from the model's heads, or a damaged file.
    """
    path = Path(folder) / HEADS_FILE
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({str(error).splitlines()[0]}); copy the file again") from error
    own = {name: value for name, value in model.state_dict().items() if is_head(name)}
    odd = sorted(set(own) ^ set(stored)) or [name for name in own if own[name].shape != stored[name].shape]
    if odd:
        raise ModelLoadError(
            f"{path}: {len(odd)} head weights do not fit the heads in {SETTINGS_FILE}, e.g. '{odd[0]}'; copy both "
            "files of one export"
        )
    with torch.no_grad():
        for name, value in stored.items():
            own[name].copy_(value)
