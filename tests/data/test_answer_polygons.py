"""Polygons of answers: both frames there and back, budgets in points and in tokens, nothing lost that had pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from finetune.data.answer_polygons import MIN_TOKENS, PolygonBudget, PolygonFrame
from finetune.data.chat import polygon_text
from finetune.data.masks import polygons_from_mask, rasterize_polygons
from finetune.schema import Polygon

# Original and processed (H, W): shrunk, enlarged, as it is, odd aspect ratios.
SIZES = {
    "shrunk": ((1500, 2100), (756, 1064)),
    "enlarged": ((83, 121), (168, 252)),
    "kept": ((224, 196), (224, 196)),
    "flat": ((90, 900), (84, 896)),
    "tall": ((1200, 130), (1204, 140)),
}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def blobs(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Smooth regions, some with holes, a fifth of the image or so."""
    scale = min(size_hw) / 40
    small_hw = round(size_hw[0] / scale), round(size_hw[1] / scale)
    noise = np.random.default_rng(seed).normal(size=small_hw).astype(np.float32)
    smooth = cv2.resize(cv2.GaussianBlur(noise, (0, 0), 4), size_hw[::-1], interpolation=cv2.INTER_CUBIC)
    return (smooth > np.quantile(smooth, 0.8)).astype(np.uint8)


def count_digits(polygons: Any) -> int:
    """A tokenizer like Qwen2.5's on this text: every digit, separator and space is one token."""
    text = polygon_text(polygons)
    return len(text.replace("[[", "[").replace("]]", "]").replace("],", "]").replace(" [", "["))


@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
@pytest.mark.parametrize("name", SIZES)
def test_there_and_back_is_off_by_half_a_unit_at_most(name: str, coordinates: Any) -> None:
    original, processed = SIZES[name]
    frame = PolygonFrame(coordinates, original, processed)
    rng = np.random.default_rng(1)
    polygon = tuple((float(x), float(y)) for x, y in rng.uniform(0, 1, (7, 2)) * original[::-1])
    (written,) = frame.write([polygon])
    (back,) = frame.read([written])
    assert all(value == int(value) for point in written for value in point)
    assert (np.asarray(written) <= frame.extent_hw[::-1]).all()
    half_unit = np.asarray(original[::-1]) / frame.extent_hw[::-1] / 2
    assert (np.abs(np.asarray(back) - polygon) <= half_unit + 1e-9).all()


def test_frames_by_hand() -> None:
    """Corners of the image are 0 and its size or 1000; halves go to the even number."""
    whole: Polygon = ((0.0, 0.0), (200.0, 0.0), (200.0, 100.0), (0.0, 100.0))
    absolute, relative = (PolygonFrame(kind, (100, 200), (56, 112)) for kind in ("absolute", "relative"))
    assert absolute.write([whole]) == (((0, 0), (112, 0), (112, 56), (0, 56)),)
    assert relative.write([whole]) == (((0, 0), (1000, 0), (1000, 1000), (0, 1000)),)
    assert absolute.read(absolute.write([whole])) == relative.read(relative.write([whole])) == (whole,)
    thousandths = PolygonFrame("relative", (2000, 2000), (56, 56))
    assert thousandths.write([((1.0, 3.0), (9.0, 3.0), (9.0, 11.0))]) == (((0, 2), (4, 2), (4, 6)),)


@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
@pytest.mark.parametrize("name", SIZES)
def test_mask_survives_the_round_trip(name: str, coordinates: Any) -> None:
    """Unlimited budget: what is lost is the rounding, half a unit along the outline."""
    original, processed = SIZES[name]
    mask = blobs(original)
    frame = PolygonFrame(coordinates, original, processed)
    back = frame.read(frame.write(polygons_from_mask(mask, max_points=10**6)))
    assert iou(rasterize_polygons(back, original), mask) > {"shrunk": 0.98, "enlarged": 0.97}.get(name, 0.94)


@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
@pytest.mark.parametrize("limit", [MIN_TOKENS, 120, 300, 700])
def test_token_budget_is_kept_and_used(coordinates: Any, limit: int) -> None:
    for name, (original, processed) in SIZES.items():
        mask = blobs(original, seed=3)
        frame = PolygonFrame(coordinates, original, processed)
        budget = PolygonBudget(limit, count_digits)
        polygons = budget.trace(mask, frame)
        written = frame.write(polygons)
        used = count_digits(written)
        assert written
        assert used <= limit, name
        exact = count_digits(frame.write(polygons_from_mask(mask, max_points=10**6)))
        if exact > limit >= 300:
            assert used > 0.6 * limit, name
        if exact <= limit:
            assert used == exact, name


def test_finer_budget_gives_a_closer_outline() -> None:
    original, processed = SIZES["shrunk"]
    mask = blobs(original, seed=5)
    frame = PolygonFrame("absolute", original, processed)
    quality = []
    for limit in (100, 250, 600, 1500):
        polygons = frame.read(frame.write(PolygonBudget(limit, count_digits).trace(mask, frame)))
        quality.append(iou(rasterize_polygons(polygons, original), mask))
    assert quality == sorted(quality)
    assert quality[-1] > 0.95


def test_many_regions_leave_room_for_the_largest() -> None:
    """Forty specks and one square in 64 tokens: the square stays a box."""
    mask = np.zeros((400, 400), np.uint8)
    for row in range(0, 400, 60):
        for column in range(0, 400, 60):
            mask[row : row + 5, column : column + 5] = 1
    mask[100:300, 100:300] = 1
    frame = PolygonFrame("absolute", (400, 400), (392, 392))
    polygons = PolygonBudget(MIN_TOKENS, count_digits).trace(mask, frame)
    assert len(polygons) == 1
    square = np.zeros_like(mask)
    square[100:300, 100:300] = 1
    assert iou(rasterize_polygons(polygons, (400, 400)), square) > 0.9


@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
def test_region_smaller_than_a_unit_becomes_a_box(coordinates: Any) -> None:
    frame = PolygonFrame(coordinates, (8000, 8000), (448, 448))
    for x in (3000.0, 0.0, 7996.0):
        tiny: Polygon = ((x, x), (x + 4, x), (x + 4, x + 4), (x, x + 4))
        (box,) = frame.write([tiny])
        area = rasterize_polygons(frame.read([box]), (8000, 8000))
        assert area[int(x) + 2, int(x) + 2]
        assert (np.asarray(box) <= frame.extent_hw[::-1]).all()
    assert frame.write([]) == ()
    large: Polygon = ((0.0, 0.0), (4000.0, 0.0), (4000.0, 4000.0))
    assert len(frame.write([tiny, large])) == 1  # beside others it is left out


def test_idle_points_are_left_out_and_the_region_stays() -> None:
    frame = PolygonFrame("absolute", (40, 40), (40, 40))
    square: Polygon = ((0, 0), (5, 0), (10, 0), (10, 0.2), (10, 10), (0, 10), (0, 5))
    assert frame.write([square]) == (((0, 0), (10, 0), (10, 10), (0, 10)),)
    ring = np.zeros((40, 40), np.uint8)
    ring[4:30, 4:30] = 1
    ring[10:20, 10:20] = 0
    written = frame.write(polygons_from_mask(ring, max_points=200))
    assert np.array_equal(rasterize_polygons(written, (40, 40)), ring)  # the seam to the hole has no width


@pytest.mark.real_data
@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
def test_budget_counts_the_tokens_of_the_real_tokenizer(shared_data: Path, coordinates: Any) -> None:
    """Also inside the whole answer, where the ends may join their neighbours."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "qwen2_5_vl_processor")

    def count(polygons: Any) -> int:
        return len(tokenizer.encode(polygon_text(polygons), add_special_tokens=False))

    assert count((((0, 0), (112, 0), (112, 56)),)) == 23  # [[ 0 , _ 1 1 2 , _ 1 1 2 ], _[ 0 , _ 0 , _ 5 6 ]]
    assert count((((99999, 99999),) * 4,)) <= MIN_TOKENS  # one box always fits
    for limit in (MIN_TOKENS, 150, 500):
        for original, processed in SIZES.values():
            frame = PolygonFrame(coordinates, original, processed)
            written = frame.write(PolygonBudget(limit, count).trace(blobs(original, 7), frame))
            assert written
            assert count(written) <= limit
            text = polygon_text(written)
            answer = '{"result": "fake", "mask": ' + text + ', "evidence": "边缘不自然"}'
            start = answer.index(text)
            spans = tokenizer(answer, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
            inside = [span for span in spans if span[1] > start and span[0] < start + len(text)]
            assert len(inside) <= limit
