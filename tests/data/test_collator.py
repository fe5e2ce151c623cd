"""Records become samples and samples a batch: nothing cut, nothing skipped, every target at its place and size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import DataConfig, SourceConfig
from finetune.data.answer_polygons import scale_polygons
from finetune.data.collator import MODEL_KEYS, ForensicCollator
from finetune.data.dataset import (
    ForensicDataset,
    load_dataset,
    processed_size,
)
from finetune.data.readers import read_records
from finetune.data.sources import read_sources, spread
from finetune.data.synthesis.image_files import encode_numbers
from finetune.errors import DataFormatError
from finetune.models.loading import add_forensic_tokens, load_processor
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import SpecialTokens

TOKENS = SpecialTokens()


@pytest.fixture(scope="module")
def processor(tiny_dir: Path) -> Any:
    processor = load_processor(tiny_dir)
    add_forensic_tokens(processor.tokenizer, TOKENS)
    return processor


@pytest.fixture(scope="module")
def records(photo_records: Path) -> dict[str, Record]:
    return {record.id: record for record in read_records(str(photo_records))}


@pytest.fixture(scope="module")
def make(processor: Any, records: dict[str, Record]) -> Any:
    """Dataset of named records (all by default); keyword arguments are fields of `DataConfig`."""

    def dataset(*names: str, **config: Any) -> ForensicDataset:
        chosen = [records[name] for name in names or records]
        return ForensicDataset(chosen, processor, TOKENS, DataConfig(**config))

    return dataset


@pytest.fixture(scope="module")
def collate(processor: Any, make: Any) -> Any:
    def batch(*names: str, padding_side: Any = "right", **config: Any) -> dict[str, Any]:
        dataset = make(*names, **config)
        return ForensicCollator(processor, TOKENS, padding_side)([dataset[i] for i in range(len(dataset))])

    return batch


def text(sample: Any, processor: Any) -> str:
    pieces = processor.tokenizer.decode(sample.input_ids).split("<|image_pad|>")
    return "".join(piece for piece in pieces if piece)


# ---- samples ----


def test_several_edits_arrive_at_the_size_of_the_mask(
    processor: Any, records: dict[str, Record], tmp_path: Path
) -> None:
    """Two edits one beside the other, numbered by the mask; beside it an authentic image and one without a mask."""
    numbers = np.zeros((150, 211), dtype=np.uint8)
    numbers[20:90, 100:140], numbers[20:90, 140:180] = 1, 2
    path = tmp_path / "mask.png"
    path.write_bytes(encode_numbers(numbers))
    several = dataclasses.replace(
        records["tampered_150x211"],
        targets=(ImageTarget(label=1, mask_path=str(path)),),
        provenance={"operation": {"name": "erase"}, "further_operations": [{"name": "splice"}]},
    )
    dataset = ForensicDataset(
        [several, records["real_84x140"], records["unmasked_140x84"]], processor, TOKENS, DataConfig()
    )
    dataset.operations = ["splice", "erase"]
    batch = ForensicCollator(processor, TOKENS)([dataset[i] for i in range(3)])
    found, authentic, unknown = batch["operation_maps"]
    assert torch.equal(found != 0, batch["mask_targets"][0] != 0)
    row = found[50][found[50] != 0].tolist()
    edge = row.index(1)
    assert row == [2] * edge + [1] * (len(row) - edge)
    assert abs(2 * edge - len(row)) <= 1
    assert torch.equal(authentic, batch["mask_targets"][1])
    assert not authentic.any()
    assert unknown is None


def test_sample_of_a_tampered_image(make: Any, processor: Any) -> None:
    (sample,) = make("tampered_150x211")
    assert sample.images[0].size == (211, 150)
    assert sample.mask_sizes_hw == [(140, 224)]
    assert sample.masks[0].shape == (140, 224)
    box = np.argwhere(sample.masks[0])
    low, high = box.min(axis=0), box.max(axis=0) + 1  # drawn at y 20..90, x 100..180 of 150x211
    assert np.abs(low - [20 * 140 / 150, 100 * 224 / 211]).max() < 1.5
    assert np.abs(high - [90 * 140 / 150, 180 * 224 / 211]).max() < 1.5
    assert sample.cls_labels == [1]
    answer = text(sample, processor).split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    xs, ys = json.loads(answer.removeprefix(TOKENS.run))["mask"]
    assert abs(min(xs) - 106) <= 2  # polygons are in pixels of the processed image too
    assert abs(max(ys) - 84) <= 2


def test_masks_at_the_original_size(make: Any) -> None:
    (sample,) = make("tampered_150x211", mask_resolution="original")
    assert sample.mask_sizes_hw == [(150, 211)]
    expected = np.zeros((150, 211), np.uint8)
    expected[20:90, 100:180] = 1
    assert np.array_equal(sample.masks[0], expected)


def test_targets_of_every_kind(make: Any) -> None:
    samples = {sample.record_id: sample for sample in make()}
    assert {name: sample.cls_labels for name, sample in samples.items()} == {
        "tampered_224x196": [1], "real_112x252": [0], "tampered_150x211": [1], "real_84x140": [0],
        "unmasked_140x84": [1], "pair": [0, 1], "text": [],
    }  # fmt: skip
    assert samples["unmasked_140x84"].masks == [None]
    assert not samples["real_112x252"].masks[0].any()  # an authentic image needs no mask file
    assert [bool(mask.any()) for mask in samples["pair"].masks] == [False, True]
    assert samples["text"].images == [] == samples["text"].mask_sizes_hw


def test_number_of_image_tokens_is_the_processor_s(make: Any, processor: Any) -> None:
    dataset = make(max_pixels=20000)
    processor.image_processor.size["longest_edge"], kept = 20000, processor.image_processor.size["longest_edge"]
    try:
        for sample in dataset:
            if sample.images:
                grids = processor.image_processor(images=sample.images, return_tensors="pt")["image_grid_thw"]
                assert sample.input_ids.count(processor.image_token_id) == int(grids.prod(dim=1).sum()) // 4
                sizes = [tuple(row) for row in (grids[:, 1:] * 14).tolist()]
                assert sizes == sample.mask_sizes_hw
    finally:
        processor.image_processor.size["longest_edge"] = kept


def test_too_long_record_is_named_and_nothing_is_cut(make: Any) -> None:
    dataset = make("text", "tampered_224x196", max_length=100)
    length = make("tampered_224x196").num_tokens(0)
    with pytest.raises(DataFormatError) as caught:
        dataset[1]
    message = str(caught.value)
    for part in (
        "record 'tampered_224x196'", "records.jsonl:1", "too many tokens", f"found {length}",
        "at most data.max_length = 100", "lower data.max_pixels (56 tokens are images)",
    ):  # fmt: skip
        assert part in message
    assert "\n" not in message
    assert [error.record for error in dataset.check_lengths()] == ["tampered_224x196"]
    exact = make("tampered_224x196", max_length=length)
    assert len(exact[0].input_ids) == length
    assert exact.check_lengths() == []


def many_points(record: Record, count: int) -> Record:
    """The record with one star-shaped polygon of `count` points instead of its mask."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    radii = 30 + 5 * np.cos(12 * angles)
    star = tuple((float(70 + r * np.cos(a)), float(80 + r * np.sin(a))) for a, r in zip(angles, radii, strict=True))
    return dataclasses.replace(record, targets=(ImageTarget(label=1, polygons=(star,)),))


@pytest.mark.parametrize("points", [12, 200])
def test_length_is_known_without_decoding(processor: Any, records: dict[str, Record], points: int) -> None:
    """Also where polygons beyond the budget are traced again from their mask."""
    chosen = [*records.values(), many_points(records["tampered_224x196"], points)]
    dataset = ForensicDataset(chosen, processor, TOKENS, DataConfig(max_polygon_points=24))
    for index, sample in enumerate(dataset):
        assert dataset.num_tokens(index) == len(sample.input_ids)


def test_polygons_keep_to_their_budget(processor: Any, records: dict[str, Record]) -> None:
    star = many_points(records["tampered_224x196"], 200)
    dataset = ForensicDataset([star], processor, TOKENS, DataConfig(max_polygon_points=16))
    answer = text(dataset[0], processor).split(TOKENS.run)[1].split("<|im_end|>")[0]
    assert 3 <= sum(map(len, json.loads(answer)["mask"])) / 2 <= 16


def test_candidate_regions_are_written_in_the_frame_the_model_sees(processor: Any, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "wall.png")
    turns = (Turn("user", "<image>\n<regions>"), Turn("assistant", "<regions> stays"))
    regions = {"regions": [{"id": "R1", "box_xyxy": [30, 20, 150, 100], "type": None}]}
    image = (ImageInput(path=str(tmp_path / "wall.png")),)
    record = Record("wall", image, (ImageTarget(),), turns, provenance=regions)
    dataset = ForensicDataset([record], processor, TOKENS, DataConfig())
    height, width = processed_size((200, 300), processor.image_processor)
    assert (height, width) != (200, 300)
    written = text(dataset[0], processor)
    assert f"\nR1: [{round(width * 0.1)}, {round(height * 0.1)}, {width // 2}, {height // 2}]\n</regions>" in written
    assert written.count("<regions>") == 2
    assert dataset.num_tokens(0) == len(dataset[0].input_ids)
    (asked,) = dataset.without_answers_at([0])
    assert "\nR1: [" in text(asked, processor)
    assert "stays" not in text(asked, processor)
    damaged = dataclasses.replace(record, provenance={"regions": [{"id": "R1"}]})
    (problem,) = ForensicDataset([damaged], processor, TOKENS, DataConfig()).check_lengths()
    assert "record 'wall': no region" in str(problem)


def test_image_too_narrow_for_the_model_is_named(processor: Any, tmp_path: Path) -> None:
    Image.new("RGB", (900, 3)).save(tmp_path / "line.png")
    narrow = Record("line", (ImageInput(path=str(tmp_path / "line.png")),), (ImageTarget(label=0),), source="d.jsonl:4")
    dataset = ForensicDataset([narrow], processor, TOKENS, DataConfig())
    for call in (lambda: dataset[0], lambda: dataset.num_tokens(0)):
        with pytest.raises(DataFormatError, match=r"record 'line' \(d.jsonl:4\): image cannot be resized.*900x3"):
            call()
    assert len(dataset.check_lengths()) == 1


def test_missing_image_is_an_error_not_another_sample(processor: Any) -> None:
    gone = Record("gone", (ImageInput(path="/nowhere/a.png"),), (ImageTarget(label=0),))
    with pytest.raises(DataFormatError, match="record 'gone': image file not found"):
        ForensicDataset([gone], processor, TOKENS, DataConfig())[0]


def test_tokens_after_a_verdict_are_warned_of(
    processor: Any, records: dict[str, Record], caplog: pytest.LogCaptureFixture
) -> None:
    turns = (Turn("user", "<image>"), Turn("assistant", f"fake{TOKENS.run}"))
    leaky = [dataclasses.replace(records["tampered_224x196"], id=f"leak{i}", turns=turns) for i in range(3)]
    dataset = ForensicDataset([records["pair"], *leaky], processor, TOKENS, DataConfig())
    assert dataset.heads_may_read_answers
    dataset.warn_of_leaks()
    assert "record 'leak0' and 2 others a forensic token stands after text" in caplog.text


def test_without_answers_keeps_images_and_targets(make: Any, processor: Any) -> None:
    dataset = make("tampered_150x211", "pair", "text")
    ids = [record.id for record in dataset.records]
    samples = dataset.without_answers_at([ids.index(name) for name in ("pair", "tampered_150x211", "text")])
    assert [sample.record_id for sample in samples] == ["pair", "tampered_150x211", "text"]
    assert samples[0].cls_labels == [0, 1]
    assert text(samples[0], processor).endswith("<|im_start|>assistant\n" + TOKENS.run * 2)
    batch = ForensicCollator(processor, TOKENS)(samples)
    assert batch["cls_image_index"].tolist() == [0, 1, 2]
    assert batch["text_targets"].numel() == 0


def test_class_labels(make: Any) -> None:
    assert make().class_labels == [1, 0, 1, 0, 1, 1, None]


# ---- batches ----


def test_batch_has_what_its_docstring_says(collate: Any, processor: Any, records: dict[str, Record]) -> None:
    batch = collate()
    rows, length = batch["input_ids"].shape
    assert (rows, batch["record_ids"]) == (7, list(records))
    for key in ("attention_mask", "mm_token_type_ids", "labels", "logits_to_keep"):
        assert batch[key].shape == (rows, length), key
    assert batch["image_grid_thw"].shape == (7, 3)
    assert batch["pixel_values"].shape == (int(batch["image_grid_thw"].prod(dim=1).sum()), 1176)
    assert batch["cls_labels"].tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert [mask is None for mask in batch["mask_targets"]] == [False] * 4 + [True, False, False]
    sizes = [tuple(mask.shape) for mask in batch["mask_targets"] if mask is not None]
    assert sizes == [
        size for size, mask in zip(batch["mask_sizes_hw"], batch["mask_targets"], strict=True) if mask is not None
    ]
    assert all(mask.dtype == torch.uint8 for mask in batch["mask_targets"] if mask is not None)
    assert batch["cls_image_index"].tolist() == list(range(7)) == batch["mask_image_index"].tolist()
    absent = {"region_boxes", "region_index", "content_sizes_hw"}  # no regions, no padding here
    assert set(MODEL_KEYS) - absent <= set(batch)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_and_labels(collate: Any, make: Any, processor: Any, padding_side: str) -> None:
    batch = collate(padding_side=padding_side)
    for row, sample in enumerate(make()):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row, real].tolist() == sample.input_ids
        assert batch["labels"][row, real].tolist() == sample.labels
        padding = ~real
        assert set(batch["input_ids"][row, padding].tolist()) <= {processor.tokenizer.pad_token_id}
        assert set(batch["labels"][row, padding].tolist()) <= {-100}
        if padding.any():
            assert bool(padding[0 if padding_side == "left" else -1])
    is_image = batch["input_ids"] == processor.image_token_id
    assert torch.equal(batch["mm_token_type_ids"], is_image.long())
    assert set(batch["labels"][is_image].tolist()) == {-100}
    supervised = batch["labels"] != -100
    assert torch.equal(batch["input_ids"][supervised], batch["labels"][supervised])
    ends = batch["input_ids"][supervised] == processor.tokenizer.eos_token_id
    assert int(ends.sum()) == 7  # each answer's own end, not the questions'


def test_kept_logits_predict_the_supervised_tokens(collate: Any) -> None:
    for side in ("left", "right"):
        batch = collate(padding_side=side)
        rows, columns = batch["logits_to_keep"].nonzero(as_tuple=True)
        assert torch.equal(batch["labels"][rows, columns + 1], batch["text_targets"])
        expected_rows, expected_columns = (batch["labels"] != -100).nonzero(as_tuple=True)
        assert torch.equal(rows, expected_rows)
        assert torch.equal(columns + 1, expected_columns)
        assert bool((batch["attention_mask"][rows, columns] == 1).all())


def test_text_only_batch(collate: Any) -> None:
    batch = collate("text", "text")
    assert not {"pixel_values", "image_grid_thw"} & set(batch)
    assert batch["cls_labels"].shape == batch["cls_image_index"].shape == (0,)
    assert batch["mask_targets"] == batch["mask_sizes_hw"] == []
    assert batch["text_targets"].numel() > 0


def test_authentic_batch(collate: Any) -> None:
    batch = collate("real_84x140", "real_112x252")
    assert batch["cls_labels"].tolist() == [0, 0]
    assert not any(mask.any() for mask in batch["mask_targets"])


def test_unknown_label_is_ignored(processor: Any, records: dict[str, Record]) -> None:
    turns = (Turn("user", "<image>"), Turn("assistant", TOKENS.run + "who knows"))
    unknown = dataclasses.replace(records["real_84x140"], targets=(ImageTarget(),), turns=turns)
    batch = ForensicCollator(processor, TOKENS)([ForensicDataset([unknown], processor, TOKENS, DataConfig())[0]])
    assert batch["cls_labels"].tolist() == [-100]
    assert batch["mask_targets"] == [None]
    assert batch["cls_image_index"].tolist() == [0]


def test_images_without_tokens_are_left_out_of_the_index(processor: Any, records: dict[str, Record]) -> None:
    plain = dataclasses.replace(
        records["real_84x140"], targets=(ImageTarget(),), turns=(Turn("user", "<image>"), Turn("assistant", "a house"))
    )
    only_cls = dataclasses.replace(plain, turns=(Turn("user", "<image>"), Turn("assistant", "<cls>x")))
    dataset = ForensicDataset([plain, only_cls, records["pair"]], processor, TOKENS, DataConfig())
    batch = ForensicCollator(processor, TOKENS)(list(dataset))
    assert batch["cls_image_index"].tolist() == [1, 2, 3]
    assert batch["mask_image_index"].tolist() == [2, 3]


def test_every_key_of_the_image_processor_is_passed_on(make: Any, processor: Any) -> None:
    class Chatty:
        """The official processor with one more key, as a later version may have."""

        tokenizer, image_token_id = processor.tokenizer, processor.image_token_id

        @staticmethod
        def image_processor(**arguments: Any) -> dict[str, Any]:
            return {**processor.image_processor(**arguments), "another_key": torch.ones(1)}

    batch = ForensicCollator(Chatty, TOKENS)([make("pair")[0]])
    assert torch.equal(batch["another_key"], torch.ones(1))
    assert batch["image_grid_thw"].tolist() == [[1, 6, 10], [1, 10, 16]]


# ---- sources ----


def test_load_dataset_names_every_unusable_record(processor: Any, photo_records: Path) -> None:
    source = [SourceConfig(str(photo_records))]
    assert len(load_dataset(source, "train", processor, TOKENS, DataConfig())) == 7
    with pytest.raises(DataFormatError) as caught:
        load_dataset(source, "train", processor, TOKENS, DataConfig(max_length=130))
    lines = str(caught.value).splitlines()
    assert "of 7 records of data.train cannot be used" in lines[0]
    assert len(lines) - 1 == int(lines[0].split()[0]) > 1
    evaluated = load_dataset(source, "eval", processor, TOKENS, DataConfig(max_eval_samples=3))
    assert [record.id for record in evaluated.records] == [
        record.id for record in spread(read_sources(source, "eval"), 3)
    ]
    assert len(evaluated) == 3


def test_small_helpers(processor: Any) -> None:
    assert processed_size((150, 211), processor.image_processor) == (140, 224)
    assert processed_size((28, 28), processor.image_processor) == (56, 56)  # at least min_pixels
    assert scale_polygons([((10.0, 20.0), (211.0, 150.0))], (150, 211), (75, 422)) == (((20.0, 10.0), (422.0, 75.0)),)
