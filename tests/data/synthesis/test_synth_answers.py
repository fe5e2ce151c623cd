"""Answers: polygons reproduce the mask within their budget, and the words say where."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.data.synthesis.answers import evidence_text, mask_to_polygons, place_words, polygons_to_mask


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_a_rectangle_comes_back_exactly() -> None:
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:30, 5:45] = True
    (polygon,) = mask_to_polygons(mask)
    assert sorted(map(tuple, polygon)) == [(5, 10), (5, 30), (45, 10), (45, 30)]
    assert np.array_equal(polygons_to_mask([polygon], mask.shape), mask)


def test_whole_image_one_pixel_line_and_empty_mask() -> None:
    full = np.ones((30, 40), dtype=bool)
    assert polygons_to_mask(mask_to_polygons(full), full.shape).all()
    assert mask_to_polygons(~full) == []
    dot = np.zeros((30, 40), dtype=bool)
    dot[4, 7] = True
    assert iou(polygons_to_mask(mask_to_polygons(dot), dot.shape), dot) > 0
    line = np.zeros((30, 40), dtype=bool)
    line[4, 7:30] = True
    assert mask_to_polygons(line)


def test_budget_holds_and_large_pieces_come_first() -> None:
    mask = np.zeros((120, 120), dtype=bool)
    for i in range(5):
        mask[5 + 22 * i : 10 + 24 * i, 5 : 20 + 15 * i] = True
    polygons = mask_to_polygons(mask, max_points=12)
    assert sum(map(len, polygons)) <= 12
    areas = [polygons_to_mask([polygon], mask.shape).sum() for polygon in polygons]
    assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize(
    ("rows", "columns", "zh", "en"),
    [
        ((0, 20), (0, 20), "左上", "upper left"),
        ((40, 60), (40, 60), "中央", "centre"),
        ((80, 99), (40, 60), "下方", "bottom"),
    ],
)
def test_place_in_words(rows: tuple[int, int], columns: tuple[int, int], zh: str, en: str) -> None:
    mask = np.zeros((100, 100), dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    assert place_words(mask, "zh") == zh
    assert place_words(mask, "en") == en


@pytest.mark.parametrize("language", ["zh", "en"])
def test_evidence_is_filled_in_and_varies(language: str) -> None:
    mask = np.zeros((100, 100), dtype=bool)
    mask[:20, :20] = True
    operation = {"name": "splice", "mean_abs_change": 30.0, "area": 0.04, "colour_match": 0.0}
    texts = {evidence_text(mask, operation, [], language, np.random.default_rng(seed)) for seed in range(20)}
    assert len(texts) == 3
    place = place_words(mask, language)
    assert all(place in text and "{" not in text for text in texts)
    real = evidence_text(None, None, [], language, np.random.default_rng(0))
    assert place not in real
