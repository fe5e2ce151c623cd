"""Records without text: images and targets alone, features in place of pixels, and what such a run cannot use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import DataConfig, SourceConfig
from finetune.data.collator import ForensicCollator
from finetune.data.dataset import ForensicDataset, checked_dataset
from finetune.data.pictures import PictureDataset
from finetune.data.readers import read_records
from finetune.data.sources import hold_back, read_and_hold_back, shared_pictures, shared_warning
from finetune.data.validation import InvalidDataError
from finetune.errors import ConfigError
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
def records(photo_records: Path) -> list[Record]:
    return [record for record in read_records(str(photo_records)) if record.images]


class Features:
    """A cache in memory, of images named by their path."""

    def __init__(self, known: dict[str, tuple[list[torch.Tensor], tuple[int, int]]], needs_pixels: bool) -> None:
        self.known, self.needs_pixels = known, needs_pixels

    def key(self, image: ImageInput, record_id: str, source: str) -> str:
        return Path(image.path or "").name

    def load(self, key: str) -> tuple[list[torch.Tensor], tuple[int, int]] | None:
        return self.known.get(key)


def collated(dataset: ForensicDataset, source: Any = "vision") -> dict[str, Any]:
    collate = ForensicCollator(dataset.processor, TOKENS, heads_source=source)
    return collate([dataset[i] for i in range(len(dataset))])


def test_a_batch_without_text_has_the_images_and_targets_of_one_with_text(
    processor: Any, records: list[Record]
) -> None:
    plain = collated(PictureDataset(records, processor, TOKENS, DataConfig()))
    full = collated(ForensicDataset(records, processor, TOKENS, DataConfig()), "tokens")
    assert set(full) - set(plain) == {
        "input_ids", "attention_mask", "mm_token_type_ids", "labels", "logits_to_keep", "text_targets",
    }  # fmt: skip
    assert set(plain) <= set(full)
    for key in ("pixel_values", "image_grid_thw", "cls_labels"):
        assert torch.equal(plain[key], full[key]), key
    assert plain["mask_sizes_hw"] == full["mask_sizes_hw"]
    assert plain["record_ids"] == full["record_ids"]
    for ours, theirs in zip(plain["mask_targets"], full["mask_targets"], strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    everything = list(range(len(plain["cls_labels"])))  # two of them are of one record
    assert len(everything) == len(records) + 1
    assert plain["cls_image_index"].tolist() == plain["mask_image_index"].tolist() == everything


def test_conversations_do_not_matter_and_cannot_leak(processor: Any, records: list[Record]) -> None:
    talkative = [
        dataclasses.replace(r, turns=(Turn("user", "no placeholder"), Turn("assistant", "<mask_3>"))) for r in records
    ]
    dataset = checked_dataset(talkative, "train", processor, TOKENS, DataConfig(layout="text_first"), PictureDataset)
    assert not dataset.heads_may_read_answers
    assert dataset[0].input_ids == []
    assert dataset.without_answers_at([1])[0].record_id == records[1].id
    with pytest.raises(InvalidDataError):
        checked_dataset(talkative, "train", processor, TOKENS, DataConfig())


@pytest.mark.parametrize("needs_pixels", [False, True])
def test_cached_images_are_not_opened_unless_their_pixels_are_wanted(
    processor: Any, records: list[Record], needs_pixels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [record for record in records if len(record.images) == 1][:3]
    plain = collated(PictureDataset(some, processor, TOKENS, DataConfig()))
    dataset = PictureDataset(some, processor, TOKENS, DataConfig())
    sample = dataset[1]
    maps = [torch.ones(4, 2, 3)]
    dataset.features = Features(
        {Path(some[1].images[0].path or "").name: (maps, (sample.images[0].height, sample.images[0].width))},
        needs_pixels,
    )
    opened = []
    real = dataset.image_cache.load
    monkeypatch.setattr(dataset.image_cache, "load", lambda image, *a: opened.append(image) or real(image, *a))
    batch = collated(dataset)
    wanted = [0, 1, 2] if needs_pixels else [0, 2]
    assert batch["pixel_index"] == wanted
    assert opened == [some[i].images[0] for i in wanted]
    assert torch.equal(batch["image_grid_thw"], plain["image_grid_thw"])
    sizes = plain["image_grid_thw"].prod(dim=1).tolist()
    parts = plain["pixel_values"].split(sizes)
    assert torch.equal(batch["pixel_values"], torch.cat([parts[i] for i in wanted]))
    assert [entry is None for entry in batch["cached_maps"]] == [True, False, True]
    assert batch["cached_maps"][1] is maps
    assert batch["cls_image_index"].tolist() == [0, 1, 2]
    assert batch["feature_keys"] == [Path(record.images[0].path or "").name for record in some]
    for ours, theirs in zip(batch["mask_targets"], plain["mask_targets"], strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_what_a_run_without_text_cannot_use_is_named(processor: Any, records: list[Record]) -> None:
    bare = Record("bare", (), (), turns=(Turn("user", "hello"), Turn("assistant", "hi")))
    blank = dataclasses.replace(records[0], id="blank", targets=(ImageTarget(),))
    with pytest.raises(InvalidDataError, match="2 problems in 2 of 3 records") as caught:
        checked_dataset([records[1], bare, blank], "train", processor, TOKENS, DataConfig(), PictureDataset)
    assert "record 'bare': no image" in str(caught.value)
    assert "neither label nor mask" in str(caught.value)
    assert "'blank'" in str(caught.value)


def test_an_image_that_no_resize_fits_is_an_error_beforehand(processor: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (2000, 5)).save(tmp_path / "thin.png")
    thin = Record("thin", (ImageInput(str(tmp_path / "thin.png")),), (ImageTarget(0),))
    with pytest.raises(InvalidDataError, match=r"1 of 1 records[\s\S]*'thin'"):
        checked_dataset([thin], "train", processor, TOKENS, DataConfig(), PictureDataset)


# ---- records held back for validation ----


def grouped(*sizes: int) -> list[Record]:
    """Records of groups g0, g1, ... of these sizes."""
    image = ImageInput("a.jpg")
    return [
        Record(f"g{g}_{k}", (image,), (ImageTarget(k % 2),), group=f"g{g}")
        for g, n in enumerate(sizes)
        for k in range(n)
    ]


def test_whole_groups_are_held_back_in_about_the_share_asked_for() -> None:
    records = grouped(*([4] * 50))
    kept, held = hold_back(records, 0.2, seed=0)
    assert {r.group for r in kept}.isdisjoint(r.group for r in held)
    assert len(kept) + len(held) == 200
    assert len(held) == 40
    assert [r.id for r in kept] == [r.id for r in records if r in kept]  # order kept
    assert hold_back(records, 0.2, seed=0)[1] == held
    assert hold_back(records, 0.2, seed=1)[1] != held
    reordered = hold_back(records[::-1], 0.2, seed=0)[1]
    assert {r.group for r in reordered} == {r.group for r in held}


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("sizes", [(1, 9), (5, 5), (3, 1, 8)])
def test_neither_side_is_ever_empty(sizes: tuple[int, ...], ratio: float) -> None:
    kept, held = hold_back(grouped(*sizes), ratio, seed=3)
    assert kept
    assert held


def test_repeated_records_are_validated_on_once_and_one_group_is_refused() -> None:
    records = grouped(2, 2, 2)
    _, held = hold_back([*records, *records], 0.4, seed=0)
    assert len({r.id for r in held}) == len(held) == 2
    with pytest.raises(ConfigError, match=r"all 3 records are of one group \('g0'\); give a validation file"):
        hold_back(grouped(3), 0.5, seed=0)


def test_the_division_does_not_depend_on_how_the_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures without a group, through a relative path, an absolute one, a link, and after the folder was moved."""
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"id": f"r{k}", "images": [f"{k}.jpg"], "labels": [k % 2]}) for k in range(20)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path)

    def held(folder: str) -> list[str]:
        source = SourceConfig(f"{folder}/train.jsonl")
        return [record.id for record in read_and_hold_back([source], "train", 0.25, seed=4)[1]]

    found = [held(folder) for folder in ("set", "./set", str(tmp_path / "set"), "link")]
    (tmp_path / "set").rename(tmp_path / "moved")
    found.append(held("moved"))
    assert len(found[0]) == 5
    assert all(each == found[0] for each in found)


def test_what_a_division_by_group_cannot_see_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Records without a group, and a picture that records of both sides hold."""

    def record(name: str, *paths: str, group: str = "") -> Record:
        return Record(name, tuple(map(ImageInput, paths)), (ImageTarget(0),) * len(paths), group=group)

    hold_back([record("r0", "a.jpg", group="g0"), record("r1", "b.jpg", group="g1")], 0.5, seed=0)
    assert not caplog.text
    hold_back([record("r0", "a.jpg", "b.jpg"), record("r1", "b.jpg"), record("r2", "b.jpg")], 0.5, seed=0)
    assert "3 of 3 records name no group" in caplog.text
    assert "1 pictures are in training and in validation records, e.g. b.jpg" in caplog.text


def test_pictures_of_both_sides_are_found_whatever_their_paths_are_called(tmp_path: Path) -> None:
    def record(name: str, *paths: str) -> Record:
        return Record(name, tuple(map(ImageInput, paths)), (ImageTarget(0),) * len(paths))

    train = [record("r0", str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"))]
    held = [record("r1", f"{tmp_path}/x/../b.jpg"), record("r2", str(tmp_path / "c.jpg"))]
    assert shared_pictures(train, held) == [f"{tmp_path}/x/../b.jpg"]
    assert shared_warning(train, held).startswith("1 pictures of data.eval are also in data.train, e.g. ")
    assert shared_warning(train, held[1:]) == ""
