"""Pictures of masks: tint and outline stand where the mask is, colours have a fixed range, text never shows boxes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from finetune.inference import visualization
from finetune.inference.visualization import (
    binarize,
    comparison_panel,
    drawable_text,
    evidence_overlay,
    heat_map,
    mask_picture,
    overlay_mask,
    save_mask_png,
)


def square(size_hw=(60, 80)):
    mask = np.zeros(size_hw, dtype=bool)
    mask[20:40, 30:60] = True
    return mask


def test_overlay_blends_inside_and_leaves_the_outside_alone():
    image = np.full((60, 80, 3), 100, dtype=np.uint8)
    shown = overlay_mask(image, square(), (200, 0, 50), alpha=0.5, draw_contour=False)
    assert shown[30, 45].tolist() == [150, 50, 75]
    np.testing.assert_array_equal(shown[~square()], image[~square()])
    assert image.min() == image.max() == 100


def test_overlay_threshold_is_inclusive():
    scores = np.full((4, 4), 0.5, dtype=np.float32)
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    assert overlay_mask(image, scores, threshold=0.5, draw_contour=False).any()
    assert not overlay_mask(image, scores, threshold=0.51).any()


@pytest.mark.parametrize("level", [0, 255])
def test_contour_shows_on_black_and_on_white(level):
    image = np.full((60, 80, 3), level, dtype=np.uint8)
    shown = overlay_mask(image, square(), alpha=0.0)
    contrast = np.abs(shown.astype(int) - level).sum(axis=2)
    assert contrast[20, 45] > 200  # on the upper edge of the square
    assert contrast[30, 45] == 0  # its inside is untouched with alpha 0
    assert contrast[5, 5] == 0


def test_empty_mask_gives_the_image_back():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(overlay_mask(image, np.zeros((9, 7), dtype=bool)), image)


def test_evidence_overlay_outlines_the_truth_in_its_own_colour():
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    shown = evidence_overlay(image, square(), np.zeros((60, 80), dtype=np.float32))
    assert shown[20, 45].tolist() == list(visualization.TRUE_COLOR)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4))),
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4))),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5))),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(image, mask):
    with pytest.raises(ValueError, match="of shape"):
        overlay_mask(image, mask)


def test_heat_map_has_a_fixed_range_and_rising_lightness():
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None, :]
    colored = heat_map(ramp)
    assert colored.shape == (1, 256, 3)
    lightness = colored.astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness[0, ::16]) > 0).all()
    np.testing.assert_array_equal(heat_map(np.full((2, 2), 0.3)), np.broadcast_to(heat_map([[0.3]]), (2, 2, 3)))
    np.testing.assert_array_equal(heat_map([[-1.0, 2.0]]), heat_map([[0.0, 1.0]]))
    assert heat_map([[np.nan]]).tolist() == [[[128, 128, 128]]]


def test_binarize_and_mask_picture():
    assert binarize(np.array([[0.4, 0.5, np.nan]])).tolist() == [[False, True, False]]
    assert mask_picture(np.array([[0, 1]])).tolist() == [[0, 255]]
    assert mask_picture(np.array([[False, True]])).tolist() == [[0, 255]]


@pytest.mark.parametrize("size_hw", [(60, 80), (400, 30), (20, 700), (1, 1)])
@pytest.mark.parametrize("has_truth", [True, False])
def test_panel_for_any_aspect_ratio(size_hw, has_truth):
    image = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    truth = np.ones(size_hw, dtype=bool) if has_truth else None
    panel = comparison_panel(image, truth, np.full(size_hw, 0.7, np.float32), "sample 1", tile_side=160)
    assert panel.mode == "RGB"
    assert panel.width >= 4 * 120


def test_panel_takes_pil_images_and_shows_an_unknown_mask_differently_from_an_empty_one():
    image = Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8))
    scores = np.zeros((40, 40), dtype=np.float32)
    unknown, empty = (np.asarray(comparison_panel(image, truth, scores)) for truth in (None, scores))
    assert (unknown != empty).any()


def test_text_without_a_cjk_font_keeps_only_what_can_be_drawn(monkeypatch):
    monkeypatch.setattr(visualization, "find_cjk_font", lambda font_path=None: None)
    assert drawable_text("拼接 splice\n0.93：高") == "splice 0.93"
    assert drawable_text("拼接") == ""
    image = np.zeros((30, 30, 3), dtype=np.uint8)
    with_chinese = comparison_panel(image, None, np.zeros((30, 30)), "a 图 b")
    np.testing.assert_array_equal(
        np.asarray(with_chinese), np.asarray(comparison_panel(image, None, np.zeros((30, 30)), "a b"))
    )


def test_text_with_a_cjk_font_is_kept(monkeypatch):
    monkeypatch.setattr(visualization, "find_cjk_font", lambda font_path=None: "some.ttc")
    assert drawable_text("拼接 splice") == "拼接 splice"


def test_save_mask_png(tmp_path):
    scores = np.array([[0.0, 0.25, 0.5, 1.0, np.nan, 1.5]], dtype=np.float32)
    save_mask_png(scores, tmp_path / "new" / "scores.png")
    written = Image.open(tmp_path / "new" / "scores.png")
    assert written.mode == "L"
    assert np.asarray(written).tolist() == [[0, 64, 128, 255, 0, 255]]
    save_mask_png(scores, tmp_path / "binary.png", threshold=0.5)
    assert np.asarray(Image.open(tmp_path / "binary.png")).tolist() == [[0, 0, 255, 255, 0, 255]]
    save_mask_png(scores > 0.3, tmp_path / "bool.png")
    assert np.asarray(Image.open(tmp_path / "bool.png")).tolist() == [[0, 0, 255, 255, 0, 255]]
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        save_mask_png(np.zeros((2, 2, 3)), tmp_path / "x.png")
