"""Leaks: AUROC equals scikit-learn's, folds keep groups whole so that nothing is memorised, intervals are honest."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from finetune.data.audit import leaks


def data(seed: int, count: int = 400, groups: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    values = rng.normal(size=count) + labels
    return values, labels, rng.integers(0, groups, count)


@pytest.mark.parametrize("digits", [9, 1, 0])
def test_auroc_is_that_of_sklearn_ties_included(digits: int) -> None:
    for seed in range(5):
        values, labels, groups = data(seed)
        values = np.round(values, digits)
        found = leaks.auroc_interval(values, labels, groups)
        assert found.auroc == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.auroc < found.high


def test_a_number_used_as_it_is_has_the_auroc_of_sklearn_whatever_its_direction() -> None:
    values, labels, groups = data(1)
    folds = leaks.make_folds(labels, groups)
    assert folds is not None
    for column in (values, -values):
        scores = leaks.number_scores(column, labels, folds)
        assert roc_auc_score(labels, scores) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)


def test_the_interval_is_as_wide_as_that_of_a_bootstrap_over_groups() -> None:
    rng = np.random.default_rng(0)
    shift = rng.normal(size=60)  # images of a group are alike
    groups = np.repeat(np.arange(60), 6)
    labels = np.tile([0, 1, 0, 1, 0, 1], 60)
    values = shift[groups] * 1.5 + 0.8 * labels + rng.normal(size=360)
    found = leaks.auroc_interval(values, labels, groups)
    members = [np.flatnonzero(groups == group) for group in range(60)]
    resampled = []
    for _ in range(600):
        rows = np.concatenate([members[group] for group in rng.integers(0, 60, 60)])
        resampled.append(roc_auc_score(labels[rows], values[rows]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(high - low, rel=0.2)


def test_few_groups_prove_little_even_when_they_separate_perfectly() -> None:
    labels = np.repeat([0, 1], 6)
    found = leaks.auroc_interval(labels.astype(float), labels, np.arange(12))
    assert (found.auroc, found.low) == (1.0, 0.5)
    many = np.repeat([0, 1], 60)
    assert leaks.auroc_interval(many.astype(float), many, np.arange(120)).low == pytest.approx(0.95)
    assert leaks.auroc_interval(labels.astype(float), labels, labels).low is None


def test_folds_keep_groups_whole_and_hold_both_classes() -> None:
    _, labels, groups = data(3)
    folds = leaks.make_folds(labels, groups)
    assert folds is not None
    assert all(len(set(folds[groups == group].tolist())) == 1 for group in set(groups.tolist()))
    assert sorted(set(folds.tolist())) == [0, 1, 2, 3, 4]
    assert all(0 < labels[folds == fold].mean() < 1 for fold in range(5))
    one_sided = np.repeat([0, 1], 10)
    assert leaks.make_folds(one_sided, one_sided) is None
    assert leaks.make_folds(np.array([0, 1]), np.array([0, 0])) is None


def test_groups_prevent_memorising_a_photo() -> None:
    """Each photo has its own camera model and one label: by image that is a perfect clue, on unseen photos none."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(60), 8)
    labels = rng.permutation(np.repeat([0, 1], 30))[groups]
    by_image = leaks.make_folds(labels, np.arange(len(groups)))
    by_group = leaks.make_folds(labels, groups)
    assert by_image is not None
    assert by_group is not None
    assert roc_auc_score(labels, leaks.category_scores(groups, labels, by_image)) > 0.99
    assert abs(roc_auc_score(labels, leaks.category_scores(groups, labels, by_group)) - 0.5) < 0.06
    numbers, nothing = groups[:, None].astype(float), np.zeros((len(groups), 0), np.int64)
    empty = np.zeros((len(groups), 0))
    assert roc_auc_score(labels, leaks.combined_scores(numbers, nothing, labels, by_image)) > 0.99
    assert roc_auc_score(labels, leaks.combined_scores(empty, groups[:, None], labels, by_group)) < 0.65


def test_direction_is_learned_on_other_groups_so_chance_stays_chance() -> None:
    aurocs = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels, values = rng.integers(0, 2, 200), rng.normal(size=200)
        folds = leaks.make_folds(labels, np.arange(200))
        assert folds is not None
        aurocs.append(roc_auc_score(labels, leaks.number_scores(values, labels, folds)))
    assert np.mean(aurocs) < 0.52  # choosing the direction on the same images would give 0.53


def test_a_combination_is_found_that_no_single_feature_shows() -> None:
    rng = np.random.default_rng(2)
    width, table = rng.integers(0, 2, 600), rng.integers(0, 2, 600)
    labels = width ^ table
    folds = leaks.make_folds(labels, np.arange(600))
    assert folds is not None
    numbers = np.stack([width.astype(float), np.full(600, np.nan)], axis=1)  # a feature that never applies
    scores = leaks.combined_scores(numbers, table[:, None], labels, folds)
    assert roc_auc_score(labels, scores) > 0.99
    assert roc_auc_score(labels, leaks.category_scores(table, labels, folds)) < 0.6
    flat = leaks.combined_scores(np.full((600, 1), np.nan), np.zeros((600, 1), np.int64), labels, folds)
    assert np.ptp(flat) == 0


def test_text_that_differs_by_class_is_found() -> None:
    labels = np.tile([0, 1], 100)
    folds = leaks.make_folds(labels, np.arange(200))
    assert folds is not None
    texts = ["is it real?", "what was tampered?", ""]
    assert roc_auc_score(labels, leaks.text_scores(texts, labels, labels, folds)) == 1.0
    same = leaks.text_scores(texts, np.tile([0, 0, 1, 1], 50), labels, folds)
    assert roc_auc_score(labels, same) < 0.6
    assert np.ptp(leaks.text_scores(texts, np.full(200, 2), labels, folds)) == 0


def test_whole_groups_are_drawn_from_large_sets() -> None:
    groups = np.repeat(np.arange(100), 7)
    rows = leaks.spread_groups(groups, limit=210)
    assert len(rows) == 210
    assert all(np.isin(np.flatnonzero(groups == group), rows).all() for group in set(groups[rows].tolist()))
    assert len(leaks.spread_groups(groups, limit=10_000)) == 700
    assert len(leaks.spread_groups(np.zeros(50), limit=10)) == 50
