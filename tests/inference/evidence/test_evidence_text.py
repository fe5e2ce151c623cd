"""A heat map in words: boxes, shares and places against plain counting, for any map; what an empty one says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from finetune.inference.evidence.prompts import fill_prompt
from finetune.inference.evidence.wording import (
    PLACES,
    Evidence,
    boxes_text,
    evidence_text,
    find_regions,
    gather_evidence,
    regions_text,
    score_text,
)

MAPS = arrays(
    np.float32,
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    elements=st.floats(0, 1, width=32),
    fill=st.sampled_from([0.0, 0.25, 1.0]),
)


def evidence(mask: np.ndarray | None, label: int = 1, **more: float) -> Evidence:
    size = (60, 90) if mask is None else mask.shape
    settings = {"threshold": 0.5, "heatmap_threshold": 0.5, "min_area": 0.0} | more
    return gather_evidence(0.93, label, mask, size, **settings)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(scores=MAPS, threshold=st.floats(0.01, 1.0))
def test_regions_are_the_connected_parts_of_the_marked_pixels(scores: np.ndarray, threshold: float) -> None:
    """Against scipy's labelling: number, size, box and mean score of every region, largest first."""
    found, count, share = find_regions(scores, threshold, max_regions=10_000, min_area=0.0)
    assert share == pytest.approx(float((scores >= threshold).mean()))
    marked = scores >= threshold
    labels, expected = ndimage.label(marked, structure=np.ones((3, 3)))
    assert count == len(found) == expected
    assert [r.area for r in found] == sorted((r.area for r in found), reverse=True)
    boxes = {}
    for k, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        own = scores[labels == k]
        key = (columns.start, rows.start, columns.stop, rows.stop, own.size)
        boxes.setdefault(key, []).append(float(own.mean(dtype=np.float64)))
    for region in found:
        x0, y0, x1, y1 = region.box_xyxy
        assert 0 <= x0 < x1 <= scores.shape[1]
        assert 0 <= y0 < y1 <= scores.shape[0]
        means = boxes[(*region.box_xyxy, round(region.area * scores.size))]
        assert any(region.score == pytest.approx(mean, abs=1e-6) for mean in means)
        assert region.place in PLACES
    total = sum(r.area for r in found)
    assert total == pytest.approx(float(marked.mean()))


@settings(max_examples=60, deadline=None)
@given(scores=MAPS, threshold=st.floats(0.01, 1.0), limit=st.integers(1, 4), share=st.floats(0, 0.3))
def test_the_words_hold_what_was_measured(scores: np.ndarray, threshold: float, limit: int, share: float) -> None:
    found = gather_evidence(
        0.25, 0, scores, scores.shape, threshold=0.5, heatmap_threshold=threshold, max_regions=limit, min_area=share
    )
    assert len(found.regions) == min(limit, found.num_regions)
    assert all(region.area >= share for region in found.regions[1:])
    assert (found.num_regions == 0) == (np.float32(found.peak) < np.float32(threshold))
    for language in ("zh", "en"):
        text = evidence_text(found, language)  # type: ignore[arg-type]
        assert "0.25" in text
        for region in found.regions:
            assert str(list(region.box_xyxy)) in text
            assert PLACES[region.place][language == "en"] in text
        if not found.regions:
            assert f"heatmap_threshold={threshold:g}" in text
            assert score_text(found.peak, threshold, 3) in text


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0, 0, 20, 20), "top-left"),
        ((50, 2, 60, 12), "top-middle"),
        ((95, 0, 120, 10), "top-right"),
        ((0, 40, 10, 50), "middle-left"),
        ((55, 40, 65, 50), "middle-middle"),
        ((110, 40, 120, 50), "middle-right"),
        ((0, 80, 30, 90), "bottom-left"),
        ((45, 75, 75, 90), "bottom-middle"),
        ((90, 70, 119, 89), "bottom-right"),
        ((2, 2, 118, 88), "whole"),
    ],
)
def test_places_are_thirds_of_the_image(box: tuple[int, int, int, int], place: str) -> None:
    scores = np.zeros((90, 120), np.float32)
    x0, y0, x1, y1 = box
    scores[y0:y1, x0:x1] = 0.8
    ((region,), count, _) = find_regions(scores, 0.5)
    assert (region.box_xyxy, region.place, count) == (box, place, 1)
    assert region.area == pytest.approx((x1 - x0) * (y1 - y0) / 90 / 120)
    assert region.score == pytest.approx(0.8)


def test_specks_are_left_out_but_never_the_largest() -> None:
    scores = np.zeros((100, 100), np.float32)
    scores[5, 5] = scores[50, 50] = 0.9
    scores[80:82, 10:13] = 0.7
    regions, count, _ = find_regions(scores, 0.5, min_area=0.01)
    assert count == 1
    assert regions[0].box_xyxy == (10, 80, 13, 82)
    assert find_regions(scores, 0.5, min_area=0.0)[1] == 3


def test_the_total_is_that_of_the_regions_counted() -> None:
    """Specks are left out of the count, so they do not stand in its total; they are said apart."""
    scores = np.zeros((400, 400), np.float32)
    scores[:20, :20] = 0.9
    scores[100::10, ::10] = 0.9  # 1200 single pixels
    found = evidence(scores, min_area=0.0005)
    assert (found.num_regions, found.area, found.regions_area) == (1, 1600 / 160000, 400 / 160000)
    en, zh = evidence_text(found, "en"), evidence_text(found, "zh")
    assert (
        "1 suspicious region with scores of at least 0.5, 0.2% of the image together, and specks of 0.8% (boxes" in en
    )
    assert "共1处，合计占图像0.2%，此外零星小块占0.8%（边界框" in zh
    assert "specks" not in evidence_text(evidence(scores, min_area=0.0), "en")


@given(score=st.floats(0, 1), threshold=st.floats(0, 1), digits=st.integers(0, 4))
def test_a_printed_score_stands_on_its_own_side_of_the_threshold(score: float, threshold: float, digits: int) -> None:
    text = score_text(score, threshold, digits)
    assert (float(text) >= threshold) == (score >= threshold)
    assert float(text) == pytest.approx(score, abs=0.5 * 10**-digits)


def test_scores_get_more_digits_only_where_they_need_them() -> None:
    assert [score_text(value, 0.5) for value in (0.93, 0.5, 0.499069, 0.49999)] == ["0.93", "0.50", "0.499", "0.49999"]
    close = replace(evidence(None, label=0), score=0.499069)
    assert "篡改得分0.499，判定阈值0.5" in evidence_text(close, "zh")
    assert fill_prompt("{score} {percent}", close, "en").endswith("0.499 49.9%")
    almost = evidence(np.full((60, 90), 0.49999, np.float32))
    assert "the highest score is 0.49999" in regions_text(almost, "en")


def test_the_sentences() -> None:
    scores = np.zeros((60, 90), np.float32)
    scores[0:10, 0:20] = 0.9
    scores[50:55, 80:85] = 0.75
    found = evidence(scores)
    assert boxes_text(found) == "[[0, 0, 20, 10], [80, 50, 85, 55]]"
    zh, en = evidence_text(found, "zh"), evidence_text(found, "en")
    assert zh.startswith("检测模型判定：疑似篡改（篡改得分0.93，判定阈值0.5）。图像尺寸：宽90像素，高60像素。")
    assert "区域1位于左上部，边界框[0, 0, 20, 10]，占图像3.7%，平均得分0.90；区域2位于右下部" in zh
    assert "2 suspicious regions with scores of at least 0.5, 4.2% of the image together" in en
    assert "region 2: lower right, box [80, 50, 85, 55], 0.5% of the image, mean score 0.75." in en
    assert "authentic" in evidence_text(evidence(scores, label=0), "en")
    only = evidence(scores, max_regions=1)
    assert "另有1处较小区域" in regions_text(only, "zh")
    assert "and 1 smaller ones" in regions_text(only, "en")


def test_an_empty_map_says_which_threshold_did_it_and_no_map_says_so() -> None:
    found = evidence(np.full((60, 90), 0.31, np.float32))
    assert regions_text(found, "zh") == "热图中没有像素达到阈值 heatmap_threshold=0.5（最高得分 0.310）"
    assert "No pixel of the heat map reaches heatmap_threshold=0.5 (the highest score is 0.310)." in evidence_text(
        found, "en"
    )
    assert regions_text(evidence(None), "en") == "there is no heat map"
