"""What a saved model's folder is known by."""

from pathlib import Path

MODEL_CONFIG = "config.json"
"""In the folder of a whole model."""
ADAPTER_CONFIG = "adapter_config.json"
"""In the folder of a PEFT adapter."""


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder holds a whole model or an adapter; nothing is read."""
    return any((Path(folder) / name).is_file() for name in (MODEL_CONFIG, ADAPTER_CONFIG))
