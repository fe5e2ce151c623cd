"""What a saved model's folder is known by."""

from pathlib import Path

MODEL_CONFIG = "config.json"
"""In the folder of a whole model."""
ADAPTER_CONFIG = "adapter_config.json"
"""In the folder of a PEFT adapter."""
CALIBRATION = "calibration.json"
"""In every folder of a best model: how its scores become probabilities, fitted on the evaluation images."""
FRAME = SHORT_SIDE, PADDING = "image_short_side", "image_padding"
"""Keys of the image processor's file that say how images are sized and padded; see `finetune.data.image_frame`."""


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder holds a whole model or an adapter; nothing is read."""
    return any((Path(folder) / name).is_file() for name in (MODEL_CONFIG, ADAPTER_CONFIG))
