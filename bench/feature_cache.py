"""What the cache of a frozen tower's features saves: the second epoch against the first, in the real trainer.

    python bench/feature_cache.py [--shape tiny] [--images 200] [--side 448] [--stages a b] [--out FILE]
    python bench/feature_cache.py --shape 3b --images 4 --side 448 --stages a

`tiny` is the model of `forensics tiny`, `3b` the vision tower of Qwen2.5-VL-3B with random weights (2.7 GB are written
to the temporary folder). Images are drawn JPEGs, half of them with a mask. An epoch is every step from reading the
files to the optimizer, without evaluation. Prints JSON lines: seconds of the wall clock and of the processor (which
another load on the machine does not change), and their ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

EPOCHS = 3
NO_MASK = {"dice": 0.0, "boundary": 0.0, "authentic": 0.0, "contrast_region": 0.0}
BLOCKS = {"tiny": [0, 1], "3b": [15, 23, 31]}


def draw(folder: Path, count: int, side: int) -> Path:
    """Smooth JPEGs with noise, every other one tampered; returns the annotation file."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.integers(-24, 25, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        mask = np.zeros((side, side), np.uint8)
        mask[side // 8 : side // 2, side // 4 : side // 2] = 255
        Image.fromarray(mask).save(folder / f"{number}.png")
        is_tampered = number % 2
        rows.append(
            {
                "image_path": f"{number}.jpg",
                "mask_path": f"{number}.png" if is_tampered else f"{side}x{side}",
                "label": is_tampered,
            }
        )
    path = folder / "annotations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def build(folder: Path, shape: str) -> Path:
    """A checkpoint with the tower of that shape and a language model of no size."""
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import TinyShape, build_tiny

    sizes: dict[str, Any] = {}
    if shape == "3b":
        sizes = {
            "vision_hidden_size": 1280,
            "vision_depth": 32,
            "vision_num_heads": 16,
            "vision_intermediate_size": 3420,
            "fullatt_block_indexes": (7, 15, 23, 31),
        }
    return build_tiny(folder, tokenizer_corpus(), TinyShape(**sizes))


def epochs(config: Any) -> tuple[list[dict[str, float]], Any]:
    """Seconds of each epoch of a run, and its trainer."""
    from transformers import TrainerCallback

    from finetune.training.run import build_trainer

    found: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.monotonic(), time.process_time()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = self.start
            found.append({"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu})

    with contextlib.redirect_stdout(io.StringIO()):
        trainer = build_trainer(config)[0]
        trainer.add_callback(Clock())
        trainer.train()
    return found, trainer


def measure(
    folder: Path, model: Path, annotations: Path, shape: str, stage: str, expert: bool, side: int
) -> dict[str, Any]:
    """One stage with an empty cache at first."""
    from finetune.config import RunConfig, build

    is_real = shape == "3b"
    name = f"{stage}{'_expert' if expert else ''}"
    residual = {"enabled": expert} if is_real else {
        "enabled": expert, "channels": 16, "widths": [16, 24, 32], "global_blocks": 1,
    }  # fmt: skip
    config = build(
        RunConfig,
        {
            "output_dir": str(folder / name),
            "model": {"path": str(model), "dtype": "float32"},
            "heads": {
                "source": "vision",
                "mask": "none" if stage == "a" else "query",
                "vision_layers": BLOCKS[shape],
                "hidden_size": 256 if is_real else 32,
                "num_layers": 2 if is_real else 1,
                "num_heads": 8 if is_real else 4,
                "noise_residual": residual,
            },
            "data": {"train": [str(annotations)]},
            "loss": {"text": 0.0, **(NO_MASK if stage == "a" else {})},
            "train": {
                "trainable": ["neck", "cls_head", *(["mask_head"] if stage == "b" else []),
                              *(["noise_residual"] if expert else [])],
                "batch_size": 4,
                "epochs": EPOCHS,
                "report_to": [],
                "feature_cache": str(folder / f"features_{name}"),
                "trainer_args": {"disable_tqdm": True, "save_strategy": "no"},
            },
        },
    )  # fmt: skip
    found, trainer = epochs(config)
    store = trainer.features.store
    sizes = [path.stat().st_size for path in store.folder.glob("??/*.safetensors")]
    return {
        "shape": shape,
        "stage": stage,
        "expert": expert,
        "images": len(sizes),
        "side": side,
        "megabytes_per_image": round(sum(sizes) / len(sizes) / 1e6, 3),
        "epochs": [{key: round(value, 2) for key, value in epoch.items()} for epoch in found],
        "ratio": round(found[0]["seconds"] / found[1]["seconds"], 2),
        "cpu_ratio": round(found[0]["cpu_seconds"] / found[1]["cpu_seconds"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=BLOCKS, default="tiny")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=448, help="pixels")
    parser.add_argument("--stages", choices=("a", "b"), nargs="+", default=["a", "b"])
    parser.add_argument("--no-expert", action="store_true", help="leave out the cases with the noise-residual expert")
    parser.add_argument("--out", metavar="FILE", help="also write the lines there")
    options = parser.parse_args()
    import torch

    lines: list[dict[str, Any]] = [
        {"platform": platform.platform(terse=True), "torch": torch.__version__, "threads": torch.get_num_threads()}
    ]
    print(json.dumps(lines[0]), flush=True)
    with tempfile.TemporaryDirectory(prefix="forensics-bench-") as name:
        folder = Path(name)
        annotations = draw(folder, options.images, options.side)
        model = build(folder / "model", options.shape)
        for stage in options.stages:
            for expert in (False, True)[: 1 if options.no_expert else 2]:
                lines.append(measure(folder, model, annotations, options.shape, stage, expert, options.side))
                print(json.dumps(lines[-1]), flush=True)
    if options.out:
        Path(options.out).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
