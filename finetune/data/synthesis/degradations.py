"""Post-processing of an image that was, or was not, tampered with: JPEG, WebP, resizing, noise, blur, contrast.

A plan is drawn first, as plain dicts that go into the provenance, and applied afterwards. Authentic and tampered images
draw from one distribution, so nothing about an image's history tells its label. Nothing here knows about labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

Plan = list[dict[str, Any]]
"""Degradations in the order of application: `{"name": ..., parameters...}`, all JSON values."""

DEGRADATIONS = ("jpeg", "double_jpeg", "webp", "resize", "resize_back", "noise", "blur", "contrast")
"""Every known degradation. `resize` makes the picture on a larger or smaller canvas and resamples it to the final
size."""


def draw_plan(
    rng: np.random.Generator, weights: Mapping[str, float], none_probability: float, two_probability: float
) -> Plan:
    """Draw zero, one or two different degradations with their parameters.

    Args:
        rng: the sample's own generator.
        weights: relative weight of each name of `DEGRADATIONS`; missing names count as 0.
        none_probability: chance in [0, 1] of an empty plan.
        two_probability: chance in [0, 1] of two degradations, given that there is one.

    Returns:
        the plan; empty as well when every weight is 0.
    """
    names = [name for name in DEGRADATIONS if weights.get(name, 0) > 0]
    if not names or rng.random() < none_probability:
        return []
    count = min(len(names), 2 if rng.random() < two_probability else 1)
    p = np.array([weights[name] for name in names], dtype=np.float64)
    chosen = rng.choice(len(names), size=count, replace=False, p=p / p.sum())
    plan = [_draw_parameters(names[i], rng) for i in chosen]
    # Coding comes last, as in a real editing chain: a picture is resized or brightened, then saved.
    return sorted(plan, key=lambda step: step["name"] in ("jpeg", "double_jpeg", "webp"))


def _draw_parameters(name: str, rng: np.random.Generator) -> dict[str, Any]:
    def uniform(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 3)

    match name:
        case "jpeg":
            return {"name": name, "quality": int(rng.integers(70, 101)), "subsampling": _subsampling(rng)}
        case "double_jpeg":
            qualities = [int(q) for q in rng.integers(70, 101, size=2)]
            # Half the pictures were cropped between the two codings, so that the 8 x 8 grids do not coincide.
            is_cropped = bool(rng.random() < 0.5)
            shift = [int(step) for step in rng.integers(0, 8, size=2)] if is_cropped else [0, 0]
            return {"name": name, "qualities": qualities, "subsampling": _subsampling(rng), "grid_shift_xy": shift}
        case "webp":
            return {"name": name, "quality": int(rng.integers(70, 101))}
        case "resize":
            return {"name": name, "factor": uniform(0.8, 1.25), "interpolation": _interpolation(rng)}
        case "resize_back":
            return {"name": name, "factor": uniform(0.75, 0.95), "interpolation": _interpolation(rng)}
        case "noise":
            return {"name": name, "sigma": uniform(0.8, 3.0), "seed": int(rng.integers(0, 2**31))}
        case "blur":
            return {"name": name, "sigma": uniform(0.35, 0.8)}
        case "contrast":
            return {"name": name, "gain": uniform(0.8, 1.25), "gamma": uniform(0.85, 1.18)}
    raise ValueError(f"unknown degradation {name!r}, known: {', '.join(DEGRADATIONS)}")


def _subsampling(rng: np.random.Generator) -> str:
    return list(SUBSAMPLINGS)[int(rng.choice(3, p=[0.6, 0.15, 0.25]))]


def _interpolation(rng: np.random.Generator) -> str:
    return ("linear", "cubic", "area")[int(rng.integers(3))]


SUBSAMPLINGS = {
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
}
"""Chroma subsampling of JPEG: most cameras and programs, some cameras, high-quality exports."""
INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


def canvas_size(plan: Plan, final_hw: tuple[int, int]) -> tuple[int, int]:
    """(H, W) on which a picture must be made so that `plan` brings it to `final_hw`."""
    for step in plan:
        if step["name"] == "resize":
            return round(final_hw[0] / step["factor"]), round(final_hw[1] / step["factor"])
    return final_hw


def apply_plan(image: np.ndarray, plan: Plan, final_hw: tuple[int, int]) -> np.ndarray:
    """Apply a plan to an RGB image.

    Args:
        image: (H, W, 3) uint8 RGB of `canvas_size(plan, final_hw)`.
        plan: what to do, in order.
        final_hw: size of the result.

    Returns:
        (*final_hw, 3) uint8 RGB.
    """
    for step in plan:
        image = _apply(image, step, final_hw)
    return image


def _apply(image: np.ndarray, step: dict[str, Any], final_hw: tuple[int, int]) -> np.ndarray:
    match step["name"]:
        case "jpeg":
            return jpeg_round_trip(image, step["quality"], step["subsampling"])
        case "double_jpeg":
            first, second = step["qualities"]
            image = _shifted_jpeg(image, first, step["subsampling"], step.get("grid_shift_xy", [0, 0]))
            return jpeg_round_trip(image, second, step["subsampling"])
        case "webp":
            return _round_trip(image, ".webp", [cv2.IMWRITE_WEBP_QUALITY, step["quality"]])
        case "resize":
            return resize(image, final_hw, step["interpolation"])
        case "resize_back":
            height, width = image.shape[:2]
            small = resize(image, (round(height * step["factor"]), round(width * step["factor"])), "area")
            return resize(small, (height, width), step["interpolation"])
        case "noise":
            noise = np.random.default_rng(step["seed"]).standard_normal(image.shape, dtype=np.float32)
            return to_uint8(image + step["sigma"] * noise)
        case "blur":
            return cv2.GaussianBlur(image, (0, 0), step["sigma"])
        case "contrast":
            levels = np.arange(256, dtype=np.float32) / 255
            curve = (np.clip(0.5 + step["gain"] * (levels - 0.5), 0, 1) ** step["gamma"]) * 255
            return cv2.LUT(image, to_uint8(curve))
    raise ValueError(f"unknown degradation {step['name']!r}, known: {', '.join(DEGRADATIONS)}")


def resize(image: np.ndarray, size_hw: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resample to (H, W); `area` means pixel averaging when shrinking and linear when enlarging. dtype is kept."""
    if image.shape[:2] == tuple(size_hw):
        return image
    if interpolation == "area" and size_hw[0] > image.shape[0]:
        interpolation = "linear"
    return cv2.resize(image, (size_hw[1], size_hw[0]), interpolation=INTERPOLATIONS[interpolation])


def _shifted_jpeg(image: np.ndarray, quality: int, subsampling: str, shift_xy: list[int]) -> np.ndarray:
    """JPEG coding whose block grid starts `shift_xy` (0..7) pixels outside the picture, as before a crop: the picture
    is coded with a mirrored margin, which is cut off again."""
    left, top = shift_xy
    height, width = image.shape[:2]
    larger = cv2.copyMakeBorder(image, top, 0, left, 0, cv2.BORDER_REFLECT_101)
    return np.ascontiguousarray(jpeg_round_trip(larger, quality, subsampling)[top : top + height, left : left + width])


def jpeg_round_trip(image: np.ndarray, quality: int, subsampling: str = "4:2:0") -> np.ndarray:
    """Encode and decode (H, W, 3) uint8 RGB as JPEG, quality 1..100, chroma subsampling a name of `SUBSAMPLINGS`."""
    factor = SUBSAMPLINGS[subsampling]
    parameters = [cv2.IMWRITE_JPEG_QUALITY, int(quality), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    return _round_trip(image, ".jpg", parameters)


def _round_trip(image: np.ndarray, extension: str, parameters: list[int]) -> np.ndarray:
    done, encoded = cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), parameters)
    if not done:
        raise RuntimeError(f"OpenCV could not encode {extension} of shape {image.shape}")
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Round and clip float levels in 0..255 to uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
