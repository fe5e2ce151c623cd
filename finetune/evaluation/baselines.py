"""Two classical tampering detectors that the trained model has to beat: error-level analysis and local noise level.

Sources: N. Krawetz, "A Picture's Worth... Digital Image Analysis and Forensics", Black Hat 2007 (error levels);
J. Immerkaer, "Fast noise variance estimation", CVIU 1996 (the kernel) and B. Mahdian, S. Saic, "Using noise
inconsistencies for blind image forensics", IVC 2009 (median of absolute high-pass values per neighbourhood, compared
with the rest of the image). Metrics are not computed here; the caller hands the scores to `finetune.metrics`.

Normalisation of both maps, per image: with v the local value, z = |v - median v| / (1.4826 · median |v - median v|) is
the deviation in robust standard deviations (one-sided: 0 where v is below the median), and score = z / (z + 3). So,
unfitted, a score of 0.5 means three robust standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

HALF_SCORE_Z = 3.0
"""Robust standard deviations at which an unfitted score is 0.5."""

IMAGE_PERCENTILE = 98.0
"""The image score is this percentile of the map: a region of 2 % of the pixels can raise it, single pixels cannot."""

_IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)


@dataclass(frozen=True)
class Thresholds:
    """Raw scores that become 0.5 after `rescale`; both 0.5 (no change) unless fitted on a training split.

    Args:
        pixel: for maps, in (0, 1).
        image: for image scores, in (0, 1).
    """

    pixel: float = 0.5
    image: float = 0.5


@dataclass(frozen=True)
class BaselineScores:
    """What one detector says about a list of images, ready for `finetune.metrics` with the threshold 0.5.

    Args:
        image_scores: (N,) float32 in [0, 1].
        mask_scores: N maps (H, W) float32 in [0, 1], each at its image's size.
        labels: (N,) int, handed through: 0 real, 1 tampered.
        masks: N bool (H, W) or None, handed through.
        thresholds: raw thresholds that 0.5 stands for.
    """

    image_scores: Float32
    mask_scores: tuple[Float32, ...]
    labels: NDArray[np.int64]
    masks: tuple[NDArray[np.bool_] | None, ...]
    thresholds: Thresholds


def error_level_analysis(image: UInt8, quality: int = 90, window: int = 17, two_sided: bool = True) -> Float32:
    """Where the image changes more than elsewhere when saved as JPEG once more.

    A part that has been through fewer or finer compressions than the rest loses more, so it is brighter (Krawetz); a
    blurred or inpainted part loses less. Once the whole forgery has been saved as JPEG neither direction is the rule,
    and counting both was the stronger detector on such images, so it is the default.
    Value: log of the window mean of the mean absolute RGB change; the log keeps a few textured patches from
    setting the scale. An image that does not change at all scores 0 everywhere.

    Args:
        image: (H, W, 3) uint8 RGB.
        quality: JPEG quality of the trial compression, 1 to 100.
        window: side in pixels of the averaging window, odd; two JPEG blocks and one pixel by default.
        two_sided: count parts that change less as well; False is Krawetz's reading.

    Returns:
        (H, W) float32 in [0, 1], normalised as the file's heading says.
    """
    bgr = cv2.cvtColor(_check(image), cv2.COLOR_RGB2BGR)
    is_coded, coded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not is_coded:
        raise ValueError(f"OpenCV could not encode an image of shape {image.shape} as JPEG")
    change = cv2.absdiff(bgr, cv2.imdecode(coded, cv2.IMREAD_COLOR)).mean(axis=2, dtype=np.float32)  # (H, W)
    local = cv2.blur(change, (window, window), borderType=cv2.BORDER_REFLECT_101)
    return _deviation(np.log(local + 0.25).astype(np.float32), two_sided)


def local_noise_variance(image: UInt8, window: int = 17, two_sided: bool = True) -> Float32:
    """Where the noise level differs from the image's own.

    Value: log2(1 + |r|) with r the response of luma to Immerkaer's kernel, which cancels planes and suppresses edges;
    its median over the window (robust where an edge crosses), then a mean over the same window. The median commutes
    with the log, so this is the log of Mahdian and Saic's local noise estimate. Both smoother (blurred, inpainted,
    resampled) and noisier parts are suspicious.

    Args:
        image: (H, W, 3) uint8 RGB.
        window: side in pixels of the neighbourhood, odd.
        two_sided: count parts with less noise as well as parts with more.

    Returns:
        (H, W) float32 in [0, 1], normalised as the file's heading says.
    """
    luma = cv2.cvtColor(_check(image), cv2.COLOR_RGB2GRAY).astype(np.float32)
    high_pass = cv2.filter2D(luma, cv2.CV_32F, _IMMERKAER, borderType=cv2.BORDER_REFLECT_101)  # (H, W), |r| <= 2040
    # OpenCV's wide median needs 8 bits: 23 steps per octave use them up, log2(2041) * 23 = 253.
    levels = np.rint(np.log2(1.0 + np.abs(high_pass)) * 23.0).astype(np.uint8)
    median = cv2.medianBlur(levels, window).astype(np.float32) / 23.0
    local = cv2.blur(median, (window, window), borderType=cv2.BORDER_REFLECT_101)
    return _deviation(local, two_sided)


BASELINES: dict[str, Callable[[UInt8], Float32]] = {
    "ela": error_level_analysis,
    "noise_variance": local_noise_variance,
}


def image_score(mask_scores: Float32) -> float:
    """Score of a whole image in [0, 1]: `IMAGE_PERCENTILE` of its map, that is, the upper tail against the median."""
    return float(np.percentile(mask_scores, IMAGE_PERCENTILE))


def rescale(scores: Float32, threshold: float) -> Float32:
    """Map `threshold` to 0.5, keeping 0, 1 and every ranking: s/2t below, 1/2 + (s - t)/2(1 - t) above.

    Args:
        scores: any shape, float in [0, 1].
        threshold: in (0, 1).
    """
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold {threshold}, expected a number between 0 and 1")
    below = scores * (0.5 / threshold)
    above = 0.5 + (scores - threshold) * (0.5 / (1.0 - threshold))
    return np.where(scores < threshold, below, above).astype(np.float32)


def fit_threshold(scores: Sequence[Float32], masks: Sequence[NDArray[np.generic] | None], steps: int = 99) -> float:
    """The threshold with the highest mean pixel F1 over the tampered images of a training split.

    Args:
        scores: N maps (H, W) in [0, 1].
        masks: N masks (H, W), non-zero = tampered; None and all-zero masks are left out, as in localisation metrics.
        steps: thresholds tried, evenly spaced inside (0, 1).

    Returns:
        The best threshold (the lowest of equals); 0.5 where no mask marks anything.
    """
    grid = np.arange(1, steps + 1) / (steps + 1)
    edges = np.concatenate([[0.0], grid, [np.inf]])
    total = np.zeros(steps)
    for scored, mask in zip(scores, masks, strict=True):
        if mask is None or not np.any(mask):
            continue
        truth = np.asarray(mask) != 0
        # Counts of scores >= each threshold, all thresholds at once from two histograms.
        hits = _count_at_least(scored[truth], edges)
        false = _count_at_least(scored[~truth], edges)
        total += 2 * hits / (hits + false + truth.sum())
    return float(grid[int(np.argmax(total))]) if total.any() else 0.5


def fit_image_threshold(scores: Sequence[float], labels: Sequence[int]) -> float:
    """The image threshold with the highest balanced accuracy on a training split.

    Args:
        scores: (N,) in [0, 1].
        labels: (N,) 0 real, 1 tampered.

    Returns:
        Midway between two neighbouring scores, kept inside [0.01, 0.99]; 0.5 where one of the classes is missing.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    if truth.all() or not truth.any():
        return 0.5
    distinct = np.unique(values)
    candidates = np.concatenate([distinct[:1], (distinct[1:] + distinct[:-1]) / 2])
    is_fake = values[None, :] >= candidates[:, None]  # (C, N)
    balanced = (is_fake[:, truth].mean(axis=1) + (~is_fake[:, ~truth]).mean(axis=1)) / 2
    return float(np.clip(candidates[int(np.argmax(balanced))], 0.01, 0.99))


def fit_baselines(
    images: Sequence[UInt8], masks: Sequence[NDArray[np.generic] | None], labels: Sequence[int]
) -> dict[str, Thresholds]:
    """Both thresholds of each detector, fitted on a training split, so that the comparison at 0.5 is fair to them."""
    fitted = {}
    for name, detector in BASELINES.items():
        maps = [detector(image) for image in images]
        fitted[name] = Thresholds(
            pixel=fit_threshold(maps, masks),
            image=fit_image_threshold([image_score(scored) for scored in maps], labels),
        )
    return fitted


def run_baselines(
    images: Sequence[UInt8],
    masks: Sequence[NDArray[np.generic] | None],
    labels: Sequence[int],
    thresholds: Mapping[str, Thresholds] | None = None,
) -> dict[str, BaselineScores]:
    """Score every image with every detector of `BASELINES`. The masks and labels are handed through, never looked at.

    Args:
        images: N (H, W, 3) uint8 RGB of any sizes.
        masks: N true masks (H, W), non-zero = tampered, or None.
        labels: N labels, 0 real, 1 tampered.
        thresholds: per detector, from `fit_baselines` on a *training* split; a missing one stays unfitted.

    Returns:
        Detector name to `BaselineScores`, whose scores have 0.5 as their threshold.
    """
    if not len(images) == len(masks) == len(labels):
        raise ValueError(f"{len(images)} images, {len(masks)} masks and {len(labels)} labels, expected equal counts")
    truth = tuple(None if mask is None else np.asarray(mask) != 0 for mask in masks)
    results = {}
    for name, detector in BASELINES.items():
        at = (thresholds or {}).get(name, Thresholds())
        raw = [detector(image) for image in images]
        raw_scores = np.array([image_score(scored) for scored in raw], dtype=np.float32)  # (N,)
        results[name] = BaselineScores(
            image_scores=rescale(raw_scores, at.image),
            mask_scores=tuple(rescale(scored, at.pixel) for scored in raw),
            labels=np.asarray(labels, dtype=np.int64),
            masks=truth,
            thresholds=at,
        )
    return results


def _deviation(local: Float32, two_sided: bool) -> Float32:
    """The normalisation of the heading. (H, W) -> (H, W) in [0, 1)."""
    offset = local - np.median(local)
    # The floor stands for the quantisation of 8-bit pixels: a nearly constant image has no spread to divide by.
    spread = max(1.4826 * float(np.median(np.abs(offset))), 0.05)
    z = np.abs(offset) if two_sided else np.maximum(offset, 0.0)
    z = z / spread
    return (z / (z + HALF_SCORE_Z)).astype(np.float32)


def _count_at_least(values: NDArray[np.generic], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many values are >= each inner edge: (len(edges) - 2,)."""
    counts, _ = np.histogram(values, bins=edges)
    return counts[::-1].cumsum()[::-1][1:].astype(np.float64)


def _check(image: UInt8) -> UInt8:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image of shape {image.shape} and dtype {image.dtype}, expected (H, W, 3) uint8")
    return image
