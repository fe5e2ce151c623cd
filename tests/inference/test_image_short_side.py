"""`data.image_short_side`: one frame for training, prediction and what is written about it, kept in saved folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import DataConfig, HeadsConfig, ModelConfig
from finetune.data.collator import ForensicCollator
from finetune.data.dataset import ForensicDataset
from finetune.data.image_frame import processed_size, resampled, set_frame, short_side_size
from finetune.data.preview import without_tokenizer
from finetune.data.regions.text import REGIONS
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query
from finetune.models.loading import load_bundle, load_processor, save_bundle
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import SpecialTokens

SHORT = 84


@pytest.fixture(scope="module")
def bundle_84(tiny_dir: Path) -> Any:
    bundle = load_bundle(ModelConfig(path=str(tiny_dir)), SpecialTokens(), HeadsConfig(enabled=False))
    set_frame(bundle.processor.image_processor, SHORT)
    return bundle


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One picture of 60 x 200 pixels with a candidate region."""
    path = tmp_path_factory.mktemp("picture") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (60, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((200, 60), Image.Resampling.BICUBIC).save(path)
    regions = [{"id": "R1", "box_xyxy": [20, 15, 80, 45], "type": "crack"}]
    turns = (Turn("user", "<image>Look at\n<regions>\n"), Turn("assistant", '{"verdicts": {"R1": "abnormal"}}'))
    provenance = {REGIONS: regions, "positive_region_ids": ["R1"]}
    return Record("a", (ImageInput(str(path)),), (ImageTarget(),), turns, provenance=provenance)


@pytest.mark.parametrize(
    ("size_hw", "short", "found"),
    [((60, 200), 84, (84, 280)), ((200, 60), 84, (280, 84)), ((500, 400), 100, (125, 100)), ((31, 17), None, (31, 17))],
)
def test_the_shorter_side_gets_so_many_pixels(
    tiny_dir: Path, size_hw: tuple[int, int], short: int | None, found: tuple[int, int]
) -> None:
    image_processor = load_processor(tiny_dir).image_processor
    set_frame(image_processor, short)
    assert short_side_size(size_hw, image_processor) == found


def test_bounds_hold_all_the_same(tiny_dir: Path) -> None:
    image_processor = load_processor(tiny_dir, min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 12).image_processor
    sizes = {}
    for short in (8, 60, 84, 500):
        set_frame(image_processor, short)
        sizes[short] = processed_size((60, 200), image_processor)
    assert sizes[8] == (56, 112)  # raised to min_pixels
    assert sizes[84][0] * sizes[84][1] <= 28 * 28 * 12
    assert sizes[500] == sizes[84]  # lowered to max_pixels
    set_frame(image_processor, None)
    assert processed_size((60, 200), image_processor) == sizes[60]


def test_pixels_are_resampled_once(bundle_84: Any, record: Record) -> None:
    """Straight from the file to the size the model sees, as the processor itself would if it were told that size."""
    dataset = ForensicDataset([record], bundle_84.processor, bundle_84.tokens, DataConfig())
    sample = dataset[0]
    assert sample.processed_hw == [(84, 280)]
    batch = ForensicCollator(bundle_84.processor, bundle_84.tokens)([sample])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 20]]
    image_processor = bundle_84.processor.image_processor
    once = resampled(sample.images[0], (84, 280), image_processor)
    assert torch.equal(batch["pixel_values"], image_processor(images=[once], return_tensors="pt")["pixel_values"])
    assert sample.images[0].size == (200, 60)  # coordinates and masks stay in the picture's own frame


def test_training_and_predictor_see_the_same_grid_and_coordinates(bundle_84: Any, record: Record) -> None:
    dataset = ForensicDataset([record], bundle_84.processor, bundle_84.tokens, DataConfig())
    trained = ForensicCollator(bundle_84.processor, bundle_84.tokens)([dataset[0]])
    text = bundle_84.tokenizer.decode(trained["input_ids"][0])
    assert "R1: [28, 21, 112, 63]" in text  # 20, 15, 80, 45 times 1.4
    predictor = Predictor(bundle_84)
    picture = Image.open(record.images[0].path or "").convert("RGB")
    sample = predictor._sample(Query("a", record.images, (Turn("user", "<image>?"),)), [picture], "")
    asked = predictor._inputs([sample])
    assert torch.equal(asked["image_grid_thw"], trained["image_grid_thw"])
    assert torch.equal(asked["pixel_values"], trained["pixel_values"])
    assert int((asked["input_ids"] == bundle_84.processor.image_token_id).sum()) == 3 * 10
    assert predictor._frames([picture])[0].processed_hw == (84, 280)


def test_saved_folder_keeps_it_and_a_run_may_change_it(bundle_84: Any, tmp_path: Path) -> None:
    save_bundle(bundle_84, tmp_path / "model")
    loaded = load_bundle(ModelConfig(path=str(tmp_path / "model")))
    assert processed_size((60, 200), loaded.processor.image_processor) == (84, 280)
    set_frame(loaded.processor.image_processor, None)
    save_bundle(loaded, tmp_path / "without")
    again = load_bundle(ModelConfig(path=str(tmp_path / "without")))
    assert processed_size((60, 200), again.processor.image_processor) == (56, 196)


def test_plain_export_keeps_it(bundle_84: Any, tmp_path: Path) -> None:
    from finetune.cli import main

    save_bundle(bundle_84, tmp_path / "model")
    assert main(["merge", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "plain"), "--plain"]) == 0
    image_processor = load_processor(tmp_path / "plain").image_processor
    assert processed_size((60, 200), image_processor) == (84, 280)


def test_preview_without_a_tokenizer_counts_the_same_tokens() -> None:
    processor = without_tokenizer(DataConfig(image_short_side=SHORT))
    assert processed_size((60, 200), processor.image_processor) == (84, 280)


def test_preview_of_a_run_sets_it(tiny_dir: Path, tmp_path: Path) -> None:
    import argparse

    from finetune.inference.preview import rendering

    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tiny_dir}}}\ndata: {{image_short_side: {SHORT}}}\n")
    data, processor, *_ = rendering(argparse.Namespace(config=str(config), model=None, overrides=[]))
    assert data.image_short_side == SHORT
    assert processed_size((60, 200), processor.image_processor) == (84, 280)
