"""Do two models compute the same? Logits, image scores and masks on fixed generated pictures.

The pictures are drawn from a seed, of sizes that are no multiple of the vision window; nothing is read or downloaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from finetune.errors import ModelLoadError
from finetune.models.loading import Bundle

TOLERANCE = 1e-4
"""Largest allowed difference: of scores and masks (in [0, 1]) and of logits divided by max(1, largest logit)."""

_SIZES_HW = ((140, 196), (84, 112))
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TEXTS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}请分析这张图片的真伪"
    '<|im_end|>\n<|im_start|>assistant\n{run}{{"result": "fake", "mask": [[1, 20], [3, 40]]}}<|im_end|>',
    "<|im_start|>user\n{image}Is this photo real?<|im_end|>\n<|im_start|>assistant\n{run}No.<|im_end|>",
)


@dataclass(frozen=True)
class Outputs:
    """What a model gives for the fixed pictures.

    logits: per picture (T, V) at every position. scores: (2,) or None without heads. masks: per picture (H, W) in
    [0, 1], empty without heads.
    """

    logits: list[Tensor]
    scores: Tensor | None
    masks: list[Tensor]


def probes(processor: Any, run: str) -> list[Any]:
    """Inputs of the two pictures, one batch each.

    Args:
        run: the forensic tokens, "" for a model without heads.
    """
    generator = np.random.default_rng(0)
    inputs = []
    for (height, width), text in zip(_SIZES_HW, _TEXTS, strict=True):
        smooth = np.linspace(0, 200, width)[None, :, None] + generator.normal(0, 20, (height, width, 3))
        picture = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
        inputs.append(processor(text=[text.format(image=_IMAGE, run=run)], images=[picture], return_tensors="pt"))
    return inputs


def outputs_of(bundle: Bundle) -> Outputs:
    """Outputs of a bundle; its model must be in evaluation mode."""
    run = _run_of(bundle)
    logits, scores, masks = [], [], []
    with torch.inference_mode():
        for batch in probes(bundle.processor, run):
            found = bundle.model(**batch.to(bundle.base.device))
            logits.append(found.logits[0].float().cpu())
            if bundle.base.has_heads:
                scores.append(found.cls_logits.float().sigmoid().cpu())
                masks.append(found.mask_logits[0].float().sigmoid().cpu())
    return Outputs(logits, torch.cat(scores) if scores else None, masks)


def plain_outputs(folder: Path, ours: Bundle) -> Outputs:
    """Logits of a plain folder through transformers' own classes, given the text that `ours` is given.

    Raises:
        ModelLoadError: weights missing or left over, or a processor that gives other inputs.
    """
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, attn_implementation="sdpa"
    )
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if odd:
        raise ModelLoadError(f"{folder}: {len(odd)} weights are missing or left over in the plain model, '{odd[0]}'")
    run = _run_of(ours)
    batches = probes(ours.processor, run)
    for found, expected in zip(probes(AutoProcessor.from_pretrained(folder), run), batches, strict=True):
        # Not the pixels: torchvision, if it is there, resizes by a hair's breadth differently from PIL.
        if any(not torch.equal(found[key], expected[key]) for key in ("input_ids", "image_grid_thw")):
            raise ModelLoadError(f"{folder}: the plain processor gives other inputs than ours")
    with torch.inference_mode():
        return Outputs([model.eval()(**batch).logits[0].float() for batch in batches], None, [])


def compare(expected: Outputs, found: Outputs) -> dict[str, float | None]:
    """Largest absolute differences of logits, scores and masks (None where a side has none), and the largest logit."""
    logits = max(_distance(a, b) for a, b in zip(expected.logits, found.logits, strict=True))
    result: dict[str, float | None] = {
        "logits": logits,
        "largest_logit": max(float(a.abs().max()) for a in expected.logits),
        "scores": None,
        "masks": None,
    }
    if expected.scores is not None and found.scores is not None:
        result["scores"] = _distance(expected.scores, found.scores)
        result["masks"] = max(_distance(a, b) for a, b in zip(expected.masks, found.masks, strict=True))
    return result


def worst(differences: dict[str, Any]) -> float:
    """The one number that is held against `TOLERANCE`; infinite where an output is not a number."""
    values = [differences["logits"] / max(1.0, differences["largest_logit"])]
    values += [differences[name] for name in ("scores", "masks") if differences[name] is not None]
    return max(values)


def _run_of(bundle: Bundle) -> str:
    """The forensic tokens, where heads read them."""
    return bundle.tokens.run if bundle.base.has_heads and not bundle.base.reads_tower else ""


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    distance = float((a - b).abs().max())
    return distance if math.isfinite(distance) else math.inf
