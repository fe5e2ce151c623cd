"""Counts parameters and computes the static training memory of the 3B and 7B shapes, on the meta device.

Nothing is downloaded and no memory is allocated: our own model class is built from the published sizes and its
parameters are counted. Nothing printed here is measured; the last column of the memory table is only an estimate.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from transformers.utils import logging

from finetune.config import HeadsConfig, LoraConfig, NoiseResidualConfig
from finetune.models.adapters import lora_matches
from finetune.models.qwen_forensics_model import HEAD_MODULES
from finetune.models.shapes import RELEASED, VISION, build_on_meta

GIB = 2**30
NUM_TOKENS = 33  # <cls> and <mask_1>..<mask_32>


def count(size: str) -> dict[str, int]:
    """Parameters by part; the heads twice, without and with the noise-residual expert."""
    plain = HeadsConfig()
    shape = RELEASED[size]
    model = build_on_meta(size, replace(plain, noise_residual=NoiseResidualConfig(enabled=True)))
    without = build_on_meta(size, plain)
    lora = LoraConfig()
    matched = [model.get_submodule(name) for name in lora_matches(model, lora.target_modules)]
    return {
        "language model": sum(p.numel() for p in model.model.language_model.parameters())
        + (0 if shape["tie_word_embeddings"] else model.lm_head.weight.numel()),
        "vision tower": sum(p.numel() for p in model.model.visual.parameters()),
        "token rows": NUM_TOKENS * shape["hidden_size"] * (1 if shape["tie_word_embeddings"] else 2),
        "cls head": _size(without, "cls_head"),
        "mask head (query)": _size(without, "mask_head"),
        "heads": _size(without, *HEAD_MODULES),
        "noise stream": _size(model, "noise_residual"),
        "heads + noise": _size(model, *HEAD_MODULES),
        "LoRA r=16": sum(lora.r * (layer.in_features + layer.out_features) for layer in matched),
    }


def memory(size: str, parts: dict[str, int], uses_lora: bool, tokens: int, answer: int) -> dict[str, float]:
    """GiB on one GPU without sharding.

    weights: frozen base in bf16, 2 bytes. trained: what trains in float32, 4 bytes, and PEFT's frozen original of the
    heads, 4 bytes. gradients: 4 bytes. adam: two float32 moments, 8 bytes. activations: an estimate for one image with
    gradient checkpointing: the input of every LLM block and the output of every tower block in bf16, and three float32
    copies of the logits at the answer's positions. Missing: what one block recomputes, the noise stream, the allocator.
    """
    base = parts["language model"] + parts["vision tower"]
    trained = parts["heads + noise"] + parts["token rows"] + (parts["LoRA r=16"] if uses_lora else 0)
    patches = 4 * tokens
    shape = RELEASED[size]
    activations = 2 * tokens * shape["hidden_size"] * shape["num_hidden_layers"]
    activations += 2 * patches * VISION["hidden_size"] * (VISION["depth"] + 1) + 3 * 4 * answer * shape["vocab_size"]
    return {
        "trained_parameters": trained,
        "weights": 2 * base / GIB,
        "trained": (4 * trained + 4 * parts["heads + noise"]) / GIB,
        "gradients": 4 * trained / GIB,
        "adam": 8 * trained / GIB,
        "activations": activations / GIB,
    }


def _size(model: Any, *modules: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in modules)


def main() -> None:
    """Print both tables, or one JSON object per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON line per model instead of tables")
    parser.add_argument("--tokens", type=int, default=1280, help="image tokens of the estimate (1280 = 1003520 pixels)")
    parser.add_argument("--answer", type=int, default=200, help="supervised tokens of the estimate")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    counted = {name: count(name) for name in RELEASED}
    plans = {
        f"{name} {stage}": memory(name, parts, stage == "stage 2, LoRA", arguments.tokens, arguments.answer)
        for name, parts in counted.items()
        for stage in ("stage 1", "stage 2, LoRA")
    }
    if arguments.json:
        for name, parts in counted.items():
            own = {plan: figures for plan, figures in plans.items() if plan.startswith(name)}
            print(json.dumps({"model": name, "parameters": parts, "memory_gib": own}))
        return
    print("parameters, counted on the meta device")
    for part in next(iter(counted.values())):
        print(f"  {part:<18}" + "".join(f"{name:>4} {parts[part]:>15,}" for name, parts in counted.items()))
    print("\nmemory on one GPU in GiB, computed, not measured (activations: an estimate)")
    columns = ("weights", "trained", "gradients", "adam", "sum", "activations")
    print(f"  {'':<18}{'parameters':>12}" + "".join(f"{column:>12}" for column in columns))
    for name, plan in plans.items():
        plan["sum"] = sum(plan[key] for key in columns[:4])
        print(f"  {name:<18}{plan['trained_parameters']:>12,.0f}" + "".join(f"{plan[key]:>12.2f}" for key in columns))


if __name__ == "__main__":
    main()
