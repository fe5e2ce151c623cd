"""Percentile bootstrap intervals over images (or over groups of images that share a source photo).

Resamples are multiplicities, one row per resample, so that means and AUROC are matrix operations; any other statistic
goes through `bootstrap_interval`. Same seed and size, same resamples: intervals of two models are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
"""Their chance moves a bound by 3 % of the statistic's standard error (1000: 9 %)."""

_BLOCK = 4_000_000
"""Numbers of a block of resamples, which keeps temporary arrays near 32 MB each."""


class Interval(NamedTuple):
    """Estimate on all images, bounds of the interval, and the resamples on which the statistic was defined.

    `low` and `high` are None when fewer than half the resamples define it (e.g. one image of a class).
    """

    estimate: float | None
    low: float | None
    high: float | None
    n_resamples: int


def resample_counts(
    n_images: int, n_resamples: int = RESAMPLES, seed: int = 0, groups: Sequence[object] | None = None
) -> np.ndarray:
    """How often each image is drawn in each resample.

    Args:
        n_images: N >= 1.
        n_resamples: rows of the result.
        seed: of numpy's PCG64 generator.
        groups: per image the name of its group; groups are then drawn whole (images of one source are not independent).

    Returns:
        (n_resamples, N) int64; rows add up to N without groups.
    """
    return np.concatenate(list(_blocks(n_images, n_resamples, seed, groups)))


def _blocks(n_images: int, n_resamples: int, seed: int, groups: Sequence[object] | None) -> Iterator[np.ndarray]:
    """The rows of `resample_counts`, some at a time."""
    if n_images < 1 or (groups is not None and len(groups) != n_images):
        raise ValueError(f"need at least one image and one group per image, found {n_images} images")
    rng = np.random.default_rng(seed)
    number = {name: i for i, name in enumerate(dict.fromkeys(range(n_images) if groups is None else groups))}
    place = None if groups is None else [number[name] for name in groups]
    size = len(number)
    rows = max(1, _BLOCK // n_images)
    for start in range(0, n_resamples, rows):
        counts = rng.multinomial(size, np.full(size, 1 / size), size=min(rows, n_resamples - start))
        yield counts if place is None else counts[:, place]


def bootstrap_interval(
    statistic: Callable[..., float | None],
    *arrays: ArrayLike,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
    groups: Sequence[object] | None = None,
) -> Interval:
    """Interval of any statistic of per-image arrays; calls it once per resample.

    Args:
        statistic: takes the arrays, each (n, ...), returns a float, or None where it is undefined (one class only).
        arrays: each (N, ...), N images.
        n_resamples, seed, groups: see `resample_counts`.
        confidence: in (0, 1).

    Returns:
        The interval; undefined resamples are left out and show in its `n_resamples`. All None for no image.
    """
    columns = [np.asarray(array) for array in arrays]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"arrays need one common length, found {[len(column) for column in columns]}")
    n_images = len(columns[0])
    if not n_images:
        return Interval(None, None, None, 0)
    values = []
    for block in _blocks(n_images, n_resamples, seed, groups):
        for counts in block:
            index = np.repeat(np.arange(n_images), counts)
            value = statistic(*(column[index] for column in columns))
            values.append(np.nan if value is None else value)
    return _interval(statistic(*columns), np.asarray(values, dtype=np.float64), confidence)


def bootstrap_mean(
    values: ArrayLike,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
    groups: Sequence[object] | None = None,
) -> Interval:
    """Interval of the mean of one value per image, such as pixel F1 or a hit (accuracy).

    Args:
        values: (N,) float, finite.
        n_resamples, seed, confidence, groups: see `bootstrap_interval`.
    """
    column = np.asarray(values, dtype=np.float64)
    if not len(column):
        return Interval(None, None, None, 0)
    blocks = _blocks(len(column), n_resamples, seed, groups)
    means = np.concatenate([counts @ column / counts.sum(axis=1) for counts in blocks])
    return _interval(float(column.mean()), means, confidence)


def bootstrap_auroc(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
    groups: Sequence[object] | None = None,
) -> Interval:
    """Interval of the image AUROC, ties counting half; a resample with one class only is undefined.

    Args:
        scores: (N,) float.
        labels: (N,) in {0, 1}.
        n_resamples, seed, confidence, groups: see `bootstrap_interval`.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or truth.shape != values.shape or not np.isin(truth, (0, 1)).all():
        raise ValueError(f"scores and labels are (N,), labels 0 or 1; found {values.shape} and {truth.shape}")
    if not len(values):
        return Interval(None, None, None, 0)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(values[order]) != 0))  # first image of each distinct score
    is_fake = truth[order] == 1

    def auroc(counts: np.ndarray) -> np.ndarray:
        """(R, N) multiplicities -> (R,) AUROC, NaN where a class is missing."""
        ordered = counts[:, order]
        fake = np.add.reduceat(ordered * is_fake, starts, axis=1)  # (R, distinct scores)
        real = np.add.reduceat(ordered * ~is_fake, starts, axis=1)
        wins = (fake * (np.cumsum(real, axis=1) - real / 2)).sum(axis=1)  # real ones below, and half of the tied
        pairs = fake.sum(axis=1) * real.sum(axis=1)
        return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    resampled = np.concatenate([auroc(block) for block in _blocks(len(values), n_resamples, seed, groups)])
    return _interval(auroc(np.ones((1, len(values)), dtype=np.int64))[0], resampled, confidence)


def _interval(estimate: float | None, values: np.ndarray, confidence: float) -> Interval:
    defined = values[~np.isnan(values)]
    estimate = None if estimate is None or np.isnan(estimate) else float(estimate)
    if estimate is None or 2 * len(defined) < len(values):
        return Interval(estimate, None, None, len(defined))
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), len(defined))
