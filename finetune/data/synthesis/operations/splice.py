"""Splice: a region of another picture, as it is or made to fit in colour, place and noise."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from finetune.data.synthesis.operations.edits import Donor, DrawDonor, Edit, OperationSettings, draw_blend
from finetune.data.synthesis.operations.placement import move
from finetune.data.synthesis.regions import draw_region

MAX_ADDED_NOISE = 8.0


def splice(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Paste a region of an independently taken donor picture, mostly turned or resized to fit in; half of them with
    colours moved towards the host's, and `settings.donor_match` of them chosen and adjusted to fit in all respects."""
    is_matched = bool(rng.random() < settings.donor_match)
    donor, camera = draw_donor(rng)
    if is_matched:
        donor, camera = min((donor, camera), draw_donor(rng), key=lambda each: _colour_distance(each, host))
    region, parameters = draw_region(donor, rng, settings.area_ranges["splice"], settings.shape_weights)
    content, placed, pose = move(donor, region, rng, 0.25, match_host=host if is_matched else None)
    strength = round(float(rng.uniform(0.4, 1.0)), 3) if is_matched or rng.random() < 0.5 else 0.0
    if strength:
        content = match_colour(content, placed, host, strength)
    parameters |= {"donor": camera, **pose, "donor_match": is_matched, "colour_match": strength}
    if is_matched:
        content, noise = match_noise(content, placed, host, int(rng.integers(2**31)))
        parameters |= {"noise_match": noise}
    name, feather = draw_blend(rng, settings)
    return Edit(content, placed, feather, parameters | {"blend": name}, blend=name)


def _colour_distance(donor: Donor, host: np.ndarray) -> float:
    """Distance of the mean and spread of the channels of two pictures, in levels."""
    pair = [
        np.concatenate([picture[::4, ::4].mean(axis=(0, 1)), picture[::4, ::4].std(axis=(0, 1))])
        for picture in (donor[0], host)
    ]
    return float(np.abs(pair[0] - pair[1]).sum())


def match_colour(content: np.ndarray, region: np.ndarray, host: np.ndarray, strength: float) -> np.ndarray:
    """Move mean and spread of each RGB channel inside `region` towards the host's at that place (Reinhard 2001).

    Args:
        content, host: (H, W, 3) uint8. region: (H, W) bool. strength: 0 leaves it, 1 matches fully.

    Returns:
        (H, W, 3) float32 in 0..255; the spread changes by at most a factor of 1.5 either way.
    """
    inside, around = content[region].astype(np.float32), host[region].astype(np.float32)
    ratio = np.clip((around.std(axis=0) + 4) / (inside.std(axis=0) + 4), 1 / 1.5, 1.5) ** strength
    mean = inside.mean(axis=0) * (1 - strength) + around.mean(axis=0) * strength
    return np.clip((content - inside.mean(axis=0)) * ratio + mean, 0, 255)


def noise_sigma(image: np.ndarray, region: np.ndarray) -> float:
    """Standard deviation of the noise of the brightness inside a region, in levels: the median response to Immerkaer's
    (1996) mask, which ignores slopes; the median ignores most edges too.

    Args:
        image: (H, W, 3) float32 or uint8. region: (H, W) bool, not empty.
    """
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
    response = cv2.filter2D(grey, -1, mask, borderType=cv2.BORDER_REFLECT_101)
    return float(np.median(np.abs(response[region]))) / (0.6745 * 6)


def match_noise(
    content: np.ndarray, region: np.ndarray, host: np.ndarray, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Bring the noise of a pasted piece towards the host's at that place: grain is added, or a noisier piece softened.

    Args:
        content: (H, W, 3) uint8 or float32. region: (H, W) bool. host: (H, W, 3) uint8. seed: of the grain.

    Returns:
        (H, W, 3) float32 in 0..255, and the estimates in levels, what was done and the seed.
    """
    before, wanted = noise_sigma(content, region), noise_sigma(host, region)
    levels = content.astype(np.float32)
    added, softened = 0.0, 0.0
    if wanted > before:
        added = min(round((wanted**2 - before**2) ** 0.5, 3), MAX_ADDED_NOISE)
        grain = np.random.default_rng(seed).standard_normal(host.shape[:2], dtype=np.float32)
        levels = levels + np.float32(added) * grain[..., None]
    elif before > 1.2 * wanted:
        softened = round(min(1 - wanted / before, 0.8), 3)
        levels = levels + np.float32(softened) * (cv2.GaussianBlur(levels, (0, 0), 0.8) - levels)
    done = {"before": round(before, 3), "wanted": round(wanted, 3), "added": added, "softened": softened, "seed": seed}
    return np.clip(levels, 0, 255), done
