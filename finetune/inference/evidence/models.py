"""Opens what `config_eval.json` and `config_inference.json` name: base, heads, LoRA of the tower, calibration.

The language model is read only where an explanation is asked for. A wrong combination is an error before any image is
opened; which weights were used is written down, so that an output folder can be told from another run's.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.config import GenerationConfig, ModelConfig
from finetune.config.model_folder import ADAPTER_CONFIG
from finetune.config.vision_runs import VisionModelSettings
from finetune.data.storage.atomic import file_sha256
from finetune.errors import ConfigError, ModelLoadError
from finetune.inference.calibrating import calibration_of, find_calibration
from finetune.inference.commands import check_device
from finetune.inference.predictor import Predictor
from finetune.inference.run_folder import folder_identity
from finetune.models.plain import HEADS_FILE
from finetune.models.vision_loading import load_vision
from finetune.models.vision_parts import LORA_DIR, parts_section, read_heads

logger = logging.getLogger(__name__)

_LORA_FILE = "adapter_model.safetensors"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def open_vision_predictor(
    settings: VisionModelSettings, *, with_language: bool = False, generation: GenerationConfig | None = None
) -> tuple[Predictor, dict[str, Any]]:
    """A predictor whose heads read the vision tower, and what its results depend on (see `run_folder.open_run`).

    Args:
        with_language: also load the language model, for `Predictor.write`.
        generation: decoding; thresholds, batch size and test-time augmentation are taken from `settings`.

    Raises:
        ModelLoadError: see `load_vision`; LoRA on other blocks than `visual_lora.layers`; heads that are not trained.
        ConfigError: no such device, no calibration where one is asked for.
    """
    device = check_device(settings.device)
    heads = heads_folder(settings.head_checkpoint)
    lora = lora_folder(settings, heads)
    base = settings.base_model_path or str((parts_section(heads) or {}).get("base", ""))
    if not base:
        raise ConfigError(f"base_model_path is missing, and {heads} does not name the base it was trained on")
    calibration = find_calibration(settings.calibration, heads)
    if lora is not None and not is_trained_pair(heads, lora):
        logger.warning(
            "the heads of %s were not trained with the LoRA of %s: they see features that they do not know; take both "
            "from one folder, unless this is meant",
            heads, lora,
        )  # fmt: skip
    bundle = load_vision(
        base,
        heads,
        lora,
        with_language,
        max_pixels=settings.max_pixels,
        config=ModelConfig(path=base),
    )
    least = bundle.processor.image_processor.size["shortest_edge"]
    if settings.max_pixels is not None and settings.max_pixels < least:
        raise ConfigError(
            f"max_pixels is {settings.max_pixels}; expected at least {least}, the model's min_pixels: it counts all "
            "pixels of a picture, width times height"
        )
    if bundle.has_new_heads:
        raise ModelLoadError(f"{heads}: no trained heads, so its verdicts would be random; give a folder of a stage")
    chosen = generation or GenerationConfig()
    chosen.score_threshold, chosen.mask_threshold = settings.classification_threshold, settings.heatmap_threshold
    chosen.batch_size, chosen.tta = settings.batch_size, settings.tta
    apply = calibration_of(bundle, heads, settings.calibration)
    predictor = Predictor(bundle, chosen, device=device, calibration=apply)
    identity = {
        "base": folder_identity(base),
        "heads": folder_identity(heads),
        "lora": folder_identity(lora),
        "calibration": folder_identity(calibration),
    }
    return predictor, identity


def heads_folder(text: str) -> Path:
    """The folder of `head_checkpoint`, which may be named by a file in it.

    Raises:
        ModelLoadError: not there, without heads, or a pickle.
    """
    path = Path(text)
    if path.suffix in _PICKLES:
        raise ModelLoadError(
            f"head_checkpoint {text} is a pickle, which is never loaded; give a folder with heads.safetensors, as the "
            "stages write it (best_val_auc/, best_val_iou/)"
        )
    folder = path.parent if path.is_file() else path
    if path.is_dir() and not (path / HEADS_FILE).is_file():  # what a stage was told to write to, as --clsA_dir takes it
        folder = next((path / name for name in ("best_val_auc", "best") if (path / name / HEADS_FILE).is_file()), path)
    if not folder.is_dir():
        raise ModelLoadError(f"head_checkpoint {text} does not exist; give a folder that a stage wrote")
    stored = read_heads(folder)
    if stored is None or stored.config.heads_config.source != "vision":
        found = "no heads" if stored is None else "heads on forensic tokens"
        raise ModelLoadError(
            f"head_checkpoint {text} has {found}; expected heads on the vision tower, as stage A writes"
        )
    return folder


def lora_folder(settings: VisionModelSettings, heads: Path) -> Path | None:
    """The LoRA to put on the tower: the one named, else the one beside the heads, else None.

    Raises:
        ModelLoadError: it is no PEFT folder, or on other blocks than `visual_lora.layers` says.
    """
    asked = settings.visual_lora
    if asked.path is None:
        own = heads / LORA_DIR
        folder = own if own.is_dir() else None
    else:
        folder = Path(asked.path)
        if not (folder / ADAPTER_CONFIG).is_file() and (folder / LORA_DIR / ADAPTER_CONFIG).is_file():
            folder = folder / LORA_DIR
    if folder is None:
        if asked.layers:
            raise ModelLoadError(
                f"visual_lora.layers is {asked.layers}, but no LoRA is given and none lies in {heads}; give "
                "visual_lora.path, or set visual_lora to null for the tower as it is"
            )
        return None
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelLoadError(
            f"visual_lora.path {folder} has no {ADAPTER_CONFIG}; give the PEFT folder of stage C, or set visual_lora "
            "to null: heads of stages A and B have none"
        )
    if asked.layers is not None and (found := lora_blocks(folder)) != sorted(set(asked.layers)):
        raise ModelLoadError(
            f"visual_lora.layers is {asked.layers}, but {folder} has LoRA on the blocks {found}; give those, or "
            "another folder"
        )
    return folder


def is_trained_pair(heads: Path, lora: Path) -> bool:
    """Whether heads and LoRA were saved together: the LoRA is that beside the heads, or the heads those beside it.

    Copies count; so do heads that stayed frozen while the LoRA trained.
    """
    pairs = ((lora / _LORA_FILE, heads / LORA_DIR / _LORA_FILE), (heads / HEADS_FILE, lora.parent / HEADS_FILE))
    return any(
        one.is_file() and two.is_file() and (one.samefile(two) or file_sha256(one) == file_sha256(two))
        for one, two in pairs
    )


def lora_blocks(folder: Path) -> list[int]:
    """Numbers of the vision blocks that a PEFT folder holds weights for.

    Raises:
        ModelLoadError: the weights are missing or cannot be read.
    """
    file = folder / _LORA_FILE
    try:
        with safe_open(file, "pt") as stored:
            keys = list(stored.keys())
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file}: cannot be read ({str(error).splitlines()[0][:120]}); copy it again") from error
    return sorted({int(match[1]) for key in keys if (match := re.search(r"visual\.blocks\.(\d+)\.", key))})
