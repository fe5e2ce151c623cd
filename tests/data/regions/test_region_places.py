"""Which tokens name which region: exactly those of its id in the list, at the place they have in the batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConfig
from finetune.data.chat import Segment, encode, segments, token_spans
from finetune.data.collator import ForensicCollator
from finetune.data.dataset import ForensicDataset
from finetune.data.regions.places import region_places
from finetune.data.regions.text import expand_regions, resized_box
from finetune.data.regions.wording import load_region_template
from finetune.errors import DataFormatError
from finetune.models.tiny import train_tokenizer
from finetune.models.vocabulary import load_vocabulary
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import SpecialTokens

IDS = ["R1", "R2", "R10", "区域7", "Left12"]


def record_of(path: Path, ids: list[str], question: str | None = None) -> Record:
    Image.fromarray(np.zeros((120, 200, 3), np.uint8)).save(path)
    regions = [{"id": name, "box_xyxy": [k, k, 50 + 20 * k, 60], "type": None} for k, name in enumerate(ids)]
    template = load_region_template("zh")
    turns = (Turn("user", question or template.question()), Turn("assistant", template.answer(dict.fromkeys(ids))))
    image = ImageInput(path=str(path))
    return Record("wall", (image,), (ImageTarget(),), turns, provenance={"regions": regions, "positive_region_ids": []})


@pytest.fixture(scope="module")
def processor(tiny_dir: Path) -> Any:
    return load_vocabulary(tiny_dir)[0]


def dataset(record: Record, processor: Any, **options: Any) -> ForensicDataset:
    return ForensicDataset([record], processor, SpecialTokens(), DataConfig(), **options)


def test_the_tokens_are_those_of_the_ids(processor: Any, tmp_path: Path) -> None:
    """Also where an id begins another, and where a character takes several tokens."""
    record = record_of(tmp_path / "a.png", IDS)
    sample = dataset(record, processor, region_features=True)[0]
    without = dataset(record, processor)[0]
    assert sample.input_ids == without.input_ids
    assert (without.region_boxes, without.region_tokens) == ([], [])
    written = [processor.tokenizer.decode([sample.input_ids[t] for t in places]) for places in sample.region_tokens]
    assert written == IDS
    (processed,) = sample.processed_hw
    boxes = [resized_box(region["box_xyxy"], (120, 200), processed) for region in record.provenance["regions"]]
    assert sample.region_boxes == boxes
    for box, places in zip(boxes, sample.region_tokens, strict=True):
        behind = processor.tokenizer.decode(sample.input_ids[places[-1] + 1 :])
        assert behind.startswith(f": {list(box)}\n")


def test_spans_are_those_of_the_ids(processor: Any) -> None:
    """One span per id, in order, and each id written again from its characters."""
    pieces = [Segment("<|im_start|>user\n", False), Segment("坐标 R1: [12, 3]", False), Segment("好 ok", True)]
    ids, _ = encode(pieces, processor.tokenizer, [])
    text, spans = token_spans(pieces, processor.tokenizer, [])
    assert text == "".join(piece.text for piece in pieces)
    assert len(spans) == len(ids)
    assert processor.tokenizer.decode(ids) == text
    covered = sorted(set(spans))
    assert (covered[0][0], covered[-1][1]) == (0, len(text))
    assert all(before[1] == after[0] for before, after in itertools.pairwise(covered))


def test_every_list_of_the_question_counts(processor: Any, tmp_path: Path) -> None:
    record = record_of(tmp_path / "a.png", ["R1", "R2"], "<image><regions> once more: <regions>")
    sample = dataset(record, processor, region_features=True)[0]
    assert [processor.tokenizer.decode([sample.input_ids[t] for t in places]) for places in sample.region_tokens] == [
        "R1R1",
        "R2R2",
    ]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_batch_counts_padding(processor: Any, tmp_path: Path, padding_side: Any) -> None:
    long = dataset(record_of(tmp_path / "a.png", IDS), processor, region_features=True)[0]
    short = dataset(record_of(tmp_path / "b.png", ["R1"]), processor, region_features=True)[0]
    plain = Record("plain", (), (), (Turn("user", "hello"), Turn("assistant", "hi")))
    other = dataset(plain, processor, region_features=True)[0]
    batch = ForensicCollator(processor, SpecialTokens(), padding_side)([long, short, other])
    assert batch["region_index"].shape == batch["input_ids"].shape
    assert batch["region_boxes"].shape == (3, 5, 4)
    assert batch["region_boxes"][0].tolist() == [list(map(float, box)) for box in long.region_boxes]
    assert not batch["region_boxes"][1, 1:].any()
    assert not batch["region_boxes"][2].any()
    for row, names in enumerate((IDS, ["R1"], [])):
        for number, name in enumerate(names):
            named = batch["input_ids"][row][batch["region_index"][row] == number + 1]
            assert processor.tokenizer.decode(named) == name
        assert batch["region_index"][row].max() == len(names)
    without = ForensicCollator(processor, SpecialTokens())([other])
    assert "region_index" not in without


def test_an_id_joined_to_its_neighbour_is_refused(tmp_path: Path) -> None:
    """`-:` is one token of this tokenizer: what would be added to the id would stand at the colon too."""
    tokenizer = train_tokenizer(["R-: ["] * 50, 300)
    record = record_of(tmp_path / "a.png", ["R1", "R-"])
    turns = expand_regions(record, record.turns, [(120, 200)], [(112, 196)])
    with pytest.raises(DataFormatError, match=r"wall.*R-|R-.*wall"):
        region_places(record, segments(turns, ""), tokenizer, [28], [(120, 200)], [(112, 196)])


def test_a_question_without_the_list_is_refused_before_training(processor: Any, tmp_path: Path) -> None:
    record = record_of(tmp_path / "a.png", ["R1"], "<image>Any defect?")
    (problem,) = dataset(record, processor, region_features=True).check_lengths()
    assert problem.record == "wall"
    assert "model.region_features: false" in str(problem)
    assert dataset(record, processor).check_lengths() == []
