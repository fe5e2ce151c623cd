"""Operations: the mask is what was altered, invisible edits are drawn again, conventions and shapes hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from finetune.data.synthesis.degradations import DEGRADATIONS, apply_plan, canvas_size, draw_plan
from finetune.data.synthesis.operations import OPERATIONS, NoVisibleEditError, OperationSettings, tamper
from finetune.data.synthesis.photos import develop, find_photos
from finetune.data.synthesis.regions import SHAPES, draw_region, soft_edge

PHOTOS = find_photos()


def picture(seed: int, index: int | None = None) -> np.ndarray:
    photos = PHOTOS.photos
    return develop(photos[seed % len(photos) if index is None else index], (196, 252), np.random.default_rng(seed))[0]


def draw_donor(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    return picture(int(rng.integers(1000)), 1), {"photo": "donor"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_mask_is_exactly_what_was_altered(operation: str) -> None:
    settings = OperationSettings()
    coverage = []
    for seed in range(14):
        host = picture(seed)
        kept = host.copy()
        result = tamper(host, operation, np.random.default_rng(seed), settings, draw_donor)
        changed = (host != result.image).any(axis=2)
        assert np.array_equal(host, kept)
        assert not (changed & ~result.mask).any(), "an altered pixel is not in the mask"
        distance = cv2.distanceTransform((~changed).astype(np.uint8), cv2.DIST_L2, 5)
        assert distance[result.mask].max() <= 5, "the mask holds a larger unaltered part"
        difference = np.abs(host.astype(float) - result.image)[result.mask].mean()
        assert difference >= settings.min_change
        assert difference == pytest.approx(result.parameters["mean_abs_change"], abs=0.01)
        coverage.append(changed.sum() / result.mask.sum())
        low, high = settings.area_ranges[operation]
        assert 0.6 * low <= result.mask.mean() <= 1.15 * high
    assert np.mean(coverage) > 0.93


def test_source_and_target_convention_adds_the_source() -> None:
    both = replace(OperationSettings(), mask_convention="source_and_target")
    for seed in range(6):
        host = picture(seed)
        target = tamper(host, "copy_move", np.random.default_rng(seed), OperationSettings(), draw_donor)
        union = tamper(host, "copy_move", np.random.default_rng(seed), both, draw_donor)
        assert np.array_equal(target.image, union.image)
        assert not (target.mask & ~union.mask).any()
        assert union.mask.sum() > 1.3 * target.mask.sum()


def test_exact_copy_move_copies_pixels_unchanged() -> None:
    settings = replace(OperationSettings(), max_feather=0.0)
    seen = 0
    for seed in range(60):
        host = picture(seed)
        result = tamper(host, "copy_move", np.random.default_rng(seed), settings, draw_donor)
        p = result.parameters
        if p["angle"] == 0 and p["scale"] == 1 and not p["flip"]:
            dx, dy = p["shift_xy"]
            moved = np.roll(host, (dy, dx), axis=(0, 1))
            assert np.array_equal(result.image[result.mask], moved[result.mask])
            seen += 1
    assert seen >= 3


def test_an_invisible_edit_is_never_returned() -> None:
    flat = np.full((196, 252, 3), 90, dtype=np.uint8)
    with pytest.raises(NoVisibleEditError, match="no visible edit"):
        tamper(flat, "copy_move", np.random.default_rng(0), OperationSettings(), draw_donor)
    half = flat.copy()
    half[:, 126:] = np.random.default_rng(0).integers(0, 255, (196, 126, 3), dtype=np.uint8)
    redraws = [
        tamper(half, "copy_move", np.random.default_rng(seed), OperationSettings(), draw_donor).parameters["redraws"]
        for seed in range(12)
    ]
    assert max(redraws) > 0  # some draws copied flat onto flat


@pytest.mark.parametrize("shape", SHAPES)
def test_regions_have_the_asked_size(shape: str) -> None:
    for seed in range(10):
        region, parameters = draw_region(picture(seed), np.random.default_rng(seed), (0.05, 0.2), {shape: 1.0})
        assert region.dtype == bool
        assert 0.045 <= region.mean() <= 0.21
        assert parameters["shape"] in (shape, "blob")
        assert cv2.connectedComponents(region.astype(np.uint8))[0] == 2  # background and one piece


def test_soft_edge_is_hard_without_feather_and_narrow_with() -> None:
    region = np.zeros((40, 40), dtype=bool)
    region[10:30, 10:30] = True
    assert set(np.unique(soft_edge(region, 0))) == {0, 1}
    support = soft_edge(region, 3.0) > 0
    assert not support[:6].any()
    assert (soft_edge(region, 3.0)[14:26, 14:26] > 0.95).all()


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
