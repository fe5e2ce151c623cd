"""Post-processing: every step does something, keeps the size, follows from its parameters alone."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from finetune.data.synthesis.camera import develop
from finetune.data.synthesis.degradations import (
    DEGRADATIONS,
    SUBSAMPLINGS,
    apply_plan,
    canvas_size,
    draw_plan,
    jpeg_round_trip,
)
from finetune.data.synthesis.photos import find_photos

PHOTOS = find_photos()


def picture(seed: int) -> np.ndarray:
    return develop(PHOTOS.photos[seed % len(PHOTOS.photos)], (196, 252), np.random.default_rng(seed))[0]


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_each_degradation_changes_the_picture_and_keeps_the_size(name: str) -> None:
    for seed in range(4):
        plan = draw_plan(np.random.default_rng(seed), {name: 1.0}, 0.0, 0.0)
        assert [step["name"] for step in plan] == [name]
        canvas_hw = canvas_size(plan, (196, 252))
        host = cv2.resize(picture(seed), canvas_hw[::-1])
        result = apply_plan(host, plan, (196, 252))
        assert result.shape == (196, 252, 3)
        assert result.dtype == np.uint8
        assert np.array_equal(result, apply_plan(host, plan, (196, 252)))
        assert result.shape != host.shape or not np.array_equal(result, host)


def test_every_subsampling_and_shifted_grids_are_drawn() -> None:
    steps = [draw_plan(np.random.default_rng(seed), {"double_jpeg": 1.0}, 0.0, 0.0)[0] for seed in range(200)]
    assert {step["subsampling"] for step in steps} == set(SUBSAMPLINGS)
    shifted = [step["grid_shift_xy"] != [0, 0] for step in steps]
    assert 0.35 < np.mean(shifted) < 0.65
    host = picture(0)
    coded = [jpeg_round_trip(host, 85, name) for name in SUBSAMPLINGS]
    assert not any(np.array_equal(a, b) for a, b in pairwise(coded))


def blockiness(image: np.ndarray, start: int) -> float:
    """Mean step between columns at the block borders x = start (mod 8), relative to all columns."""
    steps = np.abs(np.diff(image.astype(float), axis=1)).mean(axis=(0, 2))
    at_border = (np.arange(len(steps)) + 1 - start) % 8 == 0
    return float(steps[at_border].mean() / steps[~at_border].mean())


def test_the_first_coding_of_a_shifted_pair_has_its_grid_elsewhere() -> None:
    step = {"name": "double_jpeg", "qualities": [20, 100], "subsampling": "4:4:4", "grid_shift_xy": [3, 0]}
    shifted = apply_plan(picture(0), [step], (196, 252))
    aligned = apply_plan(picture(0), [{**step, "grid_shift_xy": [0, 0]}], (196, 252))
    assert max(range(8), key=lambda start: blockiness(shifted, start)) == 5  # 3 columns before the picture: 8 - 3
    assert max(range(8), key=lambda start: blockiness(aligned, start)) == 0
