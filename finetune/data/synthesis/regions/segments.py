"""Object-like regions: a piece of the picture that its own colours and edges set apart. Found on a reduced copy.

Clusters by k-means (Lloyd), superpixels (SLIC, Achanta et al. 2012) and graph segments (Felzenszwalb and Huttenlocher
2004), the latter two of scikit-image, with neighbours of similar colour merged until the piece has the wanted size.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from skimage.segmentation import felzenszwalb, slic

from finetune.data.synthesis.regions.outlines import draw_share, has_size, largest_piece

COPY_SIDE = 72
"""Longer side in pixels of the reduced copy: outlines stay object-like at a tenth of the time of 224 px."""


def segment_region(
    image: np.ndarray, rng: np.random.Generator, area_range: tuple[float, float], method: str
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """A region of merged superpixels or graph segments.

    Args:
        image: (H, W, 3) uint8 RGB.
        rng: the sample's own generator.
        area_range: least and largest share of the image.
        method: `superpixels` or `felzenszwalb`.

    Returns:
        (H, W) bool, one connected piece, and its parameters; None where no such piece exists.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, COPY_SIDE / max(height, width))
    size = max(8, round(width * shrink)), max(8, round(height * shrink))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    parameters: dict[str, Any]
    if method == "superpixels":
        parameters = {"segments": int(rng.integers(30, 90)), "compactness": round(float(rng.uniform(3, 14)), 2)}
        labels = slic(
            small, parameters["segments"], parameters["compactness"], max_num_iter=5, start_label=0, channel_axis=2
        )
    else:
        parameters = {"segment_scale": round(float(np.exp(rng.uniform(np.log(30), np.log(200)))), 1)}
        labels = felzenszwalb(small, scale=parameters["segment_scale"], sigma=0.6, min_size=16, channel_axis=2)
    chosen = _grow(labels, small, draw_share(area_range, rng), area_range, rng)
    if chosen is None:
        return None
    region = _enlarge(np.isin(labels, chosen), (height, width))
    return (region, {**parameters, "merged": len(chosen)}) if has_size(region, area_range) else None


def _grow(
    labels: np.ndarray, image: np.ndarray, share: float, area_range: tuple[float, float], rng: np.random.Generator
) -> list[int] | None:
    """Labels of a connected set of segments of about `share` of the picture, grown from one drawn segment by the
    neighbour whose mean colour is nearest; None where the next step is always too large."""
    count = int(labels.max()) + 1
    sizes = np.bincount(labels.ravel(), minlength=count)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    sums = [np.bincount(labels.ravel(), lab[:, channel], minlength=count) for channel in range(3)]
    colours = np.stack(sums, axis=1) / np.maximum(sizes, 1)[:, None]
    touching = np.zeros((count, count), dtype=bool)
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        touching[a, b] = touching[b, a] = True
    limit = area_range[1] * 0.95 * labels.size
    seeds = np.flatnonzero((sizes > 0) & (sizes <= limit))
    if not len(seeds):
        return None
    chosen = [int(seeds[rng.integers(len(seeds))])]
    while sizes[chosen].sum() < share * labels.size:
        near = touching[chosen].any(axis=0) & (sizes + sizes[chosen].sum() <= limit)
        near &= ~np.isin(np.arange(count), chosen)
        if not near.any():
            break
        mean = (colours[chosen] * sizes[chosen, None]).sum(axis=0) / sizes[chosen].sum()
        distance = np.where(near, ((colours - mean) ** 2).sum(axis=1), np.inf)
        chosen.append(int(distance.argmin()))
    return chosen


def _enlarge(piece: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Bring a piece found on the reduced copy to (H, W) bool with a smooth outline, its holes filled."""
    large = cv2.resize(piece.astype(np.float32), size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    return largest_piece(cv2.GaussianBlur(large, (0, 0), max(1.0, 1.5 * max(size_hw) / 224)) > 0.5)


def cluster_region(
    image: np.ndarray, rng: np.random.Generator, area_range: tuple[float, float], method: str = "segment"
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """A connected piece of similar colour and place (k-means): (H, W) bool and its parameters, or None."""
    del method
    height, width = image.shape[:2]
    small = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(cv2.GaussianBlur(small, (0, 0), 1.0), cv2.COLOR_RGB2LAB).astype(np.float32)
    rows, columns = np.mgrid[0 : small.shape[0], 0 : small.shape[1]].astype(np.float32)
    place = np.stack([rows, columns], axis=2) * (90.0 / max(small.shape[:2]))
    features = np.concatenate([lab, place], axis=2).reshape(-1, 5)
    clusters = int(rng.integers(5, 10))
    labels = _kmeans(features, clusters, rng).reshape(small.shape[:2])
    candidates = []
    for cluster in range(int(labels.max()) + 1):
        piece = cv2.medianBlur((labels == cluster).astype(np.uint8), 5)
        count, components, stats, _ = cv2.connectedComponentsWithStats(piece)
        shares = stats[:, cv2.CC_STAT_AREA] / labels.size
        candidates += [
            components == i for i in range(1, count) if area_range[0] * 1.1 < shares[i] < area_range[1] * 0.9
        ]
    if not candidates:
        return None
    region = _enlarge(candidates[int(rng.integers(len(candidates)))], (height, width))
    return (region, {"clusters": clusters}) if has_size(region, area_range) else None


def _kmeans(features: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) cluster of each (N, D) float32 row; Lloyd's algorithm, six rounds are plenty here."""
    centres = features[rng.choice(len(features), size=clusters, replace=False)]
    for _ in range(6):
        distances = (centres**2).sum(axis=1) - 2 * features @ centres.T  # (N, K), without the constant |x|^2
        labels = distances.argmin(axis=1)
        one_hot = np.eye(clusters, dtype=np.float32)[labels]
        counts = one_hot.sum(axis=0)
        centres = np.where(counts[:, None] > 0, one_hot.T @ features / np.maximum(counts, 1)[:, None], centres)
    return labels
