"""Mirrored records: the pixels in a box stay in its box, and a draw is always shown in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConfig
from finetune.data.dataset import ForensicDataset
from finetune.data.region_masking import Draw
from finetune.data.regions.mirroring import mirrored, mirrored_box
from finetune.data.regions.wording import load_region_template
from finetune.models.vocabulary import load_vocabulary
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import SpecialTokens

SIZE_HW = (70, 110)
BOXES = [[3, 5, 40, 20], [50, 30, 110, 70]]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A grey image whose boxes hold a colour each."""
    pixels = np.full((*SIZE_HW, 3), 128, np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(BOXES):
        pixels[y1:y2, x1:x2] = 0
        pixels[y1:y2, x1:x2, number] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    template = load_region_template("en")
    types: dict[str, str | None] = {"R1": "crack", "R2": None}
    regions = [{"id": name, "box_xyxy": box, "type": types[name]} for name, box in zip(types, BOXES, strict=True)]
    turns = (Turn("user", template.question()), Turn("assistant", template.answer(types)))
    image = ImageInput(path=str(tmp_path / "a.png"))
    provenance = {"regions": regions, "positive_region_ids": ["R1"]}
    return Record("wall", (image,), (ImageTarget(),), turns, provenance=provenance)


def shown(record: Record, kind: Any, position: int) -> tuple[list[list[int]], Image.Image]:
    with Image.open(record.images[0].path or "") as image:
        changed, (picture,) = mirrored(record, [image.convert("RGB")], kind, (0, position))
    return [entry["box_xyxy"] for entry in changed.provenance["regions"]], picture


@pytest.mark.parametrize(("kind", "ways"), [("none", 1), ("horizontal", 2), ("all", 8)])
def test_boxes_follow_the_pixels(record: Record, kind: Any, ways: int) -> None:
    """Every way is drawn, and in each the boxes hold exactly their colours."""
    seen = set()
    for position in range(60):
        boxes, picture = shown(record, kind, position)
        pixels = np.asarray(picture)
        inside = np.zeros(pixels.shape[:2], bool)
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            assert (pixels[y1:y2, x1:x2].reshape(-1, 3) == np.eye(3, dtype=int)[number] * 255).all()
            inside[y1:y2, x1:x2] = True
        assert (pixels[~inside] == 128).all()
        seen.add((picture.size, *map(tuple, boxes)))
    assert len(seen) == ways


def test_a_draw_is_shown_the_same_way_again(record: Record) -> None:
    for position in range(5):
        assert shown(record, "all", position)[0] == shown(record, "all", position)[0]


def test_twice_the_same_mirror_is_the_box_itself() -> None:
    for way in (1, 2, 3):
        assert mirrored_box(mirrored_box(BOXES[0], SIZE_HW, way), SIZE_HW, way) == tuple(BOXES[0])


def test_pixel_targets_are_left_alone(record: Record) -> None:
    marked = Record(
        "m", record.images, (ImageTarget(label=1, polygons=(((1.0, 1.0), (9.0, 1.0), (9.0, 9.0)),)),), record.turns,
        provenance=record.provenance,
    )  # fmt: skip
    assert {tuple(map(tuple, shown(marked, "all", position)[0])) for position in range(20)} == {
        tuple(map(tuple, BOXES))
    }


def test_the_question_names_the_mirrored_boxes(record: Record, tiny_dir: Path) -> None:
    """Text, region features and image of a numbered draw agree; a plain index is never mirrored."""
    processor = load_vocabulary(tiny_dir)[0]
    dataset = ForensicDataset(
        [record], processor, SpecialTokens(), DataConfig(mirror_regions="all"), region_features=True
    )
    plain = dataset[0]
    changed = [dataset[Draw(0, position)] for position in range(12)]
    assert len({tuple(sample.region_boxes) for sample in changed}) > 3
    for sample in [plain, *changed]:
        text = processor.tokenizer.decode(sample.input_ids)
        for number, box in enumerate(sample.region_boxes):
            assert f"R{number + 1}: {list(box)}\n" in text
        assert sample.processed_hw == [
            (round(sample.images[0].height / 28) * 28, round(sample.images[0].width / 28) * 28)
        ]
    assert plain.images[0].size == (SIZE_HW[1], SIZE_HW[0])
    assert dataset[Draw(0, 3)].input_ids == changed[3].input_ids
