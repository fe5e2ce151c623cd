"""Features of a frozen vision tower, computed once and read afterwards: the store on disk and its place in a batch.

One safetensors file per image, named by the SHA-256 of the image's bytes, in a folder named by everything else that the
features depend on (weights, blocks, precision, pixel limits); so several runs and stages share a folder, and nothing
stale is ever read. When a cache is valid at all is `cache_problems`' part; the data side is `finetune.data.pictures`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedConfig

from finetune.config import RunConfig
from finetune.data.containers import backing_file, is_embedded, read_embedded
from finetune.data.image_frame import processed_size
from finetune.data.images import image_size_hw
from finetune.data.pictures import PictureDataset
from finetune.data.sources import spread
from finetune.data.storage.atomic import file_sha256
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput

logger = logging.getLogger(__name__)

FORMAT = 1
TOWER_GROUPS = ("vision_lora", "vision_top", "vision_full")
"""Trainable groups that change what the tower gives."""
_SAMPLED = 64
"""Records whose image sizes the estimate of the disk space is made from."""


def cache_folder(config: RunConfig) -> Path | None:
    """Where a run keeps its features, None where it keeps none: `auto` is for stages in which that is possible."""
    setting = config.train.feature_cache
    if not setting or setting == "off" or (setting == "auto" and cache_problems(config)):
        return None
    return Path(config.output_dir) / "features" if setting == "auto" else Path(setting)


def cache_problems(config: RunConfig) -> list[str]:
    """Why features computed once would not be those of every step, one line each; [] where they would."""
    train, name = config.train, "train.feature_cache"
    problems = []
    if config.heads.source != "vision" or not config.heads.enabled:
        problems.append(f"{name} is '{train.feature_cache}', but the heads read text; it needs heads.source: vision")
    if config.loss.text:
        problems.append(f"{name} holds what the heads read, not what the language model reads; set loss.text to 0")
    trained = [group for group in TOWER_GROUPS if group in train.trainable]
    if trained:
        problems.append(f"{name} needs a frozen vision tower, and train.trainable names {', '.join(trained)}")
    if config.region_masking.enabled:
        problems.append(f"{name}: region_masking changes the pixels at every draw; switch one of them off")
    if config.adversarial.share:
        problems.append(f"{name}: adversarial training changes what the tower sees or gives; switch one of them off")
    return problems


class FeatureStore:
    """Files of one fingerprint; may be sent to the data loader's workers.

    Args:
        folder: the fingerprint's own. needs_pixels: see `finetune.data.pictures.FeatureReader`.
    """

    def __init__(self, folder: Path, needs_pixels: bool) -> None:
        self.folder, self.needs_pixels = folder, needs_pixels
        self.is_full = False
        self._keys: dict[str, tuple[tuple[int, int], str]] = {}

    def key(self, image: ImageInput, record_id: str, source: str) -> str:
        """SHA-256 of the image file's bytes; a file that has not changed since is not read again.

        Raises:
            DataFormatError: the file cannot be read; names the record.
        """
        if image.path is None:
            return hashlib.sha256(image.data or b"").hexdigest()
        try:
            status = os.stat(backing_file(image.path))
            stamp = (status.st_mtime_ns, status.st_size)
            known = self._keys.get(image.path)
            if known is None or known[0] != stamp:
                is_inside = is_embedded(image.path)
                embedded = hashlib.sha256(read_embedded(image.path)).hexdigest() if is_inside else None
                known = self._keys[image.path] = (stamp, embedded or file_sha256(Path(image.path)))
        except OSError as error:
            raise DataFormatError(
                f"image file cannot be read ({error.strerror})",
                record=record_id,
                source=source,
                found=image.path,
                fix="check the path and its permissions",
            ) from error
        return known[1]

    def load(self, key: str) -> tuple[list[Tensor], tuple[int, int]] | None:
        """Maps (C, h, w), one per block, mapped from the file, and the original image's (H, W); None if not there.

        A damaged file (a power cut) is removed, said once, and counts as not there.
        """
        path = self._path(key)
        try:
            with safe_open(path, "pt") as stored:
                height, width = stored.metadata()["size_hw"].split(",")
                return [stored.get_tensor(name) for name in sorted(stored.keys())], (int(height), int(width))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s is damaged (%s): its features are computed anew", path, " ".join(str(error).split()))
            path.unlink(missing_ok=True)
            return None

    def save(self, key: str, maps: Sequence[Tensor], size_hw: tuple[int, int]) -> None:
        """Write one image's maps, whole or not at all; a full disk is said once, and the run goes on without."""
        if self.is_full:
            return
        path = self._path(key)
        temporary = path.with_name(
            f"{path.name}.{uuid.uuid4().hex}.tmp"
        )  # ranks, runs and hosts may meet the same image
        tensors = {f"{place:03d}": part.contiguous().cpu() for place, part in enumerate(maps)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save(tensors, {"size_hw": f"{size_hw[0]},{size_hw[1]}"}))
            os.replace(temporary, path)
        except OSError as error:
            self.is_full = True
            logger.warning(
                "features cannot be written to %s (%s): what is there is used, the rest is computed at every step; "
                "make room, or give another folder",
                self.folder, error.strerror,
            )  # fmt: skip
            temporary.unlink(missing_ok=True)

    def count(self) -> int:
        """How many images are stored."""
        return sum(1 for _ in self.folder.glob("??/*.safetensors"))

    def is_empty(self) -> bool:
        """Whether no image is stored."""
        return next(self.folder.glob("??/*.safetensors"), None) is None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


class FeatureCache:
    """Completes batches: features that the data loader found are taken, the others computed and stored.

    Args:
        model: the `QwenForensicsForConditionalGeneration`, its tower frozen.
        processor: with the pixel limits of the run.
        folder: the user's; a subfolder per fingerprint is made in it.
        autocast: context in which the model runs its steps, so that the cached values are those of an uncached step.
        precision: name of that context, part of the fingerprint.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        folder: Path,
        autocast: Callable[[], AbstractContextManager],
        precision: str = "no",
    ) -> None:
        self.model, self.autocast = model, autocast
        settings = _settings(model, processor.image_processor, precision)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.store = FeatureStore(folder / digest, needs_pixels=hasattr(model, "noise_residual"))
        self.settings = settings
        self.num_computed = 0

    def prepare(self, datasets: Sequence[PictureDataset | None]) -> str:
        """Make the folder and hand the store to the data sets.

        Returns:
            A line for the user: where, how many images, how much disk they will take.

        Raises:
            ConfigError: the disk has no room for them, or the folder cannot be written.
        """
        used = [dataset for dataset in datasets if dataset is not None]
        num_images = len({image.path or id(image) for d in used for record in d.records for image in record.images})
        each = sum(self._bytes(dataset) * len(dataset) for dataset in used) / max(sum(map(len, used)), 1)
        folder = self.store.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "features.json").write_text(json.dumps(self.settings, indent=2), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"train.feature_cache: {folder} cannot be written ({error.strerror}); give another folder, or false"
            ) from error
        present, free = self.store.count(), shutil.disk_usage(folder).free
        missing = max(num_images - present, 0)
        if missing * each > free:
            raise ConfigError(
                f"train.feature_cache: the features of {missing} images need about {missing * each / 1e9:.2f} GB, "
                f"and {free / 1e9:.2f} GB are free at {folder}; give another folder, or lower "
                "data.max_pixels, or set it to false"
            )
        for dataset in used:
            dataset.features = self.store
        return (
            f"features: {folder}, about {num_images * each / 1e9:.2f} GB for {num_images} images "
            f"({each / 1e6:.2f} MB each), {present} stored, {free / 1e9:.1f} GB free"
        )

    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A collator's batch with `tower_maps`, on the device of its other tensors; batches without keys are untouched.

        `pixel_values` stay where the noise-residual stream reads them.
        """
        if "feature_keys" not in batch:
            return batch
        batch = dict(batch)
        keys, index = batch.pop("feature_keys"), batch.pop("pixel_index")
        cached, sizes = list(batch.pop("cached_maps")), batch.pop("feature_sizes_hw")
        missing = [i for i, maps in enumerate(cached) if maps is None]
        if missing:
            grid = batch["image_grid_thw"]
            parts = dict(zip(index, batch["pixel_values"].split(grid[index].prod(dim=1).tolist()), strict=True))
            content = batch.get("content_sizes_hw")
            own = None if content is None else [content[i] for i in missing]
            with torch.no_grad(), self.autocast():
                blocks = self.model.tower_maps(torch.cat([parts[i] for i in missing]), grid[missing], own)
            for place, i in enumerate(missing):
                cached[i] = [block[place] for block in blocks]
                self.store.save(keys[i], cached[i], sizes[i])
            self.num_computed += len(missing)
        batch["tower_maps"] = [list(block) for block in zip(*cached, strict=True)]
        if not self.store.needs_pixels:
            batch.pop("pixel_values", None)
        return batch

    def _bytes(self, dataset: PictureDataset) -> float:
        """Bytes per image, from the headers of records at even distances."""
        vision = self.model.config.vision_config
        size = next(self.model.model.visual.parameters()).element_size()
        per_patch = len(self.model.heads_config.vision_layers) * vision.hidden_size * size
        sampled = spread(dataset.records, _SAMPLED)
        image_processor = dataset.processor.image_processor
        total = 0
        for record in sampled:
            for image in record.images:
                height, width = processed_size(image_size_hw(image, record.id, record.source), image_processor)
                total += height * width // vision.patch_size**2 * per_patch
        return total / max(len(sampled), 1)


def _settings(model: Any, image_processor: Any, precision: str) -> dict[str, Any]:
    """Everything the features of an image depend on, besides its bytes."""
    tower, everyones = model.model.visual, PreTrainedConfig().to_dict()  # names, label maps: not the tower's own
    vision = {k: v for k, v in model.config.vision_config.to_dict().items() if k not in everyones}
    pixels = {k: v for k, v in image_processor.to_dict().items() if not k.endswith(("_type", "_class"))}
    return {
        "format": FORMAT,
        "blocks": [block % model.config.vision_config.depth for block in model.heads_config.vision_layers],
        "weights": weights_hash(tower),
        "lora": {name: dict(m.scaling) for name, m in tower.named_modules() if hasattr(m, "lora_A")},  # alpha / r
        "dtype": str(next(tower.parameters()).dtype),
        "precision": precision,
        "attention": model.config.vision_config._attn_implementation,
        "tower": vision,
        "pixels": pixels,
    }


def weights_hash(tower: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of every weight of a module, in their own precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
