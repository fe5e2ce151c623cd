"""New scenes from few photographs, for training only: what lies before the virtual camera is varied, not its traces.

A model trained on a dozen photographs takes their content for evidence: soft backgrounds look retouched, rich texture
looks pasted. Here content is mixed, blurred, lit and recoloured *before* the camera adds its noise and its JPEG, so
that only those traces stay reliable. Authentic and tampered pictures and donors are varied alike; nothing here knows
about labels.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

DrawScene = Callable[[np.random.Generator], np.ndarray]

_MIX, _LEAVES, _CLOUD, _BLUR, _LIGHT, _COLOUR = 0.3, 0.15, 0.25, 0.45, 0.4, 0.35
"""Chance of each variation; a blur is drawn twice."""


def vary_scene(scene: np.ndarray, rng: np.random.Generator, draw_other: DrawScene) -> tuple[np.ndarray, list[str]]:
    """Vary what a camera is about to take a picture of.

    Args:
        scene: (H, W, 3) float32 RGB in 0..255.
        rng: a generator of its own.
        draw_other: gives another scene of the same size.

    Returns:
        (H, W, 3) float32 in 0..255, and the names of the variations in their order.
    """
    height, width = scene.shape[:2]
    names = []
    if rng.random() < _MIX:
        names.append("mix")
        other = draw_other(rng)
        share = _region(height, width, rng) if rng.random() < 0.7 else np.float32(rng.uniform(0.3, 0.7))
        scene = scene + share * (other - scene)
    if rng.random() < _LEAVES:
        names.append("leaves")
        scene = _leaves(scene, rng)
    if rng.random() < _CLOUD:
        names.append("cloud")
        share = _region(height, width, rng) if rng.random() < 0.7 else np.float32(1)
        strength = np.float32(np.exp(rng.uniform(np.log(3), np.log(30))))
        scene = scene + share * strength * _cloud(height, width, rng)
    for _ in range(2):
        if rng.random() < _BLUR:
            names.append("blur")
            sigma = float(np.exp(rng.uniform(np.log(0.6), np.log(5))))
            scene = scene + _region(height, width, rng) * (cv2.GaussianBlur(scene, (0, 0), sigma) - scene)
    if rng.random() < _LIGHT:
        names.append("light")
        stops = _field(height, width, rng, float(rng.uniform(1, 4))) * np.float32(rng.uniform(0.05, 0.35))
        scene = scene * np.exp(stops)[..., None]
    if rng.random() < _COLOUR:
        names.append("colour")
        scene = scene[..., rng.permutation(3)]
        if rng.random() < 0.3:
            scene = 255 - scene
    return np.ascontiguousarray(np.clip(scene, 0, 255), dtype=np.float32), names


def _field(height: int, width: int, rng: np.random.Generator, cells: float) -> np.ndarray:
    """(H, W) smooth random field of mean 0 and variance 1 with about `cells` bumps along the longer side."""
    sides = [max(2, round(cells * side / max(height, width))) + 1 for side in (height, width)]
    coarse = rng.standard_normal(sides, dtype=np.float32)
    field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (field - field.mean()) / (field.std() + np.float32(1e-6))


def _region(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 1) opacity in [0, 1] of random patches; their edges fade over anything from 1 px to half the picture."""
    field = _field(height, width, rng, float(rng.uniform(2, 7))) + np.float32(rng.normal(0, 0.6))
    hardness = np.float32(np.exp(rng.uniform(np.log(1.5), np.log(60))))
    return (1 / (1 + np.exp(-np.clip(field * hardness, -30, 30))))[..., None]


def _cloud(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) texture of variance 1 whose spectrum falls as a random power of the frequency."""
    exponent = float(rng.uniform(0.3, 1.8))
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = (1 / np.maximum(radius, 1 / max(height, width)) ** exponent).astype(np.float32)
    shared, own = rng.standard_normal((height, width), dtype=np.float32), rng.standard_normal((3,), dtype=np.float32)
    texture = np.fft.irfft2(np.fft.rfft2(shared) * amplitude, s=(height, width)).astype(np.float32)
    tint = 1 + np.float32(rng.uniform(0, 0.7)) * (own - own.mean())  # one field, coloured: three would cost three FFTs
    return texture[..., None] / (texture.std() + np.float32(1e-6)) * tint


def _leaves(scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dead leaves (Matheron 1968): overlapping shapes of power-law sizes in the scene's own colours and textures."""
    height, width = scene.shape[:2]
    scene = scene.copy()
    source = scene.copy()
    for _ in range(int(rng.integers(8, 60))):
        radius = max(3.0, min(height, width) * 0.5 / (1 + 1.5 * float(rng.pareto(1.2))))
        corners = int(rng.integers(3, 9)) if rng.random() < 0.5 else 24
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else np.linspace(0, 2 * np.pi, 25)[:-1]
        centre = np.array([rng.uniform(0, width), rng.uniform(0, height)])
        points = centre + radius * np.stack([np.cos(angles), rng.uniform(0.5, 1) * np.sin(angles)], axis=1)
        left, top = np.clip(np.floor(points.min(axis=0)).astype(int) - 1, 0, (width, height))
        right, bottom = np.clip(np.ceil(points.max(axis=0)).astype(int) + 2, 0, (width, height))
        colour = source[int(rng.integers(height)), int(rng.integers(width))] + rng.normal(0, 25, 3).astype(np.float32)
        has_texture, contrast = bool(rng.random() < 0.5), np.float32(rng.uniform(0.2, 1.2))
        if right <= left or bottom <= top:
            continue
        h, w = bottom - top, right - left
        alpha = np.zeros((h, w), dtype=np.uint8)
        cv2.fillPoly(alpha, [np.rint((points - (left, top)) * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
        leaf: np.ndarray = np.broadcast_to(colour, (h, w, 3))
        if has_texture:
            y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            piece = source[y : y + h, x : x + w]
            leaf = (piece - piece.mean(axis=(0, 1))) * contrast + colour
        window = scene[top:bottom, left:right]
        window += (alpha[..., None].astype(np.float32) / 255) * (leaf - window)
    return scene
