"""Pixel metrics against scikit-learn, numbers by hand, ties, missing and empty maps."""

import numpy as np
import pytest
from sklearn import metrics as sk

from finetune.metrics.localization import (
    authentic_metrics,
    best_f1,
    localization_metrics,
    permuted_f1,
    pixel_metrics,
)

MASK = np.array([[1, 1, 0, 0]], dtype=np.uint8)
EMPTY = np.zeros((2, 5), dtype=np.uint8)


def sample(seed: int = 0, shape: tuple[int, int] = (13, 17)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) > 0.7
    return np.clip(np.round(0.4 * mask + 0.6 * rng.random(shape), 1), 0, 1).astype(np.float32), mask


@pytest.mark.parametrize("seed", range(5))
def test_pixel_metrics_equal_sklearn_with_ties(seed: int) -> None:
    scores, mask = sample(seed)
    got, called = pixel_metrics(scores, mask), (scores >= 0.5).ravel()
    truth = mask.ravel()
    assert got["f1"] == got["dice"] == pytest.approx(sk.f1_score(truth, called), abs=1e-12)
    assert got["iou"] == pytest.approx(sk.jaccard_score(truth, called), abs=1e-12)
    assert got["auc"] == pytest.approx(sk.roc_auc_score(truth, scores.ravel()), abs=1e-12)
    by_trial = max(sk.f1_score(truth, scores.ravel() >= t) for t in np.unique(scores) if t > 0)
    assert got["f1_best_threshold"] == best_f1(scores, mask) == pytest.approx(by_trial, abs=1e-12)
    inverse = sk.f1_score(truth, ~called)
    assert permuted_f1(scores, mask) == pytest.approx(max(got["f1"], inverse), abs=1e-12)


def test_pixel_metrics_by_hand() -> None:
    got = pixel_metrics(np.array([[0.9, 0.3, 0.6, 0.1]]), MASK)
    assert got == pytest.approx({"f1": 0.5, "iou": 1 / 3, "dice": 0.5, "auc": 0.75, "f1_best_threshold": 0.8})


def test_the_three_f1_are_not_the_same_number() -> None:
    scores = np.array([[0.1, 0.2, 0.9, 0.8]])
    assert pixel_metrics(scores, MASK)["f1"] == 0.0
    assert best_f1(scores, MASK) == pytest.approx(2 / 3)
    assert permuted_f1(scores, MASK) == 1.0


@pytest.mark.parametrize("scores", [None, np.zeros((1, 4))])
def test_a_missing_map_counts_as_an_empty_one(scores: np.ndarray | None) -> None:
    expected = {"f1": 0.0, "iou": 0.0, "dice": 0.0, "auc": 0.5, "f1_best_threshold": 0.0}
    assert pixel_metrics(scores, MASK) == expected


def test_a_wholly_tampered_image_has_no_auc_and_does_not_spoil_the_mean() -> None:
    whole = np.ones((1, 4))
    assert pixel_metrics(whole, whole)["auc"] is None
    got = localization_metrics([(whole, whole), (np.array([[0.9, 0.3, 0.6, 0.1]]), MASK)])
    assert (got["f1"], got["auc"], got["n"]) == (0.75, 0.75, 2)


def test_means_are_over_tampered_images_of_any_size_only() -> None:
    pairs = [sample(0), sample(1, (5, 40)), (np.ones((2, 5)), EMPTY), (None, MASK)]
    got = localization_metrics(pairs)
    rows = [pixel_metrics(*pairs[i]) for i in (0, 1, 3)]
    assert got.pop("n") == 3
    assert got == pytest.approx({name: np.mean([row[name] for row in rows]) for name in rows[0]})


def test_without_tampered_images_there_is_nothing_to_say() -> None:
    for pairs in ([], [(None, EMPTY)]):
        got = localization_metrics(pairs)
        assert got.pop("n") == 0
        assert set(got.values()) == {None}


def test_authentic_metrics_by_hand() -> None:
    speck = np.zeros((2, 5))
    speck[0, 0] = 0.5
    pairs = [(speck, EMPTY), (None, EMPTY), (np.ones((1, 1)), np.zeros((1, 1))), (np.zeros((1, 4)), EMPTY[:1, :4])]
    pairs.append((np.ones((1, 4)), MASK))  # tampered: left out
    got = authentic_metrics(pairs)
    assert got == pytest.approx({"false_alarm_rate": 0.5, "false_positive_area": 1.1 / 4, "n": 4})
    assert authentic_metrics(pairs, min_area=0.1)["false_alarm_rate"] == 0.25
    assert authentic_metrics(pairs, threshold=0.6)["false_alarm_rate"] == 0.25
    assert authentic_metrics([(None, MASK)]) == {"false_alarm_rate": None, "false_positive_area": None, "n": 0}


@pytest.mark.parametrize(
    ("scores", "mask"),
    [
        (np.zeros((2, 2)), MASK),
        (np.array([[0.1, np.nan, 0.2, 0.3]]), MASK),
        (np.array([[3.0, -1.0, 0.2, 0.3]]), MASK),
        (np.zeros((2, 5)), EMPTY),
    ],
)
def test_bad_input_is_an_error(scores: np.ndarray, mask: np.ndarray) -> None:
    with pytest.raises(ValueError):
        pixel_metrics(scores, mask)
