"""How far the memory estimate of `forensics doctor --hardware` is from what runs on the CPU really take.

    OMP_NUM_THREADS=1 python bench/training_memory.py [--out bench/results/training_memory_2core_cpu.json]

None of these cases is one that the formulae were adjusted on (those are in tests/training/test_memory.py): width,
depth, length, batch, optimizer, LoRA rank and checkpointing differ. Each case trains two steps in a process of its own
after a run of the smallest model. Measured are: by how much the peak of resident memory grew, to hold against the whole
estimate, and the bytes that autograd keeps for the backward pass, which are the same on every device, to hold against
the activations (with checkpointing, these also have the layer that is computed again). Prints JSON lines.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HEADS = ["cls_head", "mask_head", "noise_residual"]
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"hidden_size": 256, "num_layers": 24, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 1024},
    "wide": {"hidden_size": 768, "num_layers": 8, "num_heads": 12, "num_kv_heads": 4, "intermediate_size": 2304},
}
VISION = {
    "vision_hidden_size": 160, "vision_depth": 6, "vision_num_heads": 4, "vision_intermediate_size": 320,
    "fullatt_block_indexes": (2, 5), "vocab_size": 900,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "lora r64, checkpointing, longer": {
        "shape": "wide", "max_pixels": 28 * 28 * 48, "side": (224, 168), "lora": {"r": 64, "dropout": 0.0},
        "train": {"trainable": [*HEADS, "new_tokens", "lm_lora"], "batch_size": 8, "gradient_checkpointing": True},
    },
    "lora r8 with dropout": {
        "shape": "narrow", "max_pixels": 28 * 28 * 24, "side": (168, 112), "lora": {"r": 8, "dropout": 0.1},
        "train": {"trainable": [*HEADS, "new_tokens", "lm_lora"], "batch_size": 12},
    },
    "full, sgd": {
        "shape": "wide", "max_pixels": 28 * 28 * 24, "side": (168, 112), "lora": {},
        "train": {"trainable": [*HEADS, "lm_full"], "batch_size": 3, "optim": "sgd"},
    },
    "full, adafactor, checkpointing": {
        "shape": "wide", "max_pixels": 28 * 28 * 24, "side": (168, 112), "lora": {},
        "train": {"trainable": [*HEADS, "lm_full"], "batch_size": 8, "optim": "adafactor",
                  "gradient_checkpointing": True},
    },
    "stage 1, large batch": {
        "shape": "narrow", "max_pixels": 28 * 28 * 48, "side": (224, 168), "lora": {},
        "train": {"trainable": [*HEADS, "new_tokens"], "batch_size": 16},
    },
}  # fmt: skip
GROWTH = """
import resource, sys, torch
from finetune.config import load_config
from finetune.training.run import train
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
train(load_config(sys.argv[1]))
before = peak()
train(load_config(sys.argv[2]))
print("found", peak() - before)
"""
SAVED = """
import sys, torch
from finetune.config import load_config
from finetune.training.run import build_trainer
torch.set_num_threads(1)
config = load_config(sys.argv[2])
config.train.max_steps = 1
trainer = build_trainer(config)[0]
weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
sizes, alive, compute_loss = {}, [], trainer.compute_loss
def keep(tensor):
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in weights:
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # else another one could take its address
    return tensor
def watched(*arguments, **keywords):
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return compute_loss(*arguments, **keywords)
trainer.compute_loss = watched
trainer.train()
print("found", sum(sizes.values()))
"""


def build_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A model of random weights, once."""
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import TinyShape, build_tiny

    return folder if folder.is_dir() else build_tiny(folder, tokenizer_corpus(), TinyShape(**VISION, **shape))


def build_data(folder: Path, size_hw: tuple[int, int]) -> Path:
    """Thirty-two generated records of one size, once."""
    from finetune.data.synthesis.config import SynthConfig
    from finetune.data.synthesis.generator import synthesize

    if not folder.is_dir():
        synthesize(SynthConfig(num_train=32, num_eval=2, workers=1, sizes_hw=(size_hw,)), folder, progress=False)
    return folder / "train.jsonl"


def write_config(path: Path, model: Path, data: Path, case: dict[str, Any]) -> Path:
    """The YAML of a case's run."""
    train = dict(case["train"])
    trainer_args = {"save_strategy": "no", "disable_tqdm": True, "optim": train.pop("optim", "adamw_torch")}
    tree = {
        "output_dir": str(path.with_suffix("")),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [str(data)], "eval": [], "max_length": 2048, "max_pixels": case["max_pixels"]},
        "lora": case["lora"],
        "train": {**train, "max_steps": 2, "precision": "fp32", "text_retention": False, "report_to": [],
                  "trainer_args": trainer_args},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def longest(config: Any) -> int:
    """Tokens of the longest training record."""
    from finetune.data.dataset import load_dataset
    from finetune.models.loading import load_vocabulary

    processor, tokens, _ = load_vocabulary(config.model.path, None, config.data.min_pixels, config.data.max_pixels)
    dataset = load_dataset(config.data.train, "train", processor, tokens, config.data)
    return max(map(dataset.num_tokens, range(len(dataset))))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Estimate and measurement of one case."""
    from finetune.config import load_config
    from finetune.training.memory import Layout, estimate

    case = CASES[name]
    data = build_data(folder / f"data{case['side'][0]}", case["side"])
    tiny = {"shape": "narrow", "max_pixels": 28 * 28 * 4, "lora": {}, "train": {**case["train"], "batch_size": 1}}
    model = build_model(folder / case["shape"], SHAPES[case["shape"]])
    smallest = build_model(folder / "smallest", {**SHAPES["narrow"], "hidden_size": 64, "num_layers": 1})
    small = write_config(folder / "small.yaml", smallest, data, tiny)
    path = write_config(folder / "measured.yaml", model, data, case)
    grown, saved = (_number_from(probe, small, path) for probe in (GROWTH, SAVED))
    config = load_config(path)
    config.data.max_length = longest(config)  # what is estimated for unknown data is known here
    found = estimate(config, Layout("cpu"), 1)
    expected = found.total - found.workspace
    parts = {part: round(getattr(found, part) / 1e6) for part in ("weights", "gradients", "optimizer", "activations")}
    return {
        "case": name,
        "tokens": config.data.max_length,
        **parts,
        "estimated_mb": round(expected / 1e6),
        "resident_growth_mb": round(grown / 1e6),
        "estimate_by_growth": round(expected / grown, 2),
        "saved_for_backward_mb": round(saved / 1e6),
        "activations_by_saved": round(found.activations / saved, 2),
    }


def _number_from(program: str, *configs: Path) -> int:
    """What a program prints after `found`, in a process of its own whose C library returns freed tensors at once."""
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, configs)],
        env={**os.environ, **malloc, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return int(done.stdout.rsplit("found", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", help="also write the results to this file")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            results.append(measure(name, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        report = {
            "command": "OMP_NUM_THREADS=1 python bench/training_memory.py",
            "hardware": f"{os.cpu_count()} CPU cores, no GPU",
            "versions": {"python": platform.python_version(), **versions},
            "results": results,
        }
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
