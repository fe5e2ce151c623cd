"""Pictures with candidate boxes: at their places, told apart without colour; the page around them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.inference.regions.cards import RegionCard, cards_html
from finetune.inference.regions.page import regions_page
from finetune.inference.regions.pictures import LOOKS, DrawnRegion, Outcome, draw_regions

GREY = (128, 128, 128)


def drawn(outcome: Outcome, box: tuple[float, float, float, float] = (40, 40, 160, 160), side: int = 400) -> np.ndarray:
    picture = Image.new("RGB", (200, 200), GREY)
    return np.asarray(draw_regions(picture, [DrawnRegion("R1", box, outcome)], side)).astype(int)


def covered(pixels: np.ndarray, row: int) -> np.ndarray:
    """Whether anything was drawn at each place of the lower edge, of a box from 80 to 320."""
    return (pixels[row - 6 : row + 7, 100:300] != GREY).any(axis=(0, 2))


def test_outcomes_are_told_apart_by_their_lines_alone() -> None:
    share = {outcome: covered(drawn(outcome), 320).mean() for outcome in LOOKS}
    assert share["tp"] == share["fn"] == 1.0
    assert 0.5 < share["fp"] < 0.9
    assert share["tn"] < share["fp"]
    runs = {outcome: np.abs(np.diff(covered(drawn(outcome), 320))).sum() for outcome in ("fp", "tn")}
    assert runs["tn"] > 1.5 * runs["fp"]  # dots are shorter than dashes
    across = {outcome: (drawn(outcome)[290:330, 200] == LOOKS[outcome].color).all(axis=1) for outcome in ("tp", "fn")}
    lines = {outcome: int((np.diff(found.astype(int)) == 1).sum()) for outcome, found in across.items()}
    assert lines == {"tp": 1, "fn": 2}


@pytest.mark.parametrize("size", [(200, 200), (300, 90), (61, 333)])
def test_boxes_lie_where_they_are_in_the_original(size: tuple[int, int]) -> None:
    box = (0.4 * size[0], 0.3 * size[1], 0.9 * size[0], 0.8 * size[1])
    picture = draw_regions(Image.new("RGB", size, GREY), [DrawnRegion("R1", box, "tp")], 600)
    assert max(picture.size) == 600
    found = (np.asarray(picture) == LOOKS["tp"].color).all(axis=2)
    found[: round(0.3 * picture.height) + 6] = False  # the label above
    rows, columns = np.nonzero(found)
    expected = (0.4 * picture.width, 0.9 * picture.width, 0.8 * picture.height)
    assert (columns.min(), columns.max(), rows.max()) == pytest.approx(expected, abs=4)


def test_boxes_at_and_beyond_the_border_and_ids_of_any_kind_are_drawn() -> None:
    picture = Image.new("L", (90, 60), 128)
    boxes = [(-5, -5, 30, 30), (60, 40, 95, 70), (0, 0, 90, 60), (20, 20, 20.4, 20.4)]
    for outcome in LOOKS:
        regions = [
            DrawnRegion(name, box, outcome) for name, box in zip(("R1", "区域二", "", "x" * 40), boxes, strict=True)
        ]
        assert draw_regions(picture, regions, 180).size == (180, 120)


def card(name: str, outcomes: dict[str, Outcome], error: str = "") -> RegionCard:
    rows = [
        {
            "id": key, "box_xyxy": [10, 10, 40, 40], "label": int(outcome in ("tp", "fn")), "true_type": "<crack>",
            "verdict": "abnormal" if outcome in ("tp", "fp") else "normal", "probability": 0.75, "confidence": 0.9,
            "type": "<b>spall", "reason": 'says "so" <script>alert(1)</script>', "error": error or None,
        }
        for key, outcome in outcomes.items()
    ]  # fmt: skip
    return RegionCard(name, None if error else Image.new("RGB", (60, 60)), rows, outcomes, ["{<answer>}"], error)


def test_cards_say_what_became_of_each_region_and_escape_what_the_model_wrote() -> None:
    html = cards_html(
        [
            card("good", {"R1": "tp", "R2": "tn"}),
            card("mixed", {"R1": "fp", "R2": "fn"}),
            card("missed", {"R1": "fn"}),
            card("gone<", {}, error="no <image>"),
        ],
        9,
    )
    assert html.count("<article") == 4
    assert html.count("data:image/jpeg") == 3
    for bad in ("<script>", "<b>spall", "<answer>", "no <image>", "gone<<"):
        assert bad not in html
    outcomes = re.findall(r'data-outcome="(\w+)" data-op="(\w*)"', html)
    assert outcomes == [("right", "right"), ("fp", "fn"), ("fn", "fn"), ("error", "error")]
    counts = dict(re.findall(r'data-filter="(\w+)".*?<b>(\d+)</b>', html))
    assert counts == {"all": "4", "wrong": "2", "fn": "2", "fp": "1", "error": "1"}
    assert "4 of 9 shown" in html
    assert "显示 4 / 9" in html
    assert "normal (FN)" in re.sub(r"<[^>]+>", "", html)


def metrics(with_val: bool) -> dict[str, Any]:
    from finetune.evaluation.regions.results import split_metrics
    from finetune.inference.regions.predictor import ReadRegions
    from finetune.schema import ImageInput, ImageTarget, Record

    regions = [{"id": "R1", "box_xyxy": [0, 0, 9, 9], "type": "crack"}, {"id": "R2", "box_xyxy": [9, 0, 19, 9]}]
    provenance = {"regions": regions, "positive_region_ids": ["R1"]}
    record = Record("a", (ImageInput(path="a.jpg"),), (ImageTarget(),), provenance=provenance)
    part = split_metrics([ReadRegions(record, {"R1": 0.9, "R2": 0.2}, {"R1": True, "R2": False})], 0, 0.5)
    run = dict.fromkeys(("model", "adapter", "data", "validation", "config_hash", "seed", "commit", "date", "device"))
    run |= {"seconds": 3.0, "versions": {"torch": "2"}, "model": "runs/<best>"}
    threshold = {"value": 0.5, "swept": with_val, "chosen_on": None, "val_f1": None}
    return {"threshold": threshold, "val": part if with_val else None, "test": part, "run": run}


@pytest.mark.parametrize("with_val", [True, False])
def test_the_page_stands_alone_in_both_languages(with_val: bool) -> None:
    rows = [{"threshold": t, "f1": t, "precision": None, "recall": 0.5, "image_f1": None} for t in (0.4, 0.42)]
    page = regions_page(
        "t", metrics(with_val), rows if with_val else [], [card("a", {"R1": "tp"})], ([1, 0], [0.9, 0.2])
    )
    assert "http" not in page.replace("http-equiv", "")
    assert "runs/&lt;best&gt;" in page
    assert ("Validation: threshold" in page) == with_val
    for words in ("区域 F1（测试）", "Region F1 (test)", "所写数字", "written number", "All", "全部"):
        assert words in page
    assert page.count("<section") == page.count("</section>") == 4
