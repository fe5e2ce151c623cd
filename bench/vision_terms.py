"""What the terms evidence, sparsity and contrast_region do on a small task with few masks: the table of docs/vision.md.

    python bench/vision_terms.py [--steps 300] [--seeds 0 1 2] [--out FILE]

Images are drawn: smooth colours with noise; in a tampered one there are stripes inside a box. One tampered image in 40
has its mask, the others only their label, as in collected data. Heads on the frozen tiny tower (random weights, no
expert) train from one stage A with each set of terms; the numbers are of other drawn images, all of them with masks.
Prints JSON lines. A task of this kind shows what a term changes, not how much on photographs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIDE = 168
NO_MASK = {"dice": 0.0, "boundary": 0.0, "authentic": 0.0, "contrast_region": 0.0}
VARIANTS: dict[str, dict[str, float]] = {
    "none": {},
    "evidence 0.5": {"evidence": 0.5},
    "evidence 2": {"evidence": 2.0},
    "sparsity 0.5": {"sparsity": 0.5},
    "contrast 0.2": {"contrast_region": 0.2},
    "all": {"evidence": 0.5, "sparsity": 0.5, "contrast_region": 0.2},
}


def draw(folder: Path, count: int, seed: int, masks_every: int) -> Path:
    """`count` images, half of them tampered; every `masks_every`-th tampered one has its mask. The annotation file."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(40, 216, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
        row: dict[str, Any] = {"image_path": f"{number}.png", "label": number % 2}
        if number % 2:
            top, left = rng.integers(0, SIDE // 2, 2)
            height, width = rng.integers(SIDE // 4, SIDE // 2, 2)
            box = slice(top, top + height), slice(left, left + width)
            stripes = 12 * np.sign(np.sin(np.arange(SIDE)[box[1]] * np.pi / 3.5))  # 7 pixels to a period
            pixels[box] = np.clip(pixels[box] + stripes[None, :, None], 0, 255).astype(np.uint8)
            if number // 2 % masks_every == 0:
                mask = np.zeros((SIDE, SIDE), np.uint8)
                mask[box] = 255
                Image.fromarray(mask).save(folder / f"{number}_mask.png")
                row["mask_path"] = f"{number}_mask.png"
        else:
            row["mask_path"] = f"{SIDE}x{SIDE}"
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(row)
    path = folder / "annotations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run(folder: Path, name: str, start: Path, steps: int, seed: int, loss: dict[str, float], stage: str) -> Path:
    """One training; its folder."""
    from finetune.config import RunConfig, build
    from finetune.training.run import train

    groups = ["neck", "cls_head"] if stage == "a" else ["neck", "cls_head", "mask_head"]
    config = build(
        RunConfig,
        {
            "output_dir": str(folder / name),
            "seed": seed,
            "model": {"path": str(start), "dtype": "float32"},
            "heads": {
                "source": "vision",
                "mask": "none" if stage == "a" else "query",
                "vision_layers": [0, 1],
                "hidden_size": 32,
                "num_layers": 1,
                "num_heads": 4,
                "seed": seed,
            },
            "data": {
                "train": [str(folder / "train" / "annotations.json")],
                "eval": [str(folder / "val" / "annotations.json")],
            },
            "loss": {"text": 0.0, **(NO_MASK if stage == "a" else {"contrast_region": 0.0, "bce": 0.3}), **loss},
            "train": {
                "trainable": groups,
                "batch_size": 8,
                "eval_batch_size": 16,
                "max_steps": steps,
                "learning_rate": 2.0e-3,
                "warmup_ratio": 0.05,
                "eval_steps": steps,
                "metric_for_best": "eval_loss",
                "report_to": [],
                "feature_cache": str(folder / "features"),
                "trainer_args": {"disable_tqdm": True},
            },
        },
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    return folder / name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", metavar="FILE", help="also write the lines there")
    options = parser.parse_args()
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import build_tiny

    names = ("auroc", "pixel_f1", "pixel_iou", "false_positive_area")
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="forensics-bench-") as temporary:
        folder = Path(temporary)
        draw(folder / "train", 320, seed=0, masks_every=40)
        draw(folder / "val", 160, seed=1, masks_every=1)
        model = build_tiny(folder / "model", tokenizer_corpus())
        for seed in options.seeds:
            start = run(folder, f"a{seed}", model, options.steps // 2, seed, {}, "a") / "best"
            for number, (variant, loss) in enumerate(VARIANTS.items()):
                done = run(folder, f"b{seed}_{number}", start, options.steps, seed, loss, "b")
                history = json.loads((done / "history.json").read_text(encoding="utf-8"))
                last = [entry for entry in history if "eval_loss" in entry][-1]
                results[variant].append({name: last[f"eval_{name}"] for name in names})
                print(json.dumps({"terms": variant, "seed": seed, **results[variant][-1]}), flush=True)
    lines = [
        {"terms": variant, "seeds": len(rows)}
        | {name: [round(f(row[name] for row in rows), 3) for f in (_mean, min, max)] for name in names}
        for variant, rows in results.items()
    ]
    for line in lines:
        print(json.dumps(line))
    if options.out:
        Path(options.out).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    sys.exit(main())
