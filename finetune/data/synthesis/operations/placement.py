"""Turn, scale or flip a region of a picture and put it somewhere else; shared by splice and copy-move."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from finetune.data.synthesis.regions import DoesNotFitError

PLACES = 16
"""Places compared where a piece is to be put where it fits best."""


def move(
    image: np.ndarray,
    region: np.ndarray,
    rng: np.random.Generator,
    unchanged_probability: float,
    match_host: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Turn, scale or flip a region about its centre and put it anywhere it fits.

    Args:
        image: (H, W, 3) uint8. region: (H, W) bool.
        rng: the sample's own generator.
        unchanged_probability: chance that it is only shifted, by whole pixels, so that its pixels keep their values.
        match_host: (H, W, 3) uint8 where, among `PLACES` places, the one of the most similar mean colour is taken;
            None for any place.

    Returns:
        moved image (H, W, 3), moved region (H, W) bool, parameters.

    Raises:
        DoesNotFitError: the region outgrows the frame.
    """
    exact = bool(rng.random() < unchanged_probability)
    angle = 0.0 if exact or rng.random() < 0.3 else round(float(rng.uniform(-35, 35)), 2)
    scale = 1.0 if exact or rng.random() < 0.2 else round(float(rng.uniform(0.75, 1.4)), 3)
    flip = bool(not exact and rng.random() < 0.3)
    rows, columns = np.nonzero(region)
    centre = np.array([columns.mean(), rows.mean()])
    turn = np.deg2rad(angle)
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    if flip:
        linear = linear @ np.diag([-1.0, 1.0])
    middle = np.array([region.shape[1], region.shape[0]]) / 2
    origin = np.rint(middle - linear @ centre)  # to the middle, in whole pixels: an exact copy stays exact
    interpolation = cv2.INTER_CUBIC if rng.random() < 0.5 else cv2.INTER_LINEAR
    middle_pose = np.column_stack([linear, origin])
    turned = _warp(region, middle_pose, cv2.INTER_NEAREST)
    if turned.sum() < 0.95 * scale**2 * region.sum():
        raise DoesNotFitError("larger than the frame")
    if match_host is None:
        origin = origin + _draw_offset(turned, rng)
    else:
        origin = origin + _best_offset(_warp(image, middle_pose, interpolation), turned, match_host, rng)
    pose = np.column_stack([linear, origin])
    content, target = _warp(image, pose, interpolation), _warp(region, pose, cv2.INTER_NEAREST)
    shift = [round(float(step)) for step in origin + linear @ centre - centre]
    name = "cubic" if interpolation == cv2.INTER_CUBIC else "linear"
    return content, target, {"shift_xy": shift, "angle": angle, "scale": scale, "flip": flip, "interpolation": name}


def _draw_offset(region: np.ndarray, rng: np.random.Generator) -> list[int]:
    """(dx, dy) in whole pixels that keeps the region's bounding box inside the picture."""
    left, top, width, height = cv2.boundingRect(region.astype(np.uint8))
    full_h, full_w = region.shape
    return [int(rng.integers(-left, full_w - width - left + 1)), int(rng.integers(-top, full_h - height - top + 1))]


def _best_offset(content: np.ndarray, region: np.ndarray, host: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Of `PLACES` drawn offsets the one where the host's mean colour under the bounding box is nearest the piece's."""
    left, top, width, height = cv2.boundingRect(region.astype(np.uint8))
    wanted = content[region].mean(axis=0)
    offsets = [_draw_offset(region, rng) for _ in range(PLACES)]
    totals = cv2.integral(host)  # (H + 1, W + 1, 3)
    distances = []
    for dx, dy in offsets:
        x, y = left + dx, top + dy
        total = totals[y + height, x + width] - totals[y, x + width] - totals[y + height, x] + totals[y, x]
        distances.append(float(((total / (width * height) - wanted) ** 2).sum()))
    return offsets[int(np.argmin(distances))]


def _warp(picture: np.ndarray, matrix: np.ndarray, interpolation: int) -> np.ndarray:
    """Move a picture (H, W, 3) uint8, mirrored at its border, or a region (H, W) bool, by a (2, 3) matrix from source
    to target pixels."""
    size = (picture.shape[1], picture.shape[0])
    if picture.dtype == bool:
        return cv2.warpAffine(picture.astype(np.uint8), matrix, size, flags=interpolation).astype(bool)
    return cv2.warpAffine(picture, matrix, size, flags=interpolation, borderMode=cv2.BORDER_REFLECT_101)
