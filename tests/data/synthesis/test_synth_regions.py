"""Regions: asked sizes, one piece, object-like outlines that follow the picture, text only where there is text."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from finetune.data.synthesis.camera import develop
from finetune.data.synthesis.photos import find_photos
from finetune.data.synthesis.regions import FOUND_SHAPES, SHAPES, draw_region, soft_edge
from finetune.data.synthesis.regions.text import find_text, text_region

PHOTOS = find_photos()
PAGE = next(photo for photo in PHOTOS.photos if photo.group == "page")


def picture(seed: int) -> np.ndarray:
    return develop(PHOTOS.photos[seed % len(PHOTOS.photos)], (196, 252), np.random.default_rng(seed))[0]


def page(seed: int, size_hw: tuple[int, int] = (224, 224)) -> np.ndarray:
    return develop(PAGE, size_hw, np.random.default_rng(seed))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_regions_have_the_asked_size(shape: str) -> None:
    for seed in range(16):
        image = page(seed) if shape == "text" else picture(seed)
        region, parameters = draw_region(image, np.random.default_rng(seed), (0.05, 0.2), {shape: 1.0})
        assert region.dtype == bool
        assert 0.045 <= region.mean() <= 0.21
        assert parameters["shape"] in (shape, "blob")
        assert cv2.connectedComponents(region.astype(np.uint8))[0] == 2  # background and one piece


@pytest.mark.parametrize("shape", FOUND_SHAPES)
def test_found_shapes_follow_from_the_generator_alone(shape: str) -> None:
    for seed in range(6):
        image = page(seed) if shape == "text" else picture(seed)
        once, again = (draw_region(image, np.random.default_rng(seed), (0.05, 0.2), {shape: 1.0}) for _ in range(2))
        assert np.array_equal(once[0], again[0])
        assert once[1] == again[1]


def edge_strength(image: np.ndarray, region: np.ndarray) -> float:
    """Mean gradient of the blurred picture on the outline of a region, relative to the whole picture."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1.5)
    gradient = np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1))
    outline = cv2.morphologyEx(region.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).astype(bool)
    outline[[0, -1]] = outline[:, [0, -1]] = False
    return float(gradient[outline].mean() / gradient.mean())


@pytest.mark.parametrize("shape", ["superpixels", "felzenszwalb", "segment"])
def test_segments_follow_the_edges_of_the_picture(shape: str) -> None:
    def strength(name: str) -> float:
        values = []
        for seed in range(24):
            region, parameters = draw_region(picture(seed), np.random.default_rng(seed), (0.05, 0.25), {name: 1.0})
            if parameters["shape"] == name:
                values.append(edge_strength(picture(seed), region))
        assert len(values) >= 16
        return float(np.mean(values))

    assert strength(shape) > 1.15 * strength("blob")


def printed(words: str, size_hw: tuple[int, int] = (200, 300), turned: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A page with lines of print and the (H, W) bool box of all the lines."""
    height, width = size_hw
    image = np.full((height, width, 3), 225, dtype=np.uint8)
    box = np.zeros(size_hw, dtype=bool)
    box[28:-10, 14:-4] = True
    for y in range(50, height - 20, 30):
        cv2.putText(image, words, (20, y), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (30, 30, 40), 1, cv2.LINE_AA)
    noise = np.random.default_rng(0).normal(0, 3, image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return (np.ascontiguousarray(image.transpose(1, 0, 2)), box.T) if turned else (image, box)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("invert", [False, True])
def test_lines_of_print_are_found_dark_or_bright_upright_or_turned(turned: bool, invert: bool) -> None:
    image, box = printed("Invoice No 2041 paid", turned=turned)
    lines, is_vertical = find_text(255 - image if invert else image)
    assert is_vertical == turned
    assert len(lines) == 5
    assert all(3 <= len(line.words_xyxy) <= 6 for line in lines)
    found = text_region(image, np.random.default_rng(0), (0.03, 0.3))
    assert found is not None
    assert (found[0] & box).sum() / found[0].sum() > 0.9


def test_text_regions_stand_on_the_print_of_a_photographed_page() -> None:
    darker = []
    for seed in range(12):
        image = page(seed)
        region, parameters = draw_region(image, np.random.default_rng(seed), (0.04, 0.25), {"text": 1.0})
        if parameters["shape"] != "text":
            continue
        assert parameters["text_parts"] >= 1
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)
        background = cv2.dilate(grey, np.ones((15, 15)))
        is_print = background - grey > 40
        darker.append(is_print[region].mean() / max(is_print.mean(), 1e-3))
    assert len(darker) >= 8
    assert np.mean(darker) > 1.3


def test_photographs_without_text_hold_no_lines() -> None:
    found = {}
    for photo in PHOTOS.photos:
        if photo.group != "page":
            found[photo.group] = sum(
                bool(find_text(develop(photo, (224, 224), np.random.default_rng(seed))[0])[0]) for seed in range(6)
            )
    assert sum(found.values()) <= 2, found


def test_shapes_that_are_not_there_are_drawn_among_the_others() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (120, 120, 3), dtype=np.uint8)
    shapes = [
        draw_region(noise, np.random.default_rng(seed), (0.05, 0.2), {"text": 5.0, "polygon": 1.0})[1]["shape"]
        for seed in range(10)
    ]
    assert set(shapes) == {"polygon"}
    parameters: dict[str, Any] = draw_region(noise, np.random.default_rng(0), (0.05, 0.2), {"text": 1.0})[1]
    assert parameters["shape"] == "blob"


def test_soft_edge_is_hard_without_feather_and_narrow_with() -> None:
    region = np.zeros((40, 40), dtype=bool)
    region[10:30, 10:30] = True
    assert set(np.unique(soft_edge(region, 0))) == {0, 1}
    support = soft_edge(region, 3.0) > 0
    assert not support[:6].any()
    assert (soft_edge(region, 3.0)[14:26, 14:26] > 0.95).all()
