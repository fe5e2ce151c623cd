"""Image metrics and calibration against scikit-learn, a number by hand, ties, one class, no image."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from finetune.metrics.calibration import MAX_CALIBRATED, TEMPERATURE_RANGE, apply_temperature, ece, fit_temperature
from finetune.metrics.classification import image_metrics


def sample(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties (one decimal) that know something about the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return np.clip(np.round(0.3 * labels + rng.random(n) * 0.7, 1), 0, 1), labels


def test_image_metrics_equal_sklearn_with_ties() -> None:
    scores, labels = sample()
    got, called = image_metrics(scores, labels), scores >= 0.5
    expected = {
        "auroc": sk.roc_auc_score(labels, scores),
        "average_precision": sk.average_precision_score(labels, scores),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called),
        "accuracy": sk.accuracy_score(labels, called),
        "f1": sk.f1_score(labels, called),
        "recall_fake": sk.recall_score(labels, called),
        "recall_real": sk.recall_score(labels, called, pos_label=0),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert (got["n_fake"], got["n_real"]) == (labels.sum(), 200 - labels.sum())


def test_image_metrics_by_hand() -> None:
    got = image_metrics([0.9, 0.5, 0.6, 0.1], [1, 1, 0, 0])
    assert (got["auroc"], got["accuracy"], got["recall_real"], got["recall_fake"]) == (0.75, 0.75, 0.5, 1.0)
    assert got["f1"] == pytest.approx(0.8)


def test_images_without_a_verdict_are_called_wrongly() -> None:
    labels, judged = [1, 1, 0, 0, 1, 0], [True, False, True, False, True, True]
    scores = [0.9, 0.5, 0.2, 0.5, 0.8, 0.6]
    got = image_metrics(scores, labels, judged=judged)
    assert (got["recall_fake"], got["recall_real"], got["accuracy"]) == pytest.approx((2 / 3, 1 / 3, 0.5))
    assert got["auroc"] == sk.roc_auc_score(labels, scores)
    kept = [number for number, answered in enumerate(judged) if answered]
    assert got["ece"] == ece([scores[k] for k in kept], [labels[k] for k in kept])
    for threshold in (0.0, 0.3, 0.7, 1.0):  # nothing is gained by where the threshold lies
        alone = image_metrics([0.5] * 4, [1, 1, 0, 0], threshold, judged=[False] * 4)
        assert (alone["recall_fake"], alone["recall_real"], alone["f1"], alone["ece"]) == (0, 0, 0, None)
    assert image_metrics(scores, labels, judged=[True] * 6) == image_metrics(scores, labels)


def test_a_missing_class_gives_none_not_nan() -> None:
    real = image_metrics([0.2, 0.7], [0, 0])
    assert [real[k] for k in ("auroc", "average_precision", "balanced_accuracy", "f1", "recall_fake")] == [None] * 5
    assert (real["accuracy"], real["recall_real"], real["n_real"], real["n_fake"]) == (0.5, 0.5, 2, 0)
    fake = image_metrics([0.2, 0.7], [1, 1])
    assert [fake[k] for k in ("auroc", "average_precision", "balanced_accuracy", "recall_real")] == [None] * 4
    assert fake["f1"] == pytest.approx(2 / 3)
    empty = image_metrics([], [])
    assert {k for k, v in empty.items() if v is not None} == {"n_real", "n_fake"}


@pytest.mark.parametrize(
    ("scores", "labels"), [([0.5, math.nan], [0, 1]), ([0.5, 1.5], [0, 1]), ([0.5, 0.5], [0, -100]), ([0.5], [0, 1])]
)
def test_bad_input_is_an_error(scores: list[float], labels: list[int]) -> None:
    with pytest.raises(ValueError):
        image_metrics(scores, labels)


def test_ece_by_hand() -> None:
    """Bins of a half: |0.2 - 0| over two of four images, |0.8 - 0.5| over the other two."""
    assert ece([0.1, 0.3, 0.7, 0.9], [0, 0, 0, 1], bins=2) == pytest.approx((0.2 * 2 + 0.3 * 2) / 4)
    assert ece([1.0, 0.0], [1, 0]) == 0.0
    assert ece([1.0, 0.0], [0, 1]) == 1.0
    assert ece([], []) is None


def test_ece_equals_the_textbook_loop() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.random(500), rng.integers(0, 2, 500)
    expected = 0.0
    for k in range(15):
        in_bin = (scores >= k / 15) & (scores < (k + 1) / 15)
        if in_bin.any():
            expected += in_bin.mean() * abs(scores[in_bin].mean() - labels[in_bin].mean())
    assert ece(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_ece_refuses_logits() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        ece([3.0, -2.0], [1, 0])


def test_temperature_is_the_one_of_a_logistic_regression_without_intercept() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 6, 2000)
    labels = (rng.random(2000) < apply_temperature(logits, 3.0)).astype(int)
    fitted = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit(logits[:, None], labels)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(1 / fitted.coef_[0, 0], rel=1e-4)
    assert temperature == pytest.approx(3.0, rel=0.15)
    before, after = ece(apply_temperature(logits, 1.0), labels), ece(apply_temperature(logits, temperature), labels)
    assert after < before


def test_temperature_of_separable_and_inverted_scores_stays_in_its_range() -> None:
    low, high = TEMPERATURE_RANGE
    assert fit_temperature([-0.2, 0.2], [0, 1]) == pytest.approx(low, rel=1e-3)
    assert fit_temperature([-2.0, 2.0], [0, 1]) == pytest.approx(2.0 / MAX_CALIBRATED, rel=1e-3)  # surer than enough
    assert fit_temperature([-2000.0, 2000.0], [1, 0]) == pytest.approx(2000.0 / MAX_CALIBRATED, rel=1e-3)
    assert fit_temperature([-2.0, 2.0], [1, 0]) == pytest.approx(high, rel=1e-3)


@pytest.mark.parametrize(("logits", "labels"), [([], []), ([1.0], [1]), ([math.inf, 0.0], [1, 0])])
def test_temperature_refuses_what_it_cannot_fit(logits: list[float], labels: list[int]) -> None:
    with pytest.raises(ValueError):
        fit_temperature(logits, labels)


def test_a_temperature_is_positive() -> None:
    with pytest.raises(ValueError, match="> 0"):
        apply_temperature([1.0], 0.0)
