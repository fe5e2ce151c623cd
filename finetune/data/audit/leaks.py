"""How well one feature alone gives the label away: AUROC of a one-feature classifier on groups it has not seen.

Numbers are used as they are, their direction chosen on the training folds; categories by their share of tampered images
on the training folds. The interval is that of Obuchowski (1997) for clustered ROC data, so a group counts once however
many images it has.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

NUM_FOLDS = 5
MAX_ROWS = 20_000
_SMOOTHING = 2.0
_MAX_CATEGORIES = 200


@dataclass(frozen=True)
class Interval:
    """AUROC with its 95 % interval; bounds None where there is one group of a class only."""

    auroc: float
    low: float | None
    high: float | None


def auroc_interval(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Interval:
    """AUROC (ties count half) and its interval over groups.

    The normal interval has no width at a perfect separation, so the lower bound is at most 1 - 3/n for n groups of the
    rarer class (the "rule of three": n cases without an exception still allow a rate of 3/n).

    Args:
        scores: (N,) float, finite.
        labels: (N,) 0 or 1, both present.
        groups: (N,) int, images of one group are not independent.
    """
    is_fake = labels == 1
    num_fake, num_real = int(is_fake.sum()), int((~is_fake).sum())
    if not num_fake or not num_real:
        raise ValueError("AUROC needs both classes")
    overall = rankdata(scores)
    within = np.empty(len(scores))
    within[is_fake], within[~is_fake] = rankdata(scores[is_fake]), rankdata(scores[~is_fake])
    other = overall - within  # images of the other class below, ties half
    won = np.where(is_fake, other / num_real, 1 - other / num_fake)  # (N,) share of won comparisons
    auroc = float(won[is_fake].mean())
    _, group = np.unique(groups, return_inverse=True)
    fake = np.bincount(group, (won - auroc) * is_fake)  # (G,)
    real = np.bincount(group, (won - auroc) * ~is_fake)
    fake_groups = np.count_nonzero(np.bincount(group, is_fake))
    real_groups = np.count_nonzero(np.bincount(group, ~is_fake))
    if min(fake_groups, real_groups) < 2:
        return Interval(auroc, None, None)
    variance = (
        fake_groups / (fake_groups - 1) * (fake**2).sum() / num_fake**2
        + real_groups / (real_groups - 1) * (real**2).sum() / num_real**2
        + 2 * len(fake) / (len(fake) - 1) * (fake * real).sum() / (num_fake * num_real)
    )
    width = 1.96 * np.sqrt(max(variance, 0.0))
    low = min(auroc - width, 1 - 3 / min(fake_groups, real_groups))
    return Interval(auroc, max(float(low), 0.0), min(float(auroc + width), 1.0))


def make_folds(labels: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """(N,) fold of each image; groups stay whole and each fold gets its share of groups of either class and of both.

    None where groups are too few, or of one class in such a way that some fold's training part lacks a class.
    """
    _, group = np.unique(groups, return_inverse=True)
    size = np.bincount(group)
    share = np.bincount(group, labels) / size  # (G,)
    kind = np.where(share == 0, 0, np.where(share == 1, 2, 1))
    shuffled = np.random.default_rng(seed).permutation(len(size))
    order = shuffled[np.lexsort((-size[shuffled], kind[shuffled]))]  # large ones first, dealt out like cards
    num_folds = min(NUM_FOLDS, len(size))
    fold_of_group = np.empty(len(size), dtype=np.int64)
    fold_of_group[order] = np.arange(len(size)) % max(num_folds, 1)
    folds = fold_of_group[group]
    for fold in range(num_folds):
        training = labels[folds != fold]
        if not len(training) or training.min() == training.max():
            return None
    return folds if num_folds >= 2 else None


def number_scores(values: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(N,) held-out scores of a number: itself or its negative, as the training folds say.

    Where folds disagree about the direction, scores are ranks among the training images, so that they compare.
    """
    directions = {}
    for fold in np.unique(folds):
        is_training = folds != fold
        truth = labels[is_training]
        ranks = rankdata(values[is_training])
        directions[fold] = 1.0 if ranks[truth == 1].mean() >= ranks[truth == 0].mean() else -1.0
    if len(set(directions.values())) == 1:
        return values * next(iter(directions.values()))
    scores = np.empty(len(values))
    for fold, direction in directions.items():
        known = np.sort(values[folds != fold])
        own = values[folds == fold]
        middle = (np.searchsorted(known, own, "left") + np.searchsorted(known, own, "right")) / (2 * len(known))
        scores[folds == fold] = direction * (middle - 0.5)
    return scores


def category_scores(codes: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(N,) held-out scores of a category: its share of tampered training images, drawn to the overall share if rare."""
    scores = np.empty(len(codes))
    _, codes = np.unique(codes, return_inverse=True)
    for fold in np.unique(folds):
        is_training = folds != fold
        prior = labels[is_training].mean()
        count = np.bincount(codes[is_training], minlength=codes.max() + 1)
        fakes = np.bincount(codes[is_training], labels[is_training], minlength=codes.max() + 1)
        share = (fakes + _SMOOTHING * prior) / (count + _SMOOTHING)
        scores[~is_training] = share[codes[~is_training]] - prior
    return scores


def combined_scores(
    numbers: np.ndarray, categories: np.ndarray, labels: np.ndarray, folds: np.ndarray, seed: int = 0
) -> np.ndarray:
    """(N,) held-out scores of gradient boosting over several features; finds combinations and bands.

    Args:
        numbers: (N, A) float, NaN where a feature does not apply.
        categories: (N, B) int codes.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    common = np.stack([_common_codes(column) for column in categories.T], axis=1) if categories.size else categories
    table = np.nan_to_num(np.concatenate([numbers, common], axis=1).astype(np.float64), nan=-1.0)  # (N, A + B)
    is_category = np.arange(table.shape[1]) >= numbers.shape[1]
    scores = np.zeros(len(labels))
    for fold in np.unique(folds):
        is_training = folds != fold
        varies = np.ptp(table[is_training], axis=0) > 0
        if not varies.any():
            continue
        model = HistGradientBoostingClassifier(
            max_iter=60,
            max_leaf_nodes=15,
            min_samples_leaf=int(np.clip(is_training.sum() // 50, 3, 20)),
            categorical_features=is_category[varies],
            early_stopping=False,
            random_state=seed,
        )
        columns = table[:, varies]
        with threadpool_limits(1):  # the tables are small: threads that wait for a busy core cost far more
            model.fit(columns[is_training], labels[is_training])
            chance = model.predict_proba(columns[~is_training])[:, 1]
        scores[~is_training] = chance - labels[is_training].mean()
    return scores


def text_scores(texts: list[str], codes: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(N,) held-out scores of a linear classifier over the character triples of texts.

    Args:
        texts: distinct texts.
        codes: (N,) place of each row's text.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    used, codes = np.unique(codes, return_inverse=True)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), max_features=20_000, lowercase=False)
    try:
        rows = vectorizer.fit_transform([texts[code] for code in used])
    except ValueError:  # no characters at all
        return np.zeros(len(labels))
    scores = np.empty(len(labels))
    for fold in np.unique(folds):
        is_training = folds != fold
        model = LogisticRegression(C=100.0, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a score is wanted, not the optimum
            model.fit(rows[codes[is_training]], labels[is_training])
        scores[~is_training] = model.decision_function(rows)[codes[~is_training]]
    return scores


def spread_groups(groups: np.ndarray, limit: int = MAX_ROWS, seed: int = 0) -> np.ndarray:
    """(M,) ascending rows of whole groups drawn at random until there are about `limit`, at least one group."""
    if len(groups) <= limit:
        return np.arange(len(groups))
    _, group = np.unique(groups, return_inverse=True)
    size = np.bincount(group)
    order = np.random.default_rng(seed).permutation(len(size))
    chosen = order[: max(int(np.searchsorted(np.cumsum(size[order]), limit, "right")), 1)]
    return np.flatnonzero(np.isin(group, chosen))


def _common_codes(codes: np.ndarray) -> np.ndarray:
    """(N,) codes 1, 2, ... of the most frequent values, 0 for the rest."""
    values, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    place = np.zeros(len(values), dtype=np.int64)
    place[np.argsort(-counts, kind="stable")[:_MAX_CATEGORIES]] = np.arange(1, min(len(values), _MAX_CATEGORIES) + 1)
    return place[inverse]
