"""Inpaint by diffusion: a local diffusers inpainting pipeline paints into a region. Needs the extra `diffusion` and a
folder the user gives; nothing is downloaded, only safetensors are read.

torch and diffusers are imported when the operation runs, by name, since the data layer works without them.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from finetune.data.synthesis.operations.edits import DrawDonor, Edit, OperationSettings, draw_feather
from finetune.data.synthesis.regions import DoesNotFitError, draw_region, soft_edge
from finetune.errors import ConfigError, MissingDependencyError

PROMPTS = (
    "background, nothing else",
    "a plain wall",
    "green grass",
    "a wooden table",
    "a person",
    "a cat",
    "a parked car",
    "a bunch of flowers",
    "a road sign",
    "a cardboard box",
)
"""What may be asked for; everyday things, and twice the removal of what was there."""
SIDE_MULTIPLE = 64
"""Pipelines halve the picture up to six times: 8x by the autoencoder, 8x by the network."""


def check_diffusion(settings: OperationSettings) -> None:
    """Refuse settings with which `inpaint_diffusion` cannot run, before anything is made.

    Raises:
        ConfigError: no folder is given, or it holds no diffusers pipeline.
        MissingDependencyError: diffusers or torch is not installed.
    """
    folder = settings.diffusion_model
    if not folder:
        raise ConfigError(
            "synth: operations.inpaint_diffusion has a weight but operation_settings.diffusion_model is not set; give"
            " the folder of a local diffusers inpainting pipeline"
        )
    if not (Path(folder) / "model_index.json").is_file():
        raise ConfigError(
            f"synth: operation_settings.diffusion_model is {folder!r}, expected a saved diffusers pipeline (a"
            " folder with model_index.json); nothing is downloaded"
        )
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"inpaint_diffusion needs {' and '.join(missing)}; install with: pip install 'qwen-forensics[diffusion]'"
        )


def inpaint_diffusion(
    host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor
) -> Edit:
    """Paint something new into a region with the user's pipeline; only pixels of the region are taken from it."""
    del draw_donor
    check_diffusion(settings)
    assert settings.diffusion_model is not None
    region, parameters = draw_region(host, rng, settings.area_ranges["inpaint_diffusion"], settings.shape_weights)
    feather = draw_feather(rng, settings)
    prompt, seed = PROMPTS[int(rng.integers(len(PROMPTS)))], int(rng.integers(2**31))
    content = _paint(host, soft_edge(region, feather) > 0, prompt, seed, settings)
    parameters |= {
        "model": Path(settings.diffusion_model).name,
        "prompt": prompt,
        "seed": seed,
        "steps": settings.diffusion_steps,
        "guidance": settings.diffusion_guidance,
    }
    return Edit(content, region, feather, parameters)


def _paint(host: np.ndarray, hole: np.ndarray, prompt: str, seed: int, settings: OperationSettings) -> np.ndarray:
    """(H, W, 3) uint8: the pipeline's whole picture, brought back to the host's size."""
    assert settings.diffusion_model is not None
    pipeline = load_pipeline(settings.diffusion_model, settings.diffusion_device)
    torch = importlib.import_module("torch")
    height, width = (max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE) for side in host.shape[:2])
    picture = cv2.resize(host, (width, height), interpolation=cv2.INTER_CUBIC)
    mask = cv2.resize(hole.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_NEAREST)
    result = pipeline(
        prompt=prompt,
        image=Image.fromarray(picture),
        mask_image=Image.fromarray(mask),
        height=height,
        width=width,
        strength=1.0,
        num_inference_steps=settings.diffusion_steps,
        guidance_scale=settings.diffusion_guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    if any(getattr(result, "nsfw_content_detected", None) or ()):
        raise DoesNotFitError("the pipeline's safety checker refused the picture")
    painted = np.asarray(result.images[0].convert("RGB"))
    return cv2.resize(painted, host.shape[1::-1], interpolation=cv2.INTER_CUBIC)


@lru_cache(maxsize=1)
def load_pipeline(folder: str, device: str) -> Any:
    """The inpainting pipeline of a local folder, kept for the process.

    Args:
        folder: a pipeline saved with `save_pretrained`.
        device: `cpu` (float32), or `cuda`, `cuda:N` (float16).

    Raises:
        ConfigError: the folder is no inpainting pipeline, holds no safetensors, or the device does not exist.
    """
    importlib.import_module("finetune.torchvision_compat").ensure_torchvision()  # its text encoder's module imports it
    diffusers, torch = importlib.import_module("diffusers"), importlib.import_module("torch")
    try:
        pipeline = diffusers.AutoPipelineForInpainting.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32 if device == "cpu" else torch.float16,
        ).to(device)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"synth: diffusion_model {folder!r} cannot be used on {device!r}: {first}; expected an inpainting pipeline"
            " saved with save_pretrained(safe_serialization=True)"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
