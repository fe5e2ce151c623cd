"""Calibration of image scores: expected calibration error, a fitted temperature, isotonic regression, and the choice.

numpy and scipy only. `calibrate` fits on held-out images and says by cross-fitting what the fit is worth on others;
its result is the `calibration.json` beside a trained model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import expit

from finetune.errors import DataFormatError

TEMPERATURE_RANGE = (0.05, 20.0)
"""Temperatures are searched in here; a separable set has no finite optimum and ends at the lower bound."""

MAX_CALIBRATED = 12.0
"""No logit of the images that a temperature is fitted on is beyond this behind it: scores closer to 0 and 1 would be
the same number for many images, in files if not in memory, and tie them."""


def ece(scores: ArrayLike, labels: ArrayLike, bins: int = 15) -> float | None:
    """Expected calibration error of P(tampered): mean over images of |mean score - share tampered| of their bin.

    Args:
        scores: (N,) float in [0, 1], probability of label 1 (not the confidence in the predicted class).
        labels: (N,) in {0, 1}.
        bins: number of equally wide bins [k/bins, (k+1)/bins), the last one closed; empty bins weigh nothing.

    Returns:
        A number in [0, 1], or None for no image.

    Source: Naeini et al. 2015; the binary form of torchmetrics' `BinaryCalibrationError(norm="l1")`.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"scores and labels are (N,), found {values.shape} and {truth.shape}")
    if not len(values):
        return None
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("scores are probabilities in [0, 1]; apply a sigmoid to logits first")
    edges = np.linspace(0, 1, bins + 1)
    index = np.searchsorted(edges[1:-1], values, side="right")  # (N,) in 0..bins-1
    gaps = np.bincount(index, weights=values - truth, minlength=bins)  # sum over the bin = its size x its gap
    return float(np.abs(gaps).sum() / len(values))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Temperature T that minimises the negative log-likelihood of `sigmoid(logit / T)` on held-out images.

    One positive number: it changes neither the order of the images nor their verdict at 0.5.

    Args:
        logits: (N,) finite floats before the sigmoid.
        labels: (N,) in {0, 1}, both present.

    Returns:
        T within `TEMPERATURE_RANGE`, and so large that no logit over T is beyond `MAX_CALIBRATED`; above 1 = the model
        was over-confident.

    Raises:
        ValueError: for no image, one class only, or a logit that is not finite.

    Source: Guo et al. 2017. The loss is convex in 1/T, so the bounded search over log T finds its minimum.
    """
    values, truth = _held_out(logits, labels)
    signed = np.where(truth == 1, values, -values)  # (N,)

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signed / np.exp(log_temperature)).mean())

    low, high = TEMPERATURE_RANGE
    low = max(low, float(np.abs(values).max()) / MAX_CALIBRATED)
    low, high = np.log(low), np.log(max(low, high))
    found = minimize_scalar(negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


def apply_temperature(logits: ArrayLike, temperature: float) -> np.ndarray:
    """Calibrated scores `sigmoid(logit / temperature)`.

    Args:
        logits: any shape, float.
        temperature: > 0.

    Returns:
        float64 of the same shape, in [0, 1].
    """
    if not temperature > 0:
        raise ValueError(f"the temperature is a number > 0, found {temperature}")
    return expit(np.asarray(logits, dtype=np.float64) / temperature)


Method = Literal["none", "temperature", "isotonic"]
FOLDS = 5
"""Parts of the held-out images in cross-fitting: each is scored by a fit on the others."""

MIN_ISOTONIC = 200
"""Held-out images below which isotonic regression is not chosen: its curve would be a few steps."""

SMOOTH_SHARE = 0.1
"""What a sigmoid has in an isotonic curve, so that it rises everywhere."""


@dataclass(frozen=True)
class Isotonic:
    """A map from logits to scores: straight lines between its points, constant beyond them, and a share of a sigmoid.

    logits: (K,) increasing. scores: (K,) non-decreasing, in [0, 1]. temperature, share: `sigmoid(logit / temperature)`
    counts for `share` of a score, the lines for the rest; with a share the map is strictly increasing, so that it ties
    no images, gives no score of 0 or 1, and changes neither AUROC nor average precision.
    """

    logits: tuple[float, ...]
    scores: tuple[float, ...]
    temperature: float = 1.0
    share: float = 0.0

    def apply(self, logits: ArrayLike) -> np.ndarray:
        """float64 scores of any shape."""
        values = np.asarray(logits, dtype=np.float64)
        lines = np.interp(values, self.logits, self.scores)
        return (1 - self.share) * lines + self.share * apply_temperature(values, self.temperature)


def fit_isotonic(logits: ArrayLike, labels: ArrayLike) -> Isotonic:
    """Isotonic regression of the labels on held-out images, centred, with `SMOOTH_SHARE` of their temperature's curve.

    It can mend any monotone distortion, needs more images than a temperature (a few hundred), and may move the verdict
    at 0.5, since it is not bound to score 0.5 at logit 0. The flat stretches of the least-squares fit, which would tie
    all images on them, are each drawn together to a point at their mean logit.

    Args:
        logits, labels: as `fit_temperature`.

    Source: Zadrozny and Elkan 2002, as `sklearn.isotonic.IsotonicRegression` fits it; centred: Oron and Flournoy 2017.
    """
    values, truth = _held_out(logits, labels)
    distinct, place = np.unique(values, return_inverse=True)  # (K,), (N,)
    weights = np.bincount(place).astype(np.float64)  # (K,)
    fitted = isotonic_regression(np.bincount(place, weights=truth) / weights, weights=weights)
    starts = fitted.blocks[:-1]  # of the flat stretches
    centres = np.add.reduceat(weights * distinct, starts) / np.add.reduceat(weights, starts)
    scores = np.clip(fitted.x[starts], 0.0, 1.0)
    return Isotonic(tuple(centres.tolist()), tuple(scores.tolist()), fit_temperature(values, truth), SMOOTH_SHARE)


@dataclass(frozen=True)
class Calibration:
    """How logits become scores that can be read as probabilities: content of `calibration.json`.

    method: the one `apply` uses. temperature, isotonic: both fits, whichever is used; None where nothing could be
    fitted. ece, brier: cross-fitted, by method. num_images, num_tampered: what it was fitted on.
    """

    method: Method = "none"
    temperature: float | None = None
    isotonic: Isotonic | None = None
    ece: dict[str, float] = field(default_factory=dict)
    brier: dict[str, float] = field(default_factory=dict)
    num_images: int = 0
    num_tampered: int = 0

    def __call__(self, logits: ArrayLike) -> np.ndarray:
        """As `apply`."""
        return self.apply(logits)

    def apply(self, logits: ArrayLike) -> np.ndarray:
        """Scores in [0, 1] of logits of any shape, float64."""
        if self.method == "temperature" and self.temperature is not None:
            return apply_temperature(logits, self.temperature)
        if self.method == "isotonic" and self.isotonic is not None:
            return self.isotonic.apply(logits)
        return apply_temperature(logits, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `ece_before` and `ece_after` are those of no calibration and of the chosen method."""
        curve = self.isotonic
        return {
            "method": self.method,
            "temperature": self.temperature,
            "isotonic": None
            if curve is None
            else {
                "logits": list(curve.logits),
                "scores": list(curve.scores),
                "temperature": curve.temperature,
                "share": curve.share,
            },
            "ece_before": self.ece.get("none"),
            "ece_after": self.ece.get(self.method),
            "ece": self.ece,
            "brier": self.brier,
            "num_images": self.num_images,
            "num_tampered": self.num_tampered,
        }

    def save(self, path: str | Path) -> None:
        """Write `calibration.json`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote.

        Raises:
            DataFormatError: not such a file.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            curve = tree["isotonic"]
            isotonic = None
            if curve is not None:  # older files have the lines alone
                smooth = {key: curve[key] for key in ("temperature", "share") if key in curve}
                isotonic = Isotonic(tuple(curve["logits"]), tuple(curve["scores"]), **smooth)
            result = cls(
                tree["method"], tree["temperature"], isotonic, tree["ece"], tree["brier"], tree["num_images"],
                tree["num_tampered"],
            )  # fmt: skip
            scores = result.apply([-1.0, 0.0, 1.0])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataFormatError(
                f"{path} is no calibration ({type(error).__name__}: {error})",
                fix="remove it to use the scores as they are, or train again",
            ) from error
        is_fitted = result.method == "none" or getattr(result, str(result.method), None) is not None
        if result.method not in FITTED or not is_fitted or not ((scores >= 0) & (scores <= 1)).all():
            raise DataFormatError(
                f"{path} is no calibration",
                found=result.method,
                expected=f"method {', '.join(FITTED)} with its fit, and scores in [0, 1]",
                fix="remove it to use the scores as they are, or train again",
            )
        return result


def calibrate(
    logits: ArrayLike, labels: ArrayLike, folds: int = FOLDS, groups: Sequence[str] | None = None
) -> Calibration:
    """Fit a temperature and isotonic regression on held-out images, and choose the better one, or neither.

    The choice is by the cross-fitted Brier score (mean squared error of the score), a proper score: each image is
    judged by a fit that has not seen it. The calibration errors are measured in the same way; those of a fit on its
    own images would be near 0 for isotonic regression, whatever it is worth. Isotonic regression must be better by
    more than twice the standard error of its gain, and have `MIN_ISOTONIC` images. No choice changes the order of the
    images.

    Args:
        logits, labels: as `fit_temperature`. folds: at most the number of groups that hold the rarer class.
        groups: (N,) names; images of one group, such as an original and its tampered version, are in one fold, since a
            fit that knows one of them has seen the other. None: each image is a group.

    Returns:
        The fits on all images. With one group of a class nothing is fitted and `method` is none.

    Raises:
        ValueError: as `fit_temperature`.
    """
    values, truth = _held_out(logits, labels)
    num_tampered = int(truth.sum())
    names = np.arange(len(truth)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]  # (N,)
    if names.shape != truth.shape:
        raise ValueError(f"one group per image, found {names.shape} and {truth.shape}")
    folds = min(folds, *(len(np.unique(names[truth == value])) for value in (0, 1)))
    fold = _stratified_folds(truth, names, max(folds, 1))  # (N,)
    if folds < 2 or any(len(np.unique(truth[fold != k])) < 2 for k in range(folds)):
        return Calibration(num_images=len(truth), num_tampered=num_tampered)
    scores = {name: np.empty(len(truth)) for name in FITTED}
    for name, fit in FITTED.items():
        for k in range(folds):
            scores[name][fold == k] = fit(values[fold != k], truth[fold != k])(values[fold == k])
    brier = {name: float(((score - truth) ** 2).mean()) for name, score in scores.items()}
    errors = {name: float(ece(score, truth) or 0.0) for name, score in scores.items()}
    method: Method = "temperature" if brier["temperature"] < brier["none"] else "none"
    gain = (scores[method] - truth) ** 2 - (scores["isotonic"] - truth) ** 2  # (N,)
    if len(truth) >= MIN_ISOTONIC and gain.mean() > 2 * _standard_error(gain, names):
        method = "isotonic"
    return Calibration(
        method, fit_temperature(values, truth), fit_isotonic(values, truth), errors, brier, len(truth), num_tampered
    )


def _standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Of the mean of (N,) values whose groups (N,), 0..G-1, were drawn independently, each whole."""
    sums = np.bincount(groups, weights=values - values.mean())  # (G,)
    return float(np.sqrt(len(sums) / max(len(sums) - 1, 1) * (sums**2).sum()) / len(values))


def _fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    temperature = fit_temperature(logits, labels)
    return lambda values: apply_temperature(values, temperature)


FITTED: dict[str, Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "none": lambda logits, labels: lambda values: apply_temperature(values, 1.0),
    "temperature": _fitted_temperature,
    "isotonic": lambda logits, labels: fit_isotonic(logits, labels).apply,
}
"""Every method, simplest first: (logits, labels) it is fitted on -> function from logits to scores."""


def _stratified_folds(labels: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each image, (N,): whole groups, each where its classes are rarest so far, the largest ones first.

    Args:
        labels: (N,) in {0, 1}, both present. groups: (N,) in 0..G-1. The order within a size depends on nothing but G.
    """
    count = np.stack([np.bincount(groups[labels == value], minlength=groups.max() + 1) for value in (0, 1)], axis=1)
    share = count / count.sum(axis=0)  # (G, 2)
    order = np.random.default_rng(0).permutation(len(count))
    order = order[np.argsort(-count[order].sum(axis=1), kind="stable")]
    filled, fold_of_group = np.zeros((folds, 2)), np.empty(len(count), dtype=np.int64)
    for group in order:
        crowded = np.round(filled @ share[group], 12)  # (folds,); equal sums must stay equal
        chosen = np.lexsort((np.round(filled.sum(axis=1), 12), crowded))[0]
        fold_of_group[group] = chosen
        filled[chosen] += share[group]
    return fold_of_group[groups]


def _held_out(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N,) float64 and labels (N,) of both classes, or the ValueError of `fit_temperature`."""
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or truth.shape != values.shape or not np.isfinite(values).all():
        raise ValueError(f"logits and labels are finite (N,), found {values.shape} and {truth.shape}")
    if set(np.unique(truth).tolist()) != {0, 1}:
        raise ValueError("a calibration needs held-out images of both classes (labels 0 and 1)")
    return values, truth.astype(np.int64)
