"""Isotonic regression against scikit-learn, the choice of a method by cross-fitting, and calibration.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from finetune.errors import DataFormatError
from finetune.metrics.calibration import Calibration, calibrate, ece, fit_isotonic, fit_temperature


def drawn(seed: int, count: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn with probability `sigmoid(logit / scale)`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, count)
    return logits, (rng.random(count) < expit(logits / scale)).astype(int)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 1)), min_size=2, max_size=40))
def test_isotonic_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    logits, labels = np.array([p[0] / 2 for p in pairs]), np.array([p[1] for p in pairs])
    if len(set(labels.tolist())) < 2:
        return
    oracle = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(logits, labels)
    asked = np.linspace(-5, 5, 101)
    np.testing.assert_allclose(fit_isotonic(logits, labels).apply(asked), oracle.predict(asked), atol=1e-6)


def test_isotonic_keeps_only_the_corners_of_its_curve() -> None:
    curve = fit_isotonic(np.arange(10.0), [0] * 5 + [1] * 5)
    assert curve.logits == (0.0, 4.0, 5.0, 9.0)
    assert curve.scores == (0.0, 0.0, 1.0, 1.0)


def test_over_confident_scores_are_mended_and_the_error_is_measured_on_images_not_fitted_on() -> None:
    logits, labels = drawn(0, 1500, scale=4.0)
    found = calibrate(logits, labels)
    assert found.method != "none"
    assert found.temperature == pytest.approx(fit_temperature(logits, labels))
    assert found.temperature == pytest.approx(4.0, rel=0.2)
    assert found.ece["none"] == pytest.approx(ece(expit(logits), labels))  # nothing was fitted there
    assert found.ece[found.method] < 0.5 * found.ece["none"]
    own = ece(fit_isotonic(logits, labels).apply(logits), labels)
    assert found.ece["isotonic"] > own  # on its own images an isotonic fit looks better than it is
    fresh_logits, fresh_labels = drawn(1, 4000, scale=4.0)
    before, after = ece(expit(fresh_logits), fresh_labels), ece(found.apply(fresh_logits), fresh_labels)
    assert after < 0.5 * before


def test_a_distortion_that_no_temperature_mends_takes_the_isotonic_one() -> None:
    logits, labels = drawn(2, 3000)
    shifted = logits + 3.0
    found = calibrate(shifted, labels)
    assert found.method == "isotonic"
    assert found.brier["isotonic"] < found.brier["temperature"] < found.brier["none"]


def test_good_scores_are_left_nearly_as_they_are() -> None:
    logits, labels = drawn(3, 800)
    found = calibrate(logits, labels)
    assert np.abs(found.apply(logits) - expit(logits)).mean() < 0.05


def test_a_temperature_keeps_order_and_verdict() -> None:
    logits, labels = drawn(4, 300, scale=3.0)
    scores = Calibration("temperature", calibrate(logits, labels).temperature).apply(logits)
    assert np.array_equal(np.argsort(scores, kind="stable"), np.argsort(logits, kind="stable"))
    assert np.array_equal(scores >= 0.5, logits >= 0)


def test_the_result_does_not_depend_on_chance_and_few_images_give_none() -> None:
    logits, labels = drawn(5, 60)
    assert calibrate(logits, labels) == calibrate(logits, labels)
    alone = calibrate([1.0, -1.0, 0.5], [1, 0, 0])
    assert (alone.method, alone.num_images, alone.num_tampered) == ("none", 3, 1)
    with pytest.raises(ValueError, match="both classes"):
        calibrate([1.0, 2.0], [1, 1])


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    logits, labels = drawn(6, 500, scale=2.0)
    found = calibrate(logits, labels)
    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found
    tree = json.loads((tmp_path / "calibration.json").read_text())
    assert tree["ece_before"] == found.ece["none"]
    assert tree["ece_after"] == found.ece[found.method]


UNFITTED = json.dumps(Calibration("temperature").to_dict())
"""A method without what it needs, which would leave the scores as they are."""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"method": "magic"}', "not json", UNFITTED])
def test_another_file_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(DataFormatError, match=r"is no calibration.*fix: remove it"):
        Calibration.load(tmp_path / "calibration.json")
