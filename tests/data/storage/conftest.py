"""Drawn images and masks, and records of every kind about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.schema import ImageInput, ImageTarget, Record, Turn

MakeRecords = Callable[..., list[Record]]


@pytest.fixture
def make_records(tmp_path: Path) -> MakeRecords:
    """`make_records(count)`: deterministic records whose files lie in `tmp_path/source`."""

    def draw(count: int, size_hw: tuple[int, int] = (40, 56)) -> list[Record]:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        return [_record(folder, number, size_hw) for number in range(count)]

    return draw


def _record(folder: Path, number: int, size_hw: tuple[int, int]) -> Record:
    """Record k: k % 4 = 0 authentic with HxW; 1 tampered with a mask file; 2 two images, polygons, embedded bytes and a
    conversation; 3 unlabelled."""
    rng = np.random.default_rng(number)
    height, width = size_hw
    pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image_path = folder / f"Tp_{number}.jpg"
    Image.fromarray(pixels).save(image_path, quality=90)
    name, group = f"r{number}", f"photo {number // 2}"
    image = ImageInput(path=str(image_path))
    kind = number % 4
    if kind == 0:
        target = ImageTarget(label=0, mask_size_hw=size_hw, evidence="边缘一致")
        return Record(
            name, (image,), (target,), group=group, provenance={"operation": None, "seed": [7, "train", number]}
        )
    if kind == 1:
        mask = np.zeros(size_hw, np.uint8)
        mask[8:24, 16:40] = 255
        mask_path = folder / f"mask_{number}.png"
        Image.fromarray(mask).save(mask_path)
        target = ImageTarget(label=1, mask_path=str(mask_path), polygons=(((16, 8), (40, 8), (40, 24), (16, 24)),))
        return Record(
            name,
            (image,),
            (target,),
            group=group,
            provenance={"operation": {"name": "splice", "scale": 1.5, "donor": "x"}},
        )
    if kind == 2:
        embedded = ImageInput(data=image_path.read_bytes())
        polygon = ((2.5, 3.0), (20.0, 3.0), (20.0, 30.25))
        turns = (Turn("user", "<image><image>哪一张是伪造的?"), Turn("assistant", "第二张"), Turn("user", "why?"))
        targets = (ImageTarget(label=0), ImageTarget(label=1, polygons=(polygon,), evidence=""))
        return Record(name, (image, embedded), targets, turns, provenance={"operation": {"name": "erase", "radius": 3}})
    return Record(
        name, (image,), (ImageTarget(),), (Turn("system", "s"), Turn("user", "<image>"), Turn("assistant", "?"))
    )
