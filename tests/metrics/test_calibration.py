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
from finetune.metrics import calibration
from finetune.metrics.calibration import Calibration, calibrate, ece, fit_isotonic, fit_temperature


def drawn(seed: int, count: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn with probability `sigmoid(logit / scale)`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, count)
    return logits, (rng.random(count) < expit(logits / scale)).astype(int)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 1)), min_size=2, max_size=40))
def test_flat_stretches_are_scikit_learn_s_and_the_curve_rises_everywhere(pairs: list[tuple[int, int]]) -> None:
    logits, labels = np.array([p[0] / 2 for p in pairs]), np.array([p[1] for p in pairs])
    if len(set(labels.tolist())) < 2:
        return
    oracle = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(logits, labels)
    curve = fit_isotonic(logits, labels)
    np.testing.assert_allclose(curve.scores, oracle.predict(curve.logits), atol=1e-6)
    np.testing.assert_allclose(sorted(set(oracle.predict(logits).round(6))), sorted(set(np.round(curve.scores, 6))))
    asked = np.linspace(-5, 5, 101)
    scores = curve.apply(asked)
    bound = curve.temperature if curve.temperature > 0.2 else None  # at the lowest, a sigmoid is flat to the last bit
    assert (np.diff(scores) >= 0).all()
    assert bound is None or (np.diff(scores) > 0).all()
    assert (scores >= 0).all()
    assert (scores <= 1).all()


def test_a_flat_stretch_is_drawn_together_to_a_point_and_no_image_is_sure() -> None:
    logits = np.array([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    curve = fit_isotonic(logits, [0, 0, 1, 0, 1, 0, 1, 1])
    assert curve.logits == (-2.5, 0.5, 3.5)
    assert curve.scores == (0.0, 0.5, 1.0)
    scores = curve.apply(logits)
    assert len(set(scores.tolist())) == 8  # sklearn's has three
    assert 0 < scores.min() < 0.1
    assert 0.9 < scores.max() < 1
    sigmoid = expit(logits / curve.temperature)
    np.testing.assert_allclose(scores, 0.9 * np.interp(logits, curve.logits, curve.scores) + 0.1 * sigmoid)


def test_over_confident_scores_are_mended_and_the_error_is_measured_on_images_not_fitted_on() -> None:
    logits, labels = drawn(0, 1500, scale=4.0)
    found = calibrate(logits, labels)
    assert found.method != "none"
    assert found.temperature == pytest.approx(fit_temperature(logits, labels))
    assert found.temperature == pytest.approx(4.0, rel=0.2)
    assert found.ece["none"] == pytest.approx(ece(expit(logits), labels))  # nothing was fitted there
    assert found.ece[found.method] < 0.5 * found.ece["none"]
    own = ((fit_isotonic(logits, labels).apply(logits) - labels) ** 2).mean()
    assert found.brier["isotonic"] > own  # on its own images an isotonic fit looks better than it is
    fresh_logits, fresh_labels = drawn(1, 4000, scale=4.0)
    before, after = ece(expit(fresh_logits), fresh_labels), ece(found.apply(fresh_logits), fresh_labels)
    assert after < 0.5 * before


def test_a_distortion_that_no_temperature_mends_takes_the_isotonic_one() -> None:
    logits, labels = drawn(2, 3000)
    shifted = logits + 3.0
    found = calibrate(shifted, labels)
    assert found.method == "isotonic"
    assert found.brier["isotonic"] < found.brier["temperature"] < found.brier["none"]


def test_isotonic_needs_images_and_a_gain_beyond_chance() -> None:
    """On 120 validation images it had won by .0005 of Brier, and cost .05 AUROC elsewhere by its ties."""
    logits, labels = drawn(2, 3000)
    few = calibrate(logits[:150] + 3.0, labels[:150])
    assert few.brier["isotonic"] < few.brier["temperature"]
    assert few.method != "isotonic"
    wins = chosen = 0
    for seed in range(40):  # a temperature is all that is wrong
        logits, labels = drawn(100 + seed, 300, scale=2.0)
        found = calibrate(logits, labels)
        wins += found.brier["isotonic"] < found.brier["temperature"]
        chosen += found.method == "isotonic"
    assert chosen <= 2 < wins, (chosen, wins)


def test_copies_of_an_image_do_not_make_a_gain_certain() -> None:
    values = np.random.default_rng(0).normal(size=50)
    alone = calibration._standard_error(values, np.arange(50))
    assert alone == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    copied = np.repeat(values, 30)
    assert calibration._standard_error(copied, np.repeat(np.arange(50), 30)) == pytest.approx(alone)
    assert calibration._standard_error(copied, np.arange(1500)) < 0.2 * alone


@pytest.mark.parametrize("count", [60, 120, 400])
def test_images_that_can_be_told_apart_are_not_made_sure(count: int) -> None:
    """A separable set has no best temperature; the smallest one tied 60 % of other images at a score of 1."""
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 2
    found = calibrate((labels * 2 - 1) * rng.uniform(2, 6, count), labels)
    assert found.method != "none"
    asked = np.sort(rng.normal(0, 5, 500).clip(-12, 12))  # logits as they come, up to twice as far out
    asked = np.unique(asked)
    scores = found.apply(asked)
    assert (np.diff(scores) > 0).all()
    alike = scores[np.abs(asked) < 6].round(6)  # as in predictions.jsonl, of logits as those that it was fitted on
    assert 0 < alike.min() < alike.max() < 1
    assert 0 < scores.min() < scores.max() < 1


def test_no_choice_changes_the_order_of_images() -> None:
    logits, labels = drawn(2, 3000)
    found = calibrate(logits + 3.0, labels)
    assert found.method == "isotonic"
    asked = np.sort(np.random.default_rng(0).normal(0, 6, 500))
    assert (np.diff(found.apply(asked)) > 0).all()


def test_a_file_of_an_earlier_version_is_applied_as_it_was(tmp_path: Path) -> None:
    tree = calibrate(*drawn(2, 3000)).to_dict() | {"method": "isotonic"}
    tree["isotonic"] = {"logits": [-1.0, 0.0, 2.0], "scores": [0.0, 0.5, 1.0]}
    (tmp_path / "calibration.json").write_text(json.dumps(tree))
    scores = Calibration.load(tmp_path / "calibration.json").apply([-9.0, -0.5, 1.0, 9.0])
    assert scores.tolist() == [0.0, 0.25, 0.75, 1.0]


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


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_images_of_one_group_are_never_on_both_sides_of_a_fold(folds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins, and pictures of one photograph; classes stay about as frequent in each fold as in all images."""
    rng = np.random.default_rng(2)
    groups = np.repeat([f"photo {k}" for k in range(40)], rng.integers(1, 6, 40))
    labels = rng.permuted(np.arange(len(groups)) % 2)
    seen: list[np.ndarray] = []
    original = calibration._stratified_folds
    monkeypatch.setattr(calibration, "_stratified_folds", lambda *a: seen.append(original(*a)) or seen[-1])
    found = calibrate(rng.normal(size=len(groups)) + labels, labels, folds, groups)
    (fold,) = seen
    assert found.ece
    assert {len(set(fold[groups == name].tolist())) for name in set(groups.tolist())} == {1}
    assert set(fold.tolist()) == set(range(folds))
    for value in (0, 1):
        counts = np.bincount(fold[labels == value], minlength=folds)
        assert counts.max() - counts.min() <= 5  # the largest group
    again = calibrate(rng.normal(size=len(groups)) + labels, labels, folds)  # without groups: every image its own
    sizes = [np.bincount(seen[-1][labels == value], minlength=folds) for value in (0, 1)]
    assert all(size.max() - size.min() <= 1 for size in sizes)
    assert again.num_images == len(groups)


def test_copies_do_not_make_isotonic_regression_look_better() -> None:
    """Labels of chance, each picture thirty times: a fit that has seen the copies knows a picture's label."""
    rng = np.random.default_rng(0)
    logits, labels = np.repeat(rng.normal(size=10), 30), np.repeat(rng.permuted(np.arange(10) % 2), 30)
    groups = np.repeat([f"g{k}" for k in range(10)], 30)
    blind, told = calibrate(logits, labels), calibrate(logits, labels, groups=groups)
    assert blind.brier["isotonic"] < 0.21
    assert told.method != "isotonic"
    assert told.brier["isotonic"] > 0.25  # worse than always saying one half, which is all that can be known


def test_one_group_of_a_class_is_too_little() -> None:
    logits, labels = [1.0, 2.0, -1.0, -2.0], [1, 1, 0, 0]
    assert calibrate(logits, labels).temperature is not None
    assert calibrate(logits, labels, groups=["a", "a", "b", "c"]).method == "none"
    assert calibrate(logits, labels, groups=["a", "b", "a", "b"]).temperature is not None
    with pytest.raises(ValueError, match="one group per image"):
        calibrate(logits, labels, groups=["a"])


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
