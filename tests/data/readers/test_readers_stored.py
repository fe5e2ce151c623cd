"""One call reads what other tools made and what this project stored: the records survive the way through storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.images import load_image
from finetune.data.masks import load_mask
from finetune.data.readers import read_records, scan_records
from finetune.data.storage import open_writer


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_an_annotated_folder_survives_storage(tmp_path: Path, storage: Any) -> None:
    for name, size in (("a.png", (8, 6)), ("b.png", (5, 7))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).save(tmp_path / name)
    value = {
        "images": [
            {"id": 1, "file_name": "a.png", "height": 6, "width": 8},
            {"id": 2, "file_name": "b.png", "height": 7, "width": 5},
        ],
        "annotations": [{"image_id": 1, "segmentation": {"size": [6, 8], "counts": [7, 3, 2, 4, 32]}}],
    }
    (tmp_path / "c.json").write_text(json.dumps(value))
    records = read_records(tmp_path / "c.json", options={"mask_convention": "source_and_target"})
    out = tmp_path / "set"
    with open_writer(out, "train", storage) as writer:
        for record in records:
            writer.write(record)
    for path in (out, out / "train", *(out.glob("*.parquet") if storage == "parquet" else [out / "train.jsonl"])):
        again = read_records(path)
        assert [(r.id, r.label, r.provenance) for r in again] == [(r.id, r.label, r.provenance) for r in records]
        for old, new in zip(records, again, strict=True):
            pixels = np.asarray(load_image(old.images[0]))
            assert np.array_equal(np.asarray(load_image(new.images[0])), pixels)
            size = pixels.shape[:2]
            assert np.array_equal(load_mask(new.targets[0], size), load_mask(old.targets[0], size))
    assert "unknown option" in str(scan_records(out, options={"frame": "stored"})[1][0])


@pytest.mark.real_data
def test_a_real_folder_of_cracks(shared_data: Path) -> None:
    """Its own manifest.json is not taken for one of ours, and every mask fits its photograph."""
    records = read_records(shared_data / "deepcrack", options={"tampered": "images", "masks": "masks"})
    assert len(records) == 12
    for record in records:
        picture = load_image(record.images[0])
        mask = load_mask(record.targets[0], (picture.height, picture.width))
        assert mask is not None
        assert 0 < mask.mean() < 0.2
