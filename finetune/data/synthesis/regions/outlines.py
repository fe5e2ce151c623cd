"""Drawn shapes: smooth blobs, polygons, ellipses of a wanted size at a random place, whatever the picture shows."""

from __future__ import annotations

import cv2
import numpy as np


class DoesNotFitError(Exception):
    """A random draw does not fit this picture; draw again."""


def draw_outline(shape: str, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) float closed outline around the origin, of any size; `shape` is blob, polygon or ellipse."""
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


def fill_outline(outline: np.ndarray, size_hw: tuple[int, int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Scale the outline to `share` of the image, put it anywhere it fits and fill it: (H, W) bool."""
    x, y = outline[:, 0], outline[:, 1]
    area = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
    outline = outline * (share * size_hw[0] * size_hw[1] / max(area, 1e-6)) ** 0.5
    low, high = -outline.min(axis=0), np.array(size_hw[::-1]) - outline.max(axis=0)
    centre = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    mask = np.zeros(size_hw, dtype=np.uint8)
    cv2.fillPoly(mask, [np.rint(outline + centre).astype(np.int32)], 1)
    return mask.astype(bool)


def largest_piece(mask: np.ndarray) -> np.ndarray:
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


def draw_share(area_range: tuple[float, float], rng: np.random.Generator) -> float:
    """A share of the image between the two, log-uniform: small regions are as frequent as large ones."""
    return float(np.exp(rng.uniform(np.log(area_range[0]), np.log(area_range[1]))))


def has_size(region: np.ndarray, area_range: tuple[float, float]) -> bool:
    """Whether a (H, W) bool region covers a share of the image in the range, give or take what rasterising costs."""
    return bool(area_range[0] * 0.9 <= region.mean() <= area_range[1] * 1.05)
