"""Classical baselines: they find what they are made for, survive degenerate images, and their thresholds fit fairly."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from finetune.evaluation.baselines import (
    BASELINES,
    Thresholds,
    error_level_analysis,
    fit_baselines,
    fit_image_threshold,
    fit_threshold,
    image_score,
    local_noise_variance,
    rescale,
    run_baselines,
)


def smooth_scene(rng, height=224, width=224):
    """Soft colours, as a photograph has at this scale, without noise: (H, W, 3) float."""
    coarse = rng.uniform(60, 200, (6, 6, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def to_uint8(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def square(height=224, width=224):
    mask = np.zeros((height, width), dtype=bool)
    mask[70:150, 90:170] = True
    return mask


def noisy_square(rng, inside=9.0, outside=2.0):
    mask = square()
    sigma = np.where(mask, inside, outside)[..., None]
    return to_uint8(smooth_scene(rng) + rng.normal(size=(224, 224, 3)) * sigma), mask


def jpeg(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def pixel_auc(scores, mask):
    """Mann-Whitney with ties counted half."""
    order = np.unique(scores, return_inverse=True)[1].ravel()
    counts = np.bincount(order)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]
    positive, negative = mask.sum(), (~mask).sum()
    return (ranks[mask.ravel()].sum() - positive * (positive + 1) / 2) / (positive * negative)


@pytest.mark.parametrize(("inside", "outside"), [(9.0, 2.0), (1.0, 6.0)])
def test_noise_variance_finds_a_square_with_another_noise_level(inside, outside):
    image, mask = noisy_square(np.random.default_rng(0), inside, outside)
    assert pixel_auc(local_noise_variance(image), mask) > 0.9


def test_error_levels_find_a_region_with_another_jpeg_history():
    rng = np.random.default_rng(1)
    scene = to_uint8(smooth_scene(rng) + rng.normal(size=(224, 224, 3)) * 8)
    mask = square()
    forged = jpeg(scene, 60)  # the background has been saved coarsely once, the pasted square never
    forged[mask] = scene[mask]
    assert pixel_auc(error_level_analysis(forged), mask) > 0.9


@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_images_score_zero(name, value):
    scores = BASELINES[name](np.full((50, 70, 3), value, dtype=np.uint8))
    assert np.isfinite(scores).all()
    assert scores.max() == 0.0


@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("size_hw", [(224, 224), (40, 333), (301, 17), (5, 7), (1, 1), (1, 60)])
def test_any_size_gives_a_map_of_that_size(name, size_hw):
    image = np.random.default_rng(2).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    scores = BASELINES[name](image)
    assert scores.shape == size_hw
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert scores.min() >= 0.0
    assert scores.max() <= 1.0
    assert 0.0 <= image_score(scores) <= 1.0


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_same_image_same_map_and_input_untouched(name):
    image, _ = noisy_square(np.random.default_rng(3))
    kept = image.copy()
    np.testing.assert_array_equal(BASELINES[name](image), BASELINES[name](image))
    np.testing.assert_array_equal(image, kept)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_fast_enough_to_run_beside_the_model(name):
    image, _ = noisy_square(np.random.default_rng(4))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        BASELINES[name](image)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.015


def test_grey_or_float_images_are_refused():
    with pytest.raises(ValueError, match="expected"):
        local_noise_variance(np.zeros((8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="expected"):
        error_level_analysis(np.zeros((8, 8, 3), dtype=np.float32))


def test_rescale_moves_the_threshold_to_half_and_keeps_the_ranking():
    scores = np.linspace(0, 1, 101, dtype=np.float32)
    moved = rescale(scores, 0.8)
    assert moved[[0, 80, 100]] == pytest.approx([0.0, 0.5, 1.0])
    assert (np.diff(moved) > 0).all()
    np.testing.assert_allclose(rescale(scores, 0.5), scores, atol=1e-6)
    with pytest.raises(ValueError, match="between 0 and 1"):
        rescale(scores, 1.0)


def test_fit_threshold_agrees_with_trying_every_one():
    rng = np.random.default_rng(5)
    masks = [rng.random((20, 30)) < 0.3 for _ in range(4)]
    scores = [np.clip(0.35 * mask + rng.random((20, 30)) * 0.5, 0, 1).astype(np.float32) for mask in masks]

    def mean_f1(threshold):
        per_image = []
        for scored, mask in zip(scores, masks, strict=True):
            marked = scored >= threshold
            per_image.append(2 * (marked & mask).sum() / (marked.sum() + mask.sum()))
        return np.mean(per_image)

    grid = np.arange(1, 100) / 100
    tried = [mean_f1(threshold) for threshold in grid]
    assert fit_threshold(scores, masks) == pytest.approx(grid[int(np.argmax(tried))])


def test_fit_threshold_without_tampered_pixels_stays_at_half():
    scores = [np.random.default_rng(6).random((8, 8)).astype(np.float32)]
    assert fit_threshold(scores, [np.zeros((8, 8), dtype=bool)]) == 0.5
    assert fit_threshold(scores, [None]) == 0.5


def test_fit_image_threshold():
    assert fit_image_threshold([0.1, 0.2, 0.7, 0.8], [0, 0, 1, 1]) == pytest.approx(0.45)
    assert fit_image_threshold([0.1, 0.2], [1, 1]) == 0.5
    assert fit_image_threshold([0.0, 0.0], [0, 1]) == 0.01


def test_run_baselines_at_fitted_thresholds():
    rng = np.random.default_rng(7)
    images, masks, labels = [], [], []
    for index in range(8):
        image, mask = noisy_square(rng, inside=8.0 if index % 2 else 2.0)
        images.append(image)
        masks.append(mask if index % 2 else None)
        labels.append(index % 2)
    thresholds = fit_baselines(images[:4], masks[:4], labels[:4])
    results = run_baselines(images[4:], masks[4:], labels[4:], thresholds)
    assert set(results) == set(BASELINES)
    noise = results["noise_variance"]
    assert noise.image_scores.shape == (4,)
    assert (noise.image_scores >= 0.5).astype(int).tolist() == labels[4:]
    marked = noise.mask_scores[1] >= 0.5
    assert 2 * (marked & masks[5]).sum() / (marked.sum() + masks[5].sum()) > 0.7
    assert noise.masks[0] is None
    assert noise.thresholds == thresholds["noise_variance"]
    unfitted = run_baselines(images[4:], masks[4:], labels[4:])["ela"]
    assert unfitted.thresholds == Thresholds()
    np.testing.assert_array_equal(unfitted.mask_scores[0], rescale(error_level_analysis(images[4]), 0.5))


def test_run_baselines_names_unequal_counts():
    with pytest.raises(ValueError, match="1 images, 0 masks"):
        run_baselines([np.zeros((8, 8, 3), dtype=np.uint8)], [], [0])
