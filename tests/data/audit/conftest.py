"""Small drawn data sets: twins of one picture, saved alike unless a test says otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

SIZE = (96, 72)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Structure at several scales, different for every seed; file lengths differ more than an edit changes them."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for side, weight in ((3, 50), (6, 40), (24, 20)):
        noise = Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).resize(size, Image.BICUBIC)
        total += weight * (np.asarray(noise) / 127.5 - 1)
    total += rng.normal(0, rng.uniform(1, 12), total.shape)
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


def tampered(image: Image.Image, seed: int) -> tuple[Image.Image, Image.Image]:
    """The picture with a patch of another one, and its mask."""
    rng = np.random.default_rng(seed + 10_000)
    width, height = image.size
    x, y = int(rng.integers(2, width // 2)), int(rng.integers(2, height // 2))
    box = (x, y, x + width // 3, y + height // 3)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return Image.composite(picture(seed + 500, image.size), image, mask), mask


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """make_set(name, pairs=12, first=0, save=..., record=..., extra=[...]) -> path of a .jsonl file.

    `save(image, path_without_suffix, label) -> file name` and `record(fields, label, pair) -> fields` change the set.
    """

    def make(
        name: str = "train",
        pairs: int = 12,
        first: int = 0,
        save: Callable[[Image.Image, Path, int], str] | None = None,
        record: Callable[[dict[str, Any], int, int], dict[str, Any]] | None = None,
        extra: list[dict[str, Any]] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        records = []
        for pair in range(first, first + pairs):
            original = picture(pair)
            edited, mask = tampered(original, pair)
            mask.save(folder / f"m{pair:03d}.png")
            for label, image in ((0, original), (1, edited)):
                stem = folder / f"{2 * pair + (label + pair) % 2:05d}"
                file = save(image, stem, label) if save else _save(image, stem)
                masks = [f"m{pair:03d}.png" if label else f"{image.height}x{image.width}"]
                fields = {
                    "id": f"{name}-{stem.name}", "group": f"photo_{pair}", "images": [file], "labels": [label],
                    "masks": masks,
                }  # fmt: skip
                records.append(record(fields, label, pair) if record else fields)
        path = tmp_path / name / "data.jsonl"
        lines = [json.dumps(fields, ensure_ascii=False) for fields in [*records, *(extra or [])]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make


def _save(image: Image.Image, stem: Path) -> str:
    image.save(f"{stem}.png")
    return f"{stem.name}.png"
