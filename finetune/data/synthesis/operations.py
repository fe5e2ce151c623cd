"""Tampering operations: splice, copy-move, erase by inpainting, local retouch. Each gives the altered image, the mask
of the pixels it really altered, and its parameters.

An edit that changed almost nothing is drawn again on the same host (never a new host: that would make tampered pictures
a selection of the authentic ones), so that no invisible edit is labelled. Post-processing is in `degradations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from finetune.data.synthesis.degradations import resize, to_uint8
from finetune.data.synthesis.regions import DoesNotFitError, draw_region, soft_edge

MAX_REDRAWS = 40
MASK_CONVENTIONS = ("target", "source_and_target")


class NoVisibleEditError(Exception):
    """An operation finds nothing in this picture that it could visibly alter."""


Donor = tuple[np.ndarray, dict[str, Any]]
"""(H, W, 3) uint8 RGB picture of the host's size and the parameters of the camera that took it."""
DrawDonor = Callable[[np.random.Generator], Donor]


@dataclass(frozen=True)
class OperationSettings:
    """What the operations may draw.

    Args:
        area_ranges: operation → (least, largest) share of the image a region covers.
        shape_weights: relative weight of each name of `regions.SHAPES`.
        max_feather: widest soft edge in pixels; a third of the edges are hard.
        min_change: least mean absolute difference inside the mask, in levels 0..255; below it the edit is drawn again.
        mask_convention: whether the mask of a copy-move marks the pasted `target` only, or `source_and_target`.
    """

    area_ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {
            "splice": (0.04, 0.30),
            "copy_move": (0.04, 0.18),
            "erase": (0.04, 0.18),
            "retouch": (0.05, 0.30),
        }
    )
    shape_weights: Mapping[str, float] = field(
        default_factory=lambda: {"blob": 0.3, "polygon": 0.2, "ellipse": 0.15, "segment": 0.35}
    )
    max_feather: float = 3.0
    min_change: float = 3.0
    mask_convention: str = "target"


@dataclass(frozen=True)
class Edit:
    """What one operation proposes, before it is blended into the host.

    Args:
        content: (H, W, 3) uint8 or float32 RGB, what stands inside `region` after the edit.
        region: (H, W) bool, where.
        feather: width of the soft edge in pixels.
        parameters: JSON values for the provenance.
        source: (H, W) bool, where a copied piece came from, else None.
    """

    content: np.ndarray
    region: np.ndarray
    feather: float
    parameters: dict[str, Any]
    source: np.ndarray | None = None


@dataclass(frozen=True)
class Tampering:
    """Result of `tamper`: image (H, W, 3) uint8 RGB, mask (H, W) bool, provenance parameters."""

    image: np.ndarray
    mask: np.ndarray
    parameters: dict[str, Any]


def tamper(
    host: np.ndarray, operation: str, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor
) -> Tampering:
    """Tamper with a picture.

    The mask is exact: outside it the image equals the host bit by bit. Inside it a pixel may by accident keep its value
    (a blurred highlight, say); such gaps of up to 7 px are closed, larger unaltered parts are not masked.

    Args:
        host: (H, W, 3) uint8 RGB authentic picture; not modified.
        operation: a name of `OPERATIONS`.
        rng: the sample's own generator.
        settings: ranges to draw from.
        draw_donor: gives another authentic picture of the host's size; only `splice` calls it.

    Raises:
        NoVisibleEditError: none after `MAX_REDRAWS` tries, e.g. when host and donor are both black.
    """
    for redraws in range(MAX_REDRAWS):
        try:
            edit = OPERATIONS[operation](host, rng, settings, draw_donor)
        except DoesNotFitError:
            continue
        alpha = soft_edge(edit.region, edit.feather)[..., None]
        image = to_uint8(host + alpha * (edit.content.astype(np.float32) - host))
        mask = altered_pixels(host, image, alpha[..., 0] > 0)
        change = float(np.abs(image.astype(np.float32) - host)[mask].mean()) if mask.any() else 0.0
        least, largest = settings.area_ranges[operation]
        if change < settings.min_change or not 0.6 * least <= mask.mean() <= 1.15 * largest:
            continue
        if edit.source is not None and settings.mask_convention == "source_and_target":
            mask = mask | edit.source
        measured = {
            "mean_abs_change": round(change, 3),
            "area": round(float(mask.mean()), 5),
            "redraws": redraws,
            "min_change": settings.min_change,
        }
        return Tampering(image, mask, {**edit.parameters, "feather": edit.feather, **measured})
    raise NoVisibleEditError(f"{operation}: no visible edit after {MAX_REDRAWS} tries")


def altered_pixels(before: np.ndarray, after: np.ndarray, support: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels where any channel differs, with gaps of up to 7 px closed inside `support`."""
    changed = (before != after).any(axis=2).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    padded = cv2.copyMakeBorder(changed, 7, 7, 7, 7, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)[7:-7, 7:-7]
    return (changed | (closed & support)).astype(bool)


def _feather(rng: np.random.Generator, settings: OperationSettings) -> float:
    return 0.0 if rng.random() < 1 / 3 else round(float(rng.uniform(0, settings.max_feather)), 2)


def splice(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Paste a region of an independently taken donor picture, mostly turned or resized to fit in; half of them with
    colours moved towards the host's."""
    donor, camera = draw_donor(rng)
    region, parameters = draw_region(donor, rng, settings.area_ranges["splice"], settings.shape_weights)
    content, placed, pose = _move(donor, region, rng, unchanged_probability=0.25)
    strength = round(float(rng.uniform(0.4, 1.0)), 3) if rng.random() < 0.5 else 0.0
    if strength:
        content = match_colour(content, placed, host, strength)
    parameters |= {"donor": camera, **pose, "colour_match": strength}
    return Edit(content, placed, _feather(rng, settings), parameters)


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


def copy_move(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Copy a region of the host to another place of it: some exactly, the rest rotated, scaled or flipped."""
    del draw_donor
    source, parameters = draw_region(host, rng, settings.area_ranges["copy_move"], settings.shape_weights)
    content, target, pose = _move(host, source, rng, unchanged_probability=0.1)
    if (target & source).sum() > 0.25 * min(target.sum(), source.sum()):
        raise DoesNotFitError("the copy covers its source")
    parameters |= {**pose, "mask_convention": settings.mask_convention}
    return Edit(content, target, _feather(rng, settings), parameters, source)


def _move(
    image: np.ndarray, region: np.ndarray, rng: np.random.Generator, unchanged_probability: float
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Turn, scale or flip a region about its centre and put it anywhere it fits.

    Args:
        image: (H, W, 3) uint8. region: (H, W) bool.
        unchanged_probability: chance that it is only shifted, by whole pixels, so that its pixels keep their values.

    Returns:
        moved image (H, W, 3), moved region (H, W) bool, parameters.
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
    _, turned = _warp(image, region, np.column_stack([linear, origin]), interpolation)
    if turned.sum() < 0.95 * scale**2 * region.sum():
        raise DoesNotFitError("larger than the frame")
    origin = origin + _draw_offset(turned, rng)
    content, target = _warp(image, region, np.column_stack([linear, origin]), interpolation)
    shift = [round(float(step)) for step in origin + linear @ centre - centre]
    name = "cubic" if interpolation == cv2.INTER_CUBIC else "linear"
    return content, target, {"shift_xy": shift, "angle": angle, "scale": scale, "flip": flip, "interpolation": name}


def _draw_offset(region: np.ndarray, rng: np.random.Generator) -> list[int]:
    """(dx, dy) in whole pixels that keeps the region's bounding box inside the picture."""
    left, top, width, height = cv2.boundingRect(region.astype(np.uint8))
    full_h, full_w = region.shape
    return [int(rng.integers(-left, full_w - width - left + 1)), int(rng.integers(-top, full_h - height - top + 1))]


def _warp(
    image: np.ndarray, region: np.ndarray, matrix: np.ndarray, interpolation: int
) -> tuple[np.ndarray, np.ndarray]:
    """Move image and region by a (2, 3) matrix from source to target pixels, mirroring the picture at its border."""
    size = (image.shape[1], image.shape[0])
    moved = cv2.warpAffine(image, matrix, size, flags=interpolation, borderMode=cv2.BORDER_REFLECT_101)
    return moved, cv2.warpAffine(region.astype(np.uint8), matrix, size, flags=cv2.INTER_NEAREST).astype(bool)


def erase(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Remove what is inside a region by inpainting from its surroundings (OpenCV: Telea 2004 or Navier-Stokes 2001)."""
    del draw_donor
    region, parameters = draw_region(host, rng, settings.area_ranges["erase"], settings.shape_weights)
    method, radius = ("telea", "navier_stokes")[int(rng.integers(2))], int(rng.integers(2, 5))
    feather = _feather(rng, settings)
    hole = (soft_edge(region, feather) > 0).astype(np.uint8)
    flag = cv2.INPAINT_TELEA if method == "telea" else cv2.INPAINT_NS
    content = cv2.inpaint(host, hole, radius, flag)
    return Edit(content, region, feather, parameters | {"method": method, "radius": radius})


def retouch(host: np.ndarray, rng: np.random.Generator, settings: OperationSettings, draw_donor: DrawDonor) -> Edit:
    """Change a region in place: smoothing, added grain, or resampling with a change of contrast."""
    del draw_donor
    region, parameters = draw_region(host, rng, settings.area_ranges["retouch"], settings.shape_weights)
    kind = ("smooth", "grain", "tone")[int(rng.choice(3, p=[0.45, 0.25, 0.3]))]
    levels = host.astype(np.float32)
    if kind == "smooth":
        sigma = round(float(rng.uniform(0.9, 2.5)), 2)
        parameters |= {"sigma": sigma}
        content = cv2.GaussianBlur(levels, (0, 0), sigma)
    elif kind == "grain":
        sigma = round(float(rng.uniform(5, 13)), 2)
        grain = cv2.GaussianBlur(rng.standard_normal(host.shape[:2], dtype=np.float32), (0, 0), 0.6)
        parameters |= {"sigma": sigma}
        content = levels + sigma * (grain / grain.std())[..., None]
    else:
        factor, gain, lift = (round(float(rng.uniform(*limits)), 3) for limits in ((0.55, 0.85), (0.8, 1.3), (-18, 18)))
        height, width = host.shape[:2]
        small = resize(levels, (round(height * factor), round(width * factor)), "area")
        content = resize(small, (height, width), "cubic")
        mean = levels[region].mean(axis=0)
        content = (content - mean) * gain + mean + lift
        parameters |= {"factor": factor, "gain": gain, "lift": lift}
    return Edit(np.clip(content, 0, 255), region, _feather(rng, settings), {"kind": kind, **parameters})


Operation = Callable[[np.ndarray, np.random.Generator, OperationSettings, DrawDonor], Edit]
OPERATIONS: dict[str, Operation] = {"splice": splice, "copy_move": copy_move, "erase": erase, "retouch": retouch}
"""Every operation: host, generator, settings, donor → an edit; raises `DoesNotFitError` where a draw does not fit."""
