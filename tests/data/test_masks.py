"""Masks: robust binarisation, exact polygons, size and label contradictions, and the way back to few points."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from finetune.data.masks import (
    binarize_mask,
    check_mask_size,
    load_mask,
    polygons_from_mask,
    rasterize_polygons,
    resize_mask,
)
from finetune.errors import DataFormatError
from finetune.schema import ImageTarget


def disc(height: int = 60, width: int = 80) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (((rows - 25) ** 2 + (columns - 40) ** 2) < 15**2).astype(np.uint8)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def save(folder: Path, values: np.ndarray, name: str = "m.png", **options: Any) -> str:
    path = folder / name
    Image.fromarray(values).save(path, **options)
    return str(path)


def test_binary_masks_of_every_coding(tmp_path: Path) -> None:
    mask = disc()
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[mask == 1] = 255
    red = np.zeros((*mask.shape, 3), np.uint8)
    red[mask == 1] = 255, 0, 0
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    paths = [
        save(tmp_path, mask, "01.png"),
        save(tmp_path, mask * 3, "instances.png"),
        save(tmp_path, mask * 255, "255.png"),
        save(tmp_path, mask.astype(bool), "bool.png"),
        save(tmp_path, mask.astype(np.uint16) * 65535, "16.png"),
        save(tmp_path, mask.astype(np.uint16), "16_01.png"),
        save(tmp_path, rgba, "rgba.png"),
        save(tmp_path, red, "red.png"),
        str(tmp_path / "palette.png"),
    ]
    for path in paths:
        loaded = load_mask(ImageTarget(label=1, mask_path=path), mask.shape)
        assert loaded is not None
        assert loaded.dtype == np.uint8
        assert np.array_equal(loaded, mask), path


def test_jpeg_masks_keep_their_region_and_authentic_ones_stay_empty(tmp_path: Path) -> None:
    mask = disc()
    loaded = load_mask(ImageTarget(1, save(tmp_path, mask * 255, "m.jpg", quality=60)), mask.shape)
    assert loaded is not None
    assert iou(loaded, mask) > 0.97
    black = load_mask(ImageTarget(0, save(tmp_path, mask * 0, "b.jpg", quality=60)), mask.shape)
    assert black is not None
    assert not black.any()


def test_a_grey_or_float_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"neither 0/1 nor 0/255 \(largest value 90\)"):
        load_mask(ImageTarget(None, save(tmp_path, disc() * 90)), (60, 80), "r")
    with pytest.raises(ValueError, match="floating"):
        binarize_mask(Image.fromarray(disc().astype(np.float32)))


def test_targets_without_a_file() -> None:
    assert load_mask(ImageTarget(label=1), (4, 6)) is None
    assert load_mask(ImageTarget(), (4, 6)) is None
    for target in (ImageTarget(label=0), ImageTarget(0, mask_size_hw=(4, 6)), ImageTarget(polygons=())):
        mask = load_mask(target, (4, 6))
        assert mask is not None
        assert mask.shape == (4, 6)
        assert not mask.any()


def test_contradictions_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, disc() * 255)
    empty = save(tmp_path, disc() * 0, "e.png")
    square = (((1.0, 1.0), (9.0, 1.0), (9.0, 9.0)),)
    cases: list[tuple[ImageTarget, str]] = [
        (ImageTarget(0, path), "label 0 .real. with a mask that marks pixels"),
        (ImageTarget(0, polygons=square), "label 0 .real. with a mask"),
        (ImageTarget(1, empty), "label 1 .tampered. with an empty mask"),
        (ImageTarget(1, polygons=()), "label 1 .tampered. with an empty mask"),
        (ImageTarget(1, mask_size_hw=(60, 80)), "label 1 .tampered. with an empty mask"),
        (ImageTarget(1, polygons=(((2.1, 2.1), (2.4, 2.1), (2.4, 2.4)),)), "label 1 .tampered. with an empty mask"),
        (ImageTarget(1, polygons=(((0.1, 0.0), (0.9, 0.1), (1.0, 0.9)),)), r"polygons lie in 0..1.*multiply x by"),
        (
            ImageTarget(1, polygons=(((0.0, 0.0), (999.0, 0.0), (999.0, 50.0)),)),
            r"polygon leaves.*x in 0\.\.80, y in 0\.\.60",
        ),
        (ImageTarget(1, str(tmp_path / "none.png")), "mask file not found"),
        (ImageTarget(1, str(Path(__file__))), "not an image"),
        (ImageTarget(0, mask_size_hw=(80, 60)), "80x60 but the image is 60x80.*upright"),
        (ImageTarget(1, save(tmp_path, np.ones((80, 60), np.uint8), "t.png")), "80x60 but the image is 60x80.*upright"),
        (ImageTarget(1, save(tmp_path, np.ones((6, 8), np.uint8), "s.png")), "6x8 but the image is 60x80.*resize"),
    ]
    for target, expected in cases:
        with pytest.raises(DataFormatError, match=r"record 'r' \(t:1\): .*" + expected) as caught:
            load_mask(target, (60, 80), "r", "t:1")
        assert "fix: " in str(caught.value)
        if any(what in expected for what in ("image is 60x80", "polygon", "not found", "not an image")):  # by headers
            with pytest.raises(DataFormatError) as seen:
                check_mask_size(target, (60, 80), "r", "t:1")
            assert str(seen.value) == str(caught.value)
        else:
            check_mask_size(target, (60, 80), "r", "t:1")


def test_truncated_mask_names_the_record(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (60, 80), np.uint8) * 255).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:300])
    with pytest.raises(DataFormatError, match="record 'r': mask is truncated"):
        load_mask(ImageTarget(1, str(tmp_path / "cut.png")), (60, 80), "r")


def test_polygon_convention_by_hand() -> None:
    one_pixel = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    assert rasterize_polygons([one_pixel], (2, 3)).tolist() == [[1, 0, 0], [0, 0, 0]]
    block = ((1.0, 0.0), (3.0, 0.0), (3.0, 2.0), (1.0, 2.0))
    assert rasterize_polygons([block, block], (2, 3)).tolist() == [[0, 1, 1], [0, 1, 1]]  # union, not even-odd
    eight = ((0.0, 0.0), (4.0, 4.0), (4.0, 0.0), (0.0, 4.0))
    assert rasterize_polygons([eight], (4, 4)).sum() == 8  # half of the square: two triangles
    beyond = ((-1.0, -1.0), (4.0, -1.0), (4.0, 3.0), (-1.0, 3.0))
    assert rasterize_polygons([beyond], (2, 3)).all()


def test_rasterization_agrees_with_point_in_polygon() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.uniform(-3, 43, (9, 2))
        mask = rasterize_polygons([tuple(map(tuple, points))], (40, 40))
        x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(40) + 0.5)
        inside = np.zeros((40, 40), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        assert np.array_equal(mask.astype(bool), inside)


@pytest.mark.parametrize("seed", range(4))
def test_round_trip_is_exact_without_a_budget_and_close_with_one(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=(90, 120)).astype(np.float32)
    mask = (cv2.GaussianBlur(noise, (0, 0), 7) > 0.04).astype(np.uint8)  # blobs, some with holes
    mask[40:60, 30:60] = 1
    mask[47:52, 40:50] = 0
    exact = rasterize_polygons(polygons_from_mask(mask, max_points=10**6, min_area=0), mask.shape)
    assert np.array_equal(exact, mask)
    few = polygons_from_mask(mask, max_points=64)
    assert sum(map(len, few)) <= 64
    assert iou(rasterize_polygons(few, mask.shape), mask) > 0.85


def test_ring_disc_and_speckle() -> None:
    ring = disc()
    ring[20:30, 35:45] = 0
    polygons = polygons_from_mask(ring, max_points=40)
    assert len(polygons) == 1
    assert iou(rasterize_polygons(polygons, ring.shape), ring) > 0.95
    (polygon,) = polygons_from_mask(disc(), max_points=12)
    assert len(polygon) <= 12
    assert iou(rasterize_polygons([polygon], (60, 80)), disc()) > 0.93
    speckle = np.zeros((20, 20), np.uint8)
    speckle[3, 3] = 1
    assert polygons_from_mask(speckle) == ()
    assert polygons_from_mask(np.zeros((5, 5))) == ()
    assert polygons_from_mask(speckle, min_area=1) == (((3.0, 3.0), (3.0, 4.0), (4.0, 4.0), (4.0, 3.0)),)
    many = np.zeros((64, 64), np.uint8)
    many[::8, ::8] = many[1::8, ::8] = 1
    many[20:44, 20:44] = 1
    kept = polygons_from_mask(many, max_points=8, min_area=1)
    assert 0 < sum(map(len, kept)) <= 8
    assert max(x for x, _ in kept[0]) == 44


def test_resize_mask_is_the_half_area_rule() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], np.uint8)
    assert resize_mask(mask, (1, 2)).tolist() == [[1, 0]]
    assert resize_mask(mask, (2, 4)).tolist() == mask.tolist()
    assert resize_mask(mask, (4, 8)).tolist() == np.kron(mask, np.ones((2, 2), np.uint8)).tolist()
    assert resize_mask(mask, (4, 2)).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    big = disc(61, 83)
    small = resize_mask(big, (17, 23))
    assert small.dtype == np.uint8
    assert abs(small.mean() - big.mean()) < 0.02


def test_a_corner_pixel_is_no_share() -> None:
    corner = (((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)),)
    mask = load_mask(ImageTarget(1, polygons=corner), (64, 64))
    assert mask is not None
    assert mask.sum() == 1
