"""Numbers of evaluated regions: intervals draw whole images, what has no verdict counts, labels are checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from finetune.data.regions.wording import RegionFinding
from finetune.errors import DataFormatError
from finetune.evaluation.regions.results import choose_threshold, region_rows, split_metrics
from finetune.evaluation.regions.sets import region_labels
from finetune.inference.regions.predictor import ReadRegions
from finetune.schema import ImageInput, ImageTarget, Record


def record(name: str, types: list[str | None], group: str = "", **more: Any) -> Record:
    regions = [
        {"id": f"R{k + 1}", "box_xyxy": [10 * k, 0, 10 * k + 9, 9], "type": kind} for k, kind in enumerate(types)
    ]
    provenance = {"regions": regions, "positive_region_ids": [r["id"] for r in regions if r["type"]], **more}
    return Record(name, (ImageInput(path=f"{name}.jpg"),), (ImageTarget(),), (), group, f"a.jsonl:{name}", provenance)


def read(name: str, types: list[str | None], scores: list[float], group: str = "") -> ReadRegions:
    found = {f"R{k + 1}": score for k, score in enumerate(scores)}
    return ReadRegions(record(name, types, group), found, {key: score >= 0.5 for key, score in found.items()})


def test_the_sweep_is_that_of_another_implementation() -> None:
    """Every step against scikit-learn; the lowest of the best is taken."""
    scored = [read("a", ["crack", None, "spall"], [0.55, 0.5, 0.41]), read("b", [None, "crack"], [0.61, 0.71])]
    labels, scores = [1, 0, 1, 0, 1], [0.55, 0.5, 0.41, 0.61, 0.71]
    threshold, rows = choose_threshold(scored, "val.jsonl")
    assert [row["threshold"] for row in rows] == [round(0.4 + 0.02 * k, 2) for k in range(21)]
    for row in rows:
        called = [int(score >= row["threshold"]) for score in scores]
        assert row["f1"] == pytest.approx(f1_score(labels, called, zero_division=0))
        assert row["recall"] == pytest.approx(recall_score(labels, called))
        if any(called):
            assert row["precision"] == pytest.approx(precision_score(labels, called))
    best = max(row["f1"] for row in rows)
    assert threshold == min(row["threshold"] for row in rows if row["f1"] == best)


def test_intervals_draw_whole_images() -> None:
    """Images that are all alike give the same numbers in every sample; single regions would not."""
    alike = [read(f"i{k}", ["crack", None, "crack"], [0.9, 0.6, 0.2], f"g{k % 2}") for k in range(6)]
    found = split_metrics(alike, 0, 0.5)
    assert found["roi"]["f1"] == 0.5
    assert found["intervals"]["roi.f1"] == [0.5, 0.5]
    assert found["intervals"]["roi.auroc"] == [0.5, 0.5]
    assert found["intervals_over_groups"]["roi.recall"] == [0.5, 0.5]
    other = [*alike, read("z", ["crack", None], [0.9, 0.1])]
    low, high = split_metrics(other, 0, 0.5)["intervals"]["roi.f1"]
    assert low < split_metrics(other, 0, 0.5)["roi"]["f1"] < high


def test_groups_of_single_images_are_no_groups() -> None:
    found = split_metrics([read("a", ["crack"], [0.9], "g1"), read("b", [None], [0.1], "g2")], 0, 0.5)
    assert found["intervals_over_groups"] == {}


def test_a_record_without_a_verdict_counts_as_one_that_calls_nothing() -> None:
    good = [read("a", ["crack", None], [0.9, 0.1]), read("b", [None], [0.2])]
    bad = ReadRegions(record("c", ["spall", None]), error=DataFormatError("image is gone", record="c"))
    found = split_metrics([*good, bad], 3, 0.5)
    assert (found["num_images"], found["num_failed"], found["num_rejected"]) == (3, 1, 3)
    assert (found["roi"]["precision"], found["roi"]["recall"]) == (1.0, 0.5)
    assert found["image"]["recall"] == 0.5
    assert found["confusion"]["spall"] == {"normal": 1}
    assert found["calibration"]["token"]["n"] == 3
    assert [(row["probability"], row["verdict"], row["error"]) for row in region_rows(bad)] == [
        (None, None, "record 'c': image is gone")
    ] * 2


def test_both_confidences_are_told_apart_and_a_silent_answer_keeps_the_probability() -> None:
    base = read("a", ["crack", None, "spall"], [0.8, 0.7, 0.9])
    findings = {"R1": RegionFinding("R1", "crack", 1.0, "x"), "R2": RegionFinding("R2", "spall", None, "")}
    each = replace(base, findings=findings)
    calibration = split_metrics([each], 0, 0.5)["calibration"]
    assert calibration["written"] == {"ece": 0.0, "token_ece": pytest.approx(0.2), "n": 1}
    assert calibration["token"]["n"] == 3
    rows = list(region_rows(each))
    assert [row["probability"] for row in rows] == [0.8, 0.7, 0.9]
    assert [row["confidence"] for row in rows] == [1.0, None, None]
    assert [row["type"] for row in rows] == ["crack", "spall", None]
    assert split_metrics([each], 0, 0.5)["confusion"] == {
        "crack": {"crack": 1}, "normal": {"spall": 1}, "spall": {"abnormal": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positive_region_ids": None}, "no labels of its regions"),
        ({"positive_region_ids": ["R1", "R7"]}, "R7"),
        ({"positive_region_ids": []}, "region R1 has a type and is not in the list"),
        ({"regions": None}, "no candidate regions"),
        ({"regions": [{"id": "R1"}]}, "no region"),
    ],
)
def test_labels_that_cannot_be_right_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataFormatError, match="record 'a'") as caught:
        region_labels(record("a", ["crack", None], **changes))
    assert words in str(caught.value)
    assert "a.jsonl:a" in str(caught.value)


def test_an_abnormal_region_may_be_without_a_type() -> None:
    unnamed = record("a", [None, None], positive_region_ids=["R2"])
    assert region_labels(unnamed) == {"R1": None, "R2": "abnormal"}
