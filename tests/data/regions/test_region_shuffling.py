"""Shuffled candidates: ids move, and with them box, type, verdict and finding; nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConfig
from finetune.data.dataset import ForensicDataset
from finetune.data.region_masking import Draw
from finetune.data.regions.shuffling import shuffled
from finetune.data.regions.wording import load_region_template, parse_answer
from finetune.errors import DataFormatError
from finetune.models.vocabulary import load_vocabulary
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import SpecialTokens

TYPES = {"R1": "crack", "R2": None, "R3": "spall", "R4": None}
BOXES = {name: [10.0 * k, 5.0, 10.0 * k + 30, 60.0] for k, name in enumerate(TYPES)}


def make(path: Path) -> Record:
    Image.fromarray(np.zeros((84, 112, 3), np.uint8)).save(path)
    template = load_region_template("en")
    regions = [{"id": name, "box_xyxy": BOXES[name], "type": kind} for name, kind in TYPES.items()]
    turns = (Turn("user", template.question()), Turn("assistant", template.answer(TYPES)))
    provenance = {"task": "regions", "regions": regions, "positive_region_ids": ["R1", "R3"]}
    return Record("wall", (ImageInput(path=str(path)),), (ImageTarget(),), turns, provenance=provenance)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return make(tmp_path / "a.png")


def test_everything_about_a_region_moves_together(record: Record) -> None:
    """Of every draw: the same boxes with the same types, and an exact answer that says of each box what it said."""
    of_box = {tuple(BOXES[name]): kind for name, kind in TYPES.items()}
    orders = set()
    for position in range(200):
        found = shuffled(record, (0, position))
        entries = found.provenance["regions"]
        assert [entry["id"] for entry in entries] == list(TYPES)
        assert {tuple(entry["box_xyxy"]): entry["type"] for entry in entries} == of_box
        answer = parse_answer(found.turns[1].content, list(TYPES))
        assert answer.is_exact
        types = {finding.id: finding.type for finding in answer.findings}
        for entry in entries:
            assert answer.verdicts[entry["id"]] is (entry["type"] is not None)
            assert types.get(entry["id"]) == entry["type"]
        assert found.provenance["positive_region_ids"] == list(types)
        assert found.turns[0] == record.turns[0]
        assert found.provenance["task"] == "regions"
        orders.add(tuple(entry["box_xyxy"][0] for entry in entries))
    assert len(orders) == 24  # all orders of four


def test_a_draw_is_the_same_again_and_other_records_stay(record: Record) -> None:
    assert shuffled(record, (3, 7)) == shuffled(record, (3, 7))
    plain = Record("plain", (), (), (Turn("user", "hello"), Turn("assistant", "hi")))
    assert shuffled(plain, (0, 1)) is plain


@pytest.mark.parametrize("answer", ["R1 is broken.", '{"verdicts": {"R9": "normal"}, "abnormal": []}', "[]"])
def test_an_answer_of_another_form_is_refused_before_training(record: Record, tiny_dir: Path, answer: str) -> None:
    odd = replace(record, turns=(record.turns[0], Turn("assistant", answer)))
    with pytest.raises(DataFormatError, match=r"wall.*shuffle_regions: false|shuffle_regions: false.*wall"):
        shuffled(odd, (0, 0))
    processor = load_vocabulary(tiny_dir)[0]
    for shuffles, problems in ((True, ["wall"]), (False, [])):
        dataset = ForensicDataset([odd], processor, SpecialTokens(), DataConfig(shuffle_regions=shuffles))
        assert [error.record for error in dataset.check_lengths()] == problems


def test_question_features_and_answer_of_a_draw_agree(record: Record, tiny_dir: Path) -> None:
    """Only numbered draws are shuffled; with mirrors as well, the boxes of text and features are the same."""
    processor = load_vocabulary(tiny_dir)[0]
    settings = DataConfig(shuffle_regions=True, mirror_regions="all")
    dataset = ForensicDataset([record], processor, SpecialTokens(), settings, region_features=True)
    seen = set()
    for sample in [dataset[0], *(dataset[Draw(0, position)] for position in range(8))]:
        text = processor.tokenizer.decode(sample.input_ids)
        for number, box in enumerate(sample.region_boxes):
            assert f"R{number + 1}: {list(box)}\n" in text
        answer = text[text.index('{"verdicts"') : text.rindex("}") + 1]
        seen.add(tuple(json.loads(answer)["verdicts"].values()))
    assert len(seen) > 2
    assert dataset[0].input_ids == dataset[0].input_ids
