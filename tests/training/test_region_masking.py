"""Progressive region masking: the schedule, what is hidden, adjusted targets, and the same again after a resume."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import RegionMaskingConfig, RunConfig
from finetune.data.masks import rasterize_polygons
from finetune.data.region_masking import Draw, RegionMasking
from finetune.training.region_masking import NumberedSampler, masking_problems
from finetune.training.run import build_trainer, train
from finetune.training.sampling import ClassBalancedSampler

ALWAYS = RegionMaskingConfig(enabled=True, start_share=0.5, end_share=0.5, probability=1.0)


def picture(size_hw: tuple[int, int] = (224, 280)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size_hw, 3), dtype=np.uint8))


def square(size_hw: tuple[int, int], box_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(size_hw, np.uint8)
    x0, y0, x1, y1 = box_xyxy
    mask[y0:y1, x0:x1] = 1
    return mask


@pytest.mark.parametrize(
    ("shape", "values"),
    [("linear", (0.1, 0.1, 0.2, 0.3, 0.5, 0.5)), ("cosine", (0.1, 0.1, None, 0.3, 0.5, 0.5)),
     ("steps", (0.1, 0.1, 0.2, 0.3, 0.5, 0.5))],
)  # fmt: skip
def test_share_follows_its_schedule(shape: Any, values: tuple[float | None, ...]) -> None:
    config = RegionMaskingConfig(start_share=0.1, end_share=0.5, begin=0.2, finish=0.8, shape=shape)
    masking = RegionMasking(config, 0, 100)
    for progress, value in zip((0.0, 0.2, 0.35, 0.5, 0.8, 1.0), values, strict=True):
        if value is not None:
            assert masking.share(progress) == pytest.approx(value)
    shares = [masking.share(i / 50) for i in range(51)]
    assert shares == sorted(shares)
    assert len(set(shares)) == (5 if shape == "steps" else len(set(shares)))


def test_cells_of_both_kinds_are_hidden_alike() -> None:
    """Half of the tampered cells and half of the others, in whole cells of 28, and in authentic images too."""
    size = (224, 280)
    mask = square(size, (56, 56, 168, 168))  # 16 of 80 cells
    image = picture(size)
    for target in (mask, np.zeros(size, np.uint8)):
        inside, outside = [], []
        for position in range(40):
            shown, left = RegionMasking(ALWAYS, 0, 100).apply(Draw(0, position), 0, image, target, size)
            hidden = (np.asarray(shown) != np.asarray(image)).any(axis=-1)
            cells = hidden.reshape(8, 28, 10, 28).mean(axis=(1, 3))
            assert set(np.unique(cells.round(2))) <= {0.0, 1.0, *np.unique(cells[cells > 0.98].round(2))}
            is_tampered = target.reshape(8, 28, 10, 28).any(axis=(1, 3))
            inside += list(cells[is_tampered] > 0.5)
            outside += list(cells[~is_tampered] > 0.5)
            assert not (left & hidden).any()
            assert np.array_equal(left[~hidden], target[~hidden])
        assert np.mean(outside) == pytest.approx(0.5, abs=0.02)
        assert not inside or np.mean(inside) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("box", [(60, 60, 70, 70), (50, 50, 90, 62), (0, 0, 280, 224)], ids=["one cell", "few", "all"])
def test_a_tampered_area_never_vanishes(box: tuple[int, int, int, int]) -> None:
    size = (224, 280)
    mask = square(size, box)
    config = replace(ALWAYS, start_share=1.0, end_share=1.0)
    for position in range(20):
        _, left = RegionMasking(config, 0, 100).apply(Draw(0, position), 0, picture(size), mask, size)
        assert left.sum() >= max(0.25 * mask.sum(), 1)


def test_progress_probability_and_repeatability() -> None:
    size = (140, 140)
    image, mask = picture(size), square(size, (28, 28, 112, 112))
    masking = RegionMasking(RegionMaskingConfig(enabled=True, probability=0.5, end_share=0.6), 3, 1000)
    changed = {p: masking.apply(Draw(0, p), 0, image, mask, size)[1] is not mask for p in range(1000)}
    assert not any(changed[p] for p in range(100))  # before `begin`
    late = [changed[p] for p in range(500, 1000)]
    assert np.mean(late) == pytest.approx(0.5, abs=0.08)
    for position in (300, 900):
        pair = [masking.apply(Draw(i, position), 0, image, mask, size) for i in (0, 0)]
        assert np.array_equal(np.asarray(pair[0][0]), np.asarray(pair[1][0]))
        assert np.array_equal(pair[0][1], pair[1][1])
    sizes = [
        float(np.mean([masking.apply(Draw(0, p), 0, image, mask, size)[1].sum() for p in range(first, first + 100)]))
        for first in (0, 300, 600, 900)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_draws_survive_worker_processes_and_know_their_place() -> None:
    sampler = NumberedSampler(ClassBalancedSampler([0, 1, 0, 1], seed=1))
    drawn = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn += [pickle.loads(pickle.dumps(draw)) for draw in sampler]
    assert [draw.position for draw in drawn] == list(range(12))
    plain = ClassBalancedSampler([0, 1, 0, 1], seed=1)
    expected = []
    for epoch in range(3):
        plain.set_epoch(epoch)
        expected += list(plain)
    assert [int(draw) for draw in drawn] == expected


def test_targets_and_answer_follow(make_config: Callable[..., RunConfig], photo_records: Path) -> None:
    """The pixel target loses the hidden cells, the answer's polygons too; records with own answers are left alone."""
    config = make_config(data={"train": [str(photo_records)], "max_pixels": 50176}, region_masking={"enabled": True})
    dataset = build_trainer(config)[0].train_dataset
    dataset.region_masking = RegionMasking(ALWAYS, 0, 10)
    index = next(i for i, record in enumerate(dataset.records) if record.id == "tampered_224x196")
    whole, shown = dataset[index], dataset[Draw(index, 4)]
    assert shown.cls_labels == whole.cls_labels
    assert 0 < shown.masks[0].sum() < whole.masks[0].sum()
    assert not (shown.masks[0] & ~whole.masks[0].astype(bool)).any()
    text = dataset.processor.tokenizer.decode(shown.input_ids)
    answer = json.loads(text[text.rindex("{") : text.rindex("}") + 1])
    polygons = [
        tuple(zip(part[::2], part[1::2], strict=True)) if isinstance(part[0], int) else part for part in answer["mask"]
    ]
    drawn = rasterize_polygons([tuple(map(tuple, polygon)) for polygon in polygons], (224, 196))
    hidden = (np.asarray(shown.images[0]) != np.asarray(whole.images[0])).any(axis=-1) & (whole.masks[0] > 0)
    assert (drawn & hidden).sum() < 0.35 * hidden.sum()  # polygons of few points are rough
    for name in ("unmasked_140x84", "text"):
        other = next(i for i, record in enumerate(dataset.records) if record.id == name)
        assert dataset[Draw(other, 4)].input_ids == dataset[other].input_ids


@pytest.mark.slow
def test_a_resumed_run_hides_the_same(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Losses after a resume are those of the run that went through, mid-epoch, worker processes or not."""
    section = {"max_steps": 6, "eval_steps": 3, "batch_size": 2, "save_total_limit": 5}
    masking = {"enabled": True, "start_share": 0.2, "end_share": 0.8, "begin": 0.0, "finish": 1.0, "probability": 1.0}
    train(make_config("through", train=section, region_masking=masking))
    shutil.copytree(tmp_path / "through" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    train(make_config("again", train={**section, "resume": "auto"}, region_masking=masking, data={"num_workers": 1}))
    losses = [
        {e["step"]: e["loss"] for e in json.loads((tmp_path / name / "history.json").read_text()) if "loss" in e}
        for name in ("through", "again")
    ]
    assert [losses[1][step] for step in (4, 5, 6)] == [losses[0][step] for step in (4, 5, 6)]
    train(make_config("plain", train=section))
    plain = {e["step"]: e["loss"] for e in json.loads((tmp_path / "plain" / "history.json").read_text()) if "loss" in e}
    assert plain[6] != losses[0][6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RegionMaskingConfig(end_share=1.5), "region_masking.end_share is 1.5"),
        (RegionMaskingConfig(begin=0.9, finish=0.1), "region_masking.begin is 0.9, after finish"),
        (RegionMaskingConfig(cell=0), "region_masking.cell is 0"),
    ],
)
def test_wrong_settings_are_one_line(settings: RegionMaskingConfig, message: str) -> None:
    (problem,) = masking_problems(settings)
    assert message in problem
