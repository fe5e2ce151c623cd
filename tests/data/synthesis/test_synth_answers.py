"""Answers: polygons reproduce the mask within their budget, and the words say what the provenance holds, no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finetune.data.answer_polygons import PolygonFrame
from finetune.data.masks import polygons_from_mask, rasterize_polygons
from finetune.data.synthesis.answers import (
    LANGUAGES,
    LEVELS,
    PLACES,
    answer_polygons,
    describe_region,
    detail_text,
    difficulty,
    evidence_text,
    phrases,
    place_words,
    size_words,
    source_place,
)
from finetune.data.synthesis.operations import OPERATIONS
from finetune.data.synthesis.regions import SHAPES


def iou(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(bool), b.astype(bool)
    return (a & b).sum() / (a | b).sum()


def provenance(name: str = "splice", **operation: Any) -> dict[str, Any]:
    """Of a tampered image: easy to see, a tenth of the picture, upper left."""
    parameters = {"name": name, "visible_change": 30.0, "area": 0.1, "shape": "ellipse", **operation}
    region = {"place": "upper left", "share": 0.1}
    return {"operation": parameters, "degradations": [], "region": region, "difficulty": "easy"}


AUTHENTIC: dict[str, Any] = {"operation": None, "degradations": []}


def test_a_rectangle_comes_back_exactly() -> None:
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:30, 5:45] = True
    (polygon,) = answer_polygons(mask, 24)
    assert sorted(map(tuple, polygon)) == [(5, 10), (5, 30), (45, 10), (45, 30)]
    assert np.array_equal(rasterize_polygons([polygon], mask.shape), mask)


def test_whole_image_one_pixel_line_and_empty_mask() -> None:
    full = np.ones((30, 40), dtype=bool)
    assert rasterize_polygons(answer_polygons(full, 24), full.shape).all()
    assert answer_polygons(~full, 24) == []
    for rows, columns in ((slice(4, 5), slice(7, 8)), (slice(4, 5), slice(7, 30))):
        thin = np.zeros((30, 40), dtype=bool)
        thin[rows, columns] = True
        assert iou(rasterize_polygons(answer_polygons(thin, 24), thin.shape), thin) > 0


def test_budget_holds_large_pieces_come_first_and_holes_stay_empty() -> None:
    mask = np.zeros((120, 120), dtype=bool)
    for i in range(5):
        mask[5 + 22 * i : 10 + 24 * i, 5 : 20 + 15 * i] = True
    polygons = answer_polygons(mask, max_points=12)
    assert sum(map(len, polygons)) <= 12
    areas = [rasterize_polygons([polygon], mask.shape).sum() for polygon in polygons]
    assert areas == sorted(areas, reverse=True)
    ring = np.zeros((120, 120), dtype=bool)
    ring[20:100, 20:100] = True
    ring[50:70, 50:70] = False
    assert iou(rasterize_polygons(answer_polygons(ring, 24), ring.shape), ring) > 0.99


def test_a_bay_at_the_edge_of_the_image_is_no_hole() -> None:
    mask = np.zeros((60, 60), dtype=bool)
    mask[:30, 10:50] = True
    mask[:3, 28:31] = False  # too small for a hole, but open to the outside
    drawn = rasterize_polygons(answer_polygons(mask, 24), mask.shape)
    assert not drawn[0, 28:31].any()
    assert iou(drawn, mask) > 0.99


def test_tracing_a_piece_is_tracing_the_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((90, 120), dtype=bool)
        for _ in range(3):
            top, left = rng.integers(0, 60, size=2)
            mask[top : top + rng.integers(8, 40), left : left + rng.integers(8, 40)] = True
        whole = polygons_from_mask(mask, 24, max(16.0, 0.002 * mask.size))
        expected = PolygonFrame("absolute", mask.shape, mask.shape).write(whole)
        assert answer_polygons(mask, 24) == [[[int(x), int(y)] for x, y in points] for points in expected]


def test_coordinates_are_whole_numbers() -> None:
    rows, columns = np.mgrid[:90, :110]
    disc = (rows - 40) ** 2 + (columns - 60) ** 2 < 900
    polygons = answer_polygons(disc, 24)
    assert all(type(value) is int for polygon in polygons for point in polygon for value in point)
    assert iou(rasterize_polygons(polygons, disc.shape), disc) > 0.95


@pytest.mark.parametrize(
    ("rows", "columns", "zh", "en"),
    [
        ((0, 20), (0, 20), "左上", "upper left"),
        ((40, 60), (40, 60), "中央", "centre"),
        ((80, 99), (40, 60), "下方", "bottom"),
        ((40, 60), (0, 20), "左侧", "left side"),
    ],
)
def test_place_and_size_of_a_region(rows: tuple[int, int], columns: tuple[int, int], zh: str, en: str) -> None:
    mask = np.zeros((100, 100), dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    region = describe_region(mask)
    assert region["share"] == round(float(mask.mean()), 4)
    assert (place_words(region["place"], "zh"), place_words(region["place"], "en")) == (zh, en)


@pytest.mark.parametrize(
    ("share", "zh", "en"), [(0.03, "较小", "small"), (0.1, "中等", "medium"), (0.3, "较大", "large")]
)
def test_size_in_words_and_per_cent(share: float, zh: str, en: str) -> None:
    region = {"place": "centre", "share": share}
    assert zh in size_words(region, "zh")
    assert en in size_words(region, "en")
    for language in LANGUAGES:
        assert f"{round(100 * share)}%" in size_words(region, language)


def test_where_a_copy_came_from() -> None:
    mask = np.zeros((90, 90), dtype=bool)
    mask[:20, :20] = True  # upper left, moved there from the lower right
    moved = {"name": "copy_move", "shift_xy": [-60, -65], "mask_convention": "target"}
    assert source_place(mask, moved, (90, 90)) == "lower right"
    assert source_place(mask, {**moved, "mask_convention": "source_and_target"}, (90, 90)) is None
    assert source_place(mask, {**moved, "name": "splice"}, (90, 90)) is None  # from another picture


def test_difficulty_grows_with_what_hides_the_edit() -> None:
    plain = {"name": "splice", "visible_change": 40.0, "area": 0.2, "colour_match": 0.0}
    assert difficulty(plain, []) == "easy"
    assert difficulty({**plain, "visible_change": 10.0, "area": 0.03}, []) == "medium"
    assert difficulty({**plain, "visible_change": 5.0, "area": 0.03}, [{"name": "blur", "sigma": 0.5}]) == "hard"
    order = [
        LEVELS.index(difficulty({**plain, "visible_change": change}, [{"name": "jpeg", "quality": 75}]))
        for change in (40, 15, 5)
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_several_phrasings(name: str, language: str) -> None:
    for kind in ("smooth", "grain", "tone") if name == "retouch" else (None,):
        known = provenance(name, **({"kind": kind} if kind else {}))
        texts = {evidence_text(known, language, np.random.default_rng(seed)) for seed in range(30)}
        assert len(texts) >= 2
        place = place_words("upper left", language)
        assert all(place in text and "{" not in text for text in texts)
        assert not texts & {evidence_text(AUTHENTIC, language, np.random.default_rng(seed)) for seed in range(30)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_splice_that_was_made_to_fit_is_not_said_to_differ(language: str) -> None:
    def texts(**parameters: Any) -> set[str]:
        known = provenance("splice", **parameters)
        return {evidence_text(known, language, np.random.default_rng(seed)) for seed in range(20)}

    plain = texts(donor_match=False, blend="alpha")
    matched = texts(donor_match=True, blend="alpha", noise_match={"before": 2.0})
    blended = texts(donor_match=False, blend="poisson")
    assert not plain & matched
    assert not plain & blended
    assert not matched & blended
    word = {"zh": "不一致", "en": "differ"}[language]
    assert any(word in text for text in plain)
    assert not any(word in text for text in matched | blended)


def test_every_shape_is_worded_in_both_languages_or_in_none() -> None:
    for shape in SHAPES:
        known = provenance("erase", shape=shape)
        parts = [detail_text(known, language).count(comma) for language, comma in (("zh", "，"), ("en", ", "))]
        assert parts[0] == parts[1] == (1 if shape == "blob" else 2), shape


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_authentic_image_is_given_no_place_and_no_difficulty(language: str) -> None:
    for seed in range(10):
        for detail in ("short", "full"):
            text = evidence_text(AUTHENTIC, language, np.random.default_rng(seed), detail)
            assert not any(place_words(place, language) in text for row in PLACES for place in row if language == "zh")
            assert "%" not in text
            assert ("难易" if language == "zh" else "difficulty") not in text


def test_full_evidence_tells_size_shape_and_origin_only_where_they_are_known() -> None:
    known = provenance("copy_move")
    known["region"]["source_place"] = "bottom"
    assert (
        detail_text(known, "en")
        == "an area of medium size, about 10% of the picture, of elliptical shape, copied from the bottom"
    )
    assert detail_text(known, "zh") == "面积中等，约占画面10%，形状接近椭圆，内容来自画面下方"
    unknown = provenance("splice", shape="blob")
    assert detail_text(unknown, "en") == "an area of medium size, about 10% of the picture"
    rng = np.random.default_rng
    short, full = (evidence_text(known, "en", rng(0), detail) for detail in ("short", "full"))
    assert full.startswith(short.partition(";")[0])
    assert detail_text(known, "en") in full
    assert full.endswith("; difficulty: easy")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_tokenizer_is_shown_every_sentence(language: str) -> None:
    shown = phrases(language)
    for name in OPERATIONS:
        for kind in ("smooth", "grain", "tone") if name == "retouch" else ("",):
            for seed in range(6):
                text = evidence_text(provenance(name, kind=kind), language, np.random.default_rng(seed))
                finding, hardness = next((text[: -len(end)], end) for end in shown if text.endswith(end))
                assert finding in shown
                assert hardness in shown
