"""Bootstrap intervals: agreement of the fast and the general way, known variances, groups, one class, time."""

import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from finetune.metrics import bootstrap
from finetune.metrics.bootstrap import Interval, bootstrap_auroc, bootstrap_interval, bootstrap_mean, resample_counts


def auroc_or_none(scores: np.ndarray, labels: np.ndarray) -> float | None:
    return float(roc_auc_score(labels, scores)) if len(set(labels.tolist())) == 2 else None


def sample(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return np.round(rng.random(n) * 0.7 + 0.3 * labels, 1), labels  # one decimal: many ties


def test_fast_auroc_equals_sklearn_on_the_same_resamples() -> None:
    scores, labels = sample()
    fast = bootstrap_auroc(scores, labels, n_resamples=100, seed=3)
    slow = bootstrap_interval(auroc_or_none, scores, labels, n_resamples=100, seed=3)
    assert fast == pytest.approx(slow, abs=1e-12)
    assert fast.estimate == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert fast.low < fast.estimate < fast.high


def test_fast_mean_equals_the_general_way_and_the_known_standard_error() -> None:
    values = np.random.default_rng(1).normal(0, 1, 400)
    fast = bootstrap_mean(values)
    assert fast == pytest.approx(bootstrap_interval(np.mean, values), abs=1e-12)
    half_width = 1.96 * values.std() / np.sqrt(400)
    assert fast.high - fast.low == pytest.approx(2 * half_width, rel=0.1)


def test_same_seed_same_interval() -> None:
    scores, labels = sample()
    assert bootstrap_auroc(scores, labels) == bootstrap_auroc(scores, labels)
    assert bootstrap_auroc(scores, labels) != bootstrap_auroc(scores, labels, seed=1)


def test_groups_are_drawn_whole_and_widen_the_interval() -> None:
    counts = resample_counts(6, 50, groups=["a", "a", "b", "b", "c", "c"])
    assert (counts[:, ::2] == counts[:, 1::2]).all()
    assert (counts[:, ::2].sum(axis=1) == 3).all()
    values = np.repeat(np.random.default_rng(0).normal(size=50), 8)
    alone, grouped = bootstrap_mean(values), bootstrap_mean(values, groups=np.repeat(np.arange(50), 8).tolist())
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_many_images_are_resampled_in_blocks_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = sample()
    groups = (np.arange(60) // 3).tolist()

    def intervals() -> list[Interval]:
        return [
            *(bootstrap_mean(scores, groups=by) for by in (None, groups)),
            *(bootstrap_auroc(scores, labels, groups=by) for by in (None, groups)),
        ]

    whole = intervals()
    monkeypatch.setattr(bootstrap, "_BLOCK", 60 * 7)
    assert intervals() == whole
    assert np.array_equal(resample_counts(60, 20), resample_counts(60, 50)[:20])


def test_bounds_hardly_depend_on_the_seed() -> None:
    values = np.random.default_rng(1).normal(0, 1, 300)
    highs = [bootstrap_mean(values, seed=seed).high for seed in range(8)]
    error = values.std() / np.sqrt(300)
    assert np.std(highs) < 0.05 * error


def test_auroc_of_400_images_takes_less_than_two_seconds() -> None:
    scores, labels = np.random.default_rng(0).random(400), np.arange(400) % 2
    start = time.perf_counter()
    bootstrap_auroc(scores, labels, n_resamples=1000)
    assert time.perf_counter() - start < 2


def test_one_class_or_no_image_has_no_interval() -> None:
    assert bootstrap_auroc([0.1, 0.2, 0.3], [0, 0, 0]) == Interval(None, None, None, 0)
    assert bootstrap_auroc([], []) == bootstrap_mean([]) == Interval(None, None, None, 0)
    assert bootstrap_interval(auroc_or_none, [], []) == Interval(None, None, None, 0)


def test_undefined_resamples_are_left_out_and_counted() -> None:
    rare = bootstrap_auroc(
        [0.9, 0.1, 0.2, 0.3], [1, 0, 0, 0], n_resamples=1000
    )  # one fake: missing from (3/4)^4 = 32 %
    assert rare.estimate == rare.low == rare.high == 1.0
    assert 600 < rare.n_resamples < 750
    assert bootstrap_auroc([0.9, 0.1], [1, 0], n_resamples=1000).n_resamples == pytest.approx(500, abs=60)


def test_bad_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="common length"):
        bootstrap_interval(np.mean, [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="labels 0 or 1"):
        bootstrap_auroc([0.1, 0.2], [0, 2])
    with pytest.raises(ValueError, match="one group per image"):
        bootstrap_mean([1.0, 2.0], groups=["a"])
