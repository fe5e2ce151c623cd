"""Calibration of image scores: expected calibration error and a fitted temperature. numpy and scipy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import expit

TEMPERATURE_RANGE = (0.05, 20.0)
"""Temperatures are searched in here; a separable set has no finite optimum and ends at the lower bound."""


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
        T within `TEMPERATURE_RANGE`; above 1 = the model was over-confident.

    Raises:
        ValueError: for no image, one class only, or a logit that is not finite.

    Source: Guo et al. 2017. The loss is convex in 1/T, so the bounded search over log T finds its minimum.
    """
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or truth.shape != values.shape or not np.isfinite(values).all():
        raise ValueError(f"logits and labels are finite (N,), found {values.shape} and {truth.shape}")
    if set(np.unique(truth).tolist()) != {0, 1}:
        raise ValueError("a temperature needs held-out images of both classes (labels 0 and 1)")
    signed = np.where(truth == 1, values, -values)  # (N,)

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signed / np.exp(log_temperature)).mean())

    low, high = np.log(TEMPERATURE_RANGE)
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
