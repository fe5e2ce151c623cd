"""Shapes of tampered regions: smooth blobs, polygons, ellipses, segments of the picture itself; feathered edges.

Only binary shapes and their soft edges; what happens inside them belongs to `operations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

SHAPES = ("blob", "polygon", "ellipse", "segment")
MAX_TRIES = 12


class DoesNotFitError(Exception):
    """A random draw does not fit this picture; draw again."""


def draw_region(
    image: np.ndarray, rng: np.random.Generator, area_range: tuple[float, float], weights: Mapping[str, float]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw one region of a wanted size.

    Args:
        image: (H, W, 3) uint8 RGB; gives the size and, for `segment`, the object-like shape.
        rng: the sample's own generator.
        area_range: least and largest share of the image, in (0, 1); the share is drawn log-uniformly.
        weights: relative weight of each name of `SHAPES`.

    Returns:
        (H, W) bool and its parameters. A `segment` that does not exist in that size becomes a `blob`.

    Raises:
        DoesNotFitError: no shape of that size after `MAX_TRIES` tries.
    """
    size_hw = image.shape[:2]
    p = np.array([weights.get(name, 0.0) for name in SHAPES], dtype=np.float64)
    shape = SHAPES[int(rng.choice(len(SHAPES), p=p / p.sum()))]
    if shape == "segment":
        region = _segment(image, rng, area_range)
        if region is not None:
            return region, {"shape": shape}
        shape = "blob"
    for _ in range(MAX_TRIES):
        share = float(np.exp(rng.uniform(np.log(area_range[0]), np.log(area_range[1]))))
        region = _fill(_outline(shape, rng), size_hw, share, rng)
        if area_range[0] * 0.9 <= region.mean() <= area_range[1] * 1.05:
            return region, {"shape": shape}
    raise DoesNotFitError(f"no {shape} of {area_range} of an image of {size_hw} after {MAX_TRIES} tries")


def _outline(shape: str, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) float closed outline around the origin, of any size."""
    if shape == "polygon":
        count = int(rng.integers(4, 9))
        angles = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * (2 * np.pi / count)
        radii = rng.uniform(0.65, 1.0, count)
    else:
        angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        radii = np.ones_like(angles)
        if shape == "blob":
            for order in range(2, 6):
                radii += rng.uniform(0, 0.35) / (order - 1) * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
            radii = np.maximum(radii, 0.25)
    stretch = float(rng.uniform(1.0, 1.9)) ** 0.5
    points = np.stack([np.cos(angles) * radii * stretch, np.sin(angles) * radii / stretch], axis=1)
    turn = float(rng.uniform(0, np.pi))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ rotation.T


def _fill(outline: np.ndarray, size_hw: tuple[int, int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Scale the outline to `share` of the image, put it anywhere it fits and fill it: (H, W) bool."""
    x, y = outline[:, 0], outline[:, 1]
    area = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
    outline = outline * (share * size_hw[0] * size_hw[1] / max(area, 1e-6)) ** 0.5
    low, high = -outline.min(axis=0), np.array(size_hw[::-1]) - outline.max(axis=0)
    centre = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    mask = np.zeros(size_hw, dtype=np.uint8)
    cv2.fillPoly(mask, [np.rint(outline + centre).astype(np.int32)], 1)
    return mask.astype(bool)


def _segment(image: np.ndarray, rng: np.random.Generator, area_range: tuple[float, float]) -> np.ndarray | None:
    """A connected piece of similar colour and place (k-means on a small copy), smoothed: (H, W) bool, or None."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(cv2.GaussianBlur(small, (0, 0), 1.0), cv2.COLOR_RGB2LAB).astype(np.float32)
    rows, columns = np.mgrid[0 : small.shape[0], 0 : small.shape[1]].astype(np.float32)
    place = np.stack([rows, columns], axis=2) * (90.0 / max(small.shape[:2]))
    features = np.concatenate([lab, place], axis=2).reshape(-1, 5)
    labels = _kmeans(features, int(rng.integers(5, 10)), rng).reshape(small.shape[:2])
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
    chosen = candidates[int(rng.integers(len(candidates)))].astype(np.float32)
    smooth = cv2.GaussianBlur(cv2.resize(chosen, (width, height), interpolation=cv2.INTER_LINEAR), (0, 0), 2.0)
    region = _largest_piece(smooth > 0.5)
    return region if area_range[0] * 0.9 <= region.mean() <= area_range[1] * 1.05 else None


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


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """The largest connected piece with its holes filled, (H, W) bool."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, dtype=np.uint8)
    if contours:
        cv2.drawContours(filled, [max(contours, key=cv2.contourArea)], -1, 1, thickness=cv2.FILLED)
    return filled.astype(bool)


def soft_edge(region: np.ndarray, feather: float) -> np.ndarray:
    """(H, W) float32 opacity in [0, 1] of a bool region whose edge fades over some `feather` pixels; 0 cuts hard."""
    alpha = region.astype(np.float32)
    if feather <= 0:
        return alpha
    alpha = cv2.GaussianBlur(alpha, (0, 0), max(feather / 2, 0.3))
    return np.where(alpha < 0.04, np.float32(0), alpha)
