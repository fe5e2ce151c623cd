"""The virtual camera that turns a few photographs into many authentic pictures. No tampering here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from finetune.data.synthesis.degradations import jpeg_round_trip, resize, to_uint8
from finetune.data.synthesis.photos import Photo, open_photo
from finetune.data.synthesis.scenes import vary_scene


def develop(
    photo: Photo,
    size_hw: tuple[int, int],
    rng: np.random.Generator,
    monochrome: bool = False,
    others: Sequence[Photo] = (),
    variation: float = 0.0,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Take an authentic picture of a photograph with a virtual camera drawn at random.

    Crop, resample, flip and rotate by right angles, exposure, white balance, gamma, saturation, signal-dependent sensor
    noise (variance a·x + b, as in Foi et al. 2008), sharpening or softening, and in half the cases the camera's JPEG.
    Hosts of both classes and donors of splices go through this same function.

    Args:
        photo: what is photographed.
        size_hw: size of the picture.
        rng: the sample's own generator.
        monochrome: drop the colour, so that a grey photograph and a coloured one can be combined without a giveaway.
        others: photographs that a varied scene may borrow from.
        variation: chance that the scene itself is varied (`scenes.vary_scene`) before the camera takes it. Its
            randomness is a child of `rng`: at 0 every picture is what it was without this argument.

    Returns:
        (*size_hw, 3) uint8 RGB and the camera's parameters.
    """
    source = open_photo(photo.path)
    turns = int(rng.integers(4)) if rng.random() < 0.35 else 0
    crop_hw = size_hw if turns % 2 == 0 else (size_hw[1], size_hw[0])
    window, view = _draw_crop(source, crop_hw, rng)
    image = resize(window.astype(np.float32), crop_hw, view["interpolation"])
    if variation > 0:
        child = rng.spawn(1)[0]
        if child.random() < variation:
            image, view["scene"] = vary_scene(image, child, lambda rng: _draw_scene(others or (photo,), crop_hw, rng))
    if flip := bool(rng.random() < 0.5):
        image = image[:, ::-1]
    image = np.rot90(image, turns)
    camera = _draw_camera(rng)
    is_grey = monochrome or photo.is_grey
    image = _tone(np.ascontiguousarray(image), camera, is_grey)
    noise = rng.standard_normal((*size_hw, 1 if is_grey else 3), dtype=np.float32)
    image = image + noise * np.sqrt(camera["noise_a"] * np.clip(image, 0, 255) + camera["noise_b"])
    if camera["sharpen"] != 0:
        soft = cv2.GaussianBlur(image, (0, 0), 0.8)
        image = image + camera["sharpen"] * (image - soft)
    picture = to_uint8(image)
    if camera["jpeg_quality"] is not None:
        picture = jpeg_round_trip(picture, camera["jpeg_quality"])
    return picture, {"photo": photo.name, **view, "flip": flip, "rot90": turns, "monochrome": is_grey, **camera}


def _draw_scene(photos: Sequence[Photo], size_hw: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(*size_hw, 3) float32: a piece of one of the photographs."""
    photo = photos[int(rng.integers(len(photos)))]
    window, view = _draw_crop(open_photo(photo.path), size_hw, rng)
    return resize(window.astype(np.float32), size_hw, view["interpolation"])


def _draw_crop(
    source: np.ndarray, crop_hw: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Window of the source to be resampled to `crop_hw`; flat pieces (sky, wall) are drawn again, in both classes."""
    height, width = source.shape[:2]
    smallest = max(crop_hw[0] / height, crop_hw[1] / width)
    low, high = max(smallest, 0.45), max(1.15, smallest * 1.05)
    for _ in range(6):
        scale = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        size = min(height, round(crop_hw[0] / scale)), min(width, round(crop_hw[1] / scale))
        top, left = (int(rng.integers(0, full - part + 1)) for full, part in zip((height, width), size, strict=True))
        window = source[top : top + size[0], left : left + size[1]]
        if float(window[::4, ::4].std()) > 14:
            break
    interpolation = "area" if scale < 0.7 else ("linear", "cubic")[int(rng.integers(2))]
    box = [left, top, left + size[1], top + size[0]]
    return window, {"crop_xyxy": box, "scale": round(scale, 4), "interpolation": interpolation}


def _draw_camera(rng: np.random.Generator) -> dict[str, Any]:
    noise_sigma = float(np.exp(rng.uniform(np.log(0.5), np.log(6.0))))  # levels, at mid grey
    shot_share = float(rng.uniform(0.3, 0.9))
    sharpen = float(rng.choice([0.0, rng.uniform(0.2, 0.9), -rng.uniform(0.3, 0.9)], p=[0.4, 0.35, 0.25]))
    return {
        "exposure": round(float(rng.uniform(0.8, 1.2)), 3),
        "gamma": round(float(rng.uniform(0.85, 1.2)), 3),
        "white_balance": [round(float(gain), 3) for gain in rng.uniform(0.93, 1.07, size=3)],
        "saturation": round(float(rng.uniform(0.75, 1.2)), 3),
        "noise_a": round(noise_sigma**2 * shot_share / 128, 6),
        "noise_b": round(noise_sigma**2 * (1 - shot_share), 5),
        "sharpen": round(sharpen, 3),
        "jpeg_quality": int(rng.integers(75, 99)) if rng.random() < 0.5 else None,
    }


def _tone(image: np.ndarray, camera: dict[str, Any], is_grey: bool) -> np.ndarray:
    """Exposure, white balance, gamma and saturation on float levels 0..255; grey keeps three equal channels."""
    gains = np.array([1, 1, 1] if is_grey else camera["white_balance"], dtype=np.float32) * camera["exposure"]
    # Whole rows and merged channels, not broadcasting over a last axis of 3: the same numbers several times as fast.
    rows = image.reshape(image.shape[0], -1) * np.tile(gains, image.shape[1])
    image = np.clip(rows / 255, 0, 1).reshape(image.shape) ** np.float32(camera["gamma"]) * np.float32(255)
    luma = image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    luma = cv2.merge([luma, luma, luma])  # (H, W, 3)
    return luma if is_grey else luma + (image - luma) * np.float32(camera["saturation"])
