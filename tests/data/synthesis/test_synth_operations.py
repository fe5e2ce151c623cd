"""Operations: the mask is what was altered, invisible edits are drawn again, blends and matches do what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from finetune.data.synthesis.camera import develop
from finetune.data.synthesis.degradations import jpeg_round_trip
from finetune.data.synthesis.operations import OPERATIONS, NoVisibleEditError, OperationSettings, Tampering, tamper
from finetune.data.synthesis.operations.blending import membrane
from finetune.data.synthesis.operations.patch_fill import patch_fill
from finetune.data.synthesis.operations.splice import match_noise, noise_sigma
from finetune.data.synthesis.operations.visibility import visible_change
from finetune.data.synthesis.photos import find_photos
from finetune.data.synthesis.regions import DoesNotFitError

PHOTOS = find_photos()
SELF_CONTAINED = tuple(name for name in OPERATIONS if name != "inpaint_diffusion")
"""`inpaint_diffusion` needs a pipeline; see test_synth_diffusion."""


def picture(seed: int, index: int | None = None, size_hw: tuple[int, int] = (196, 252)) -> np.ndarray:
    photos = PHOTOS.photos
    return develop(photos[seed % len(photos) if index is None else index], size_hw, np.random.default_rng(seed))[0]


def draw_donor(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    return picture(int(rng.integers(1000)), 1), {"photo": "donor"}


@pytest.mark.parametrize("operation", SELF_CONTAINED)
def test_mask_is_exactly_what_was_altered(operation: str) -> None:
    settings = OperationSettings()
    coverage = []
    for seed in range(18):
        host = picture(seed)
        kept = host.copy()
        result = tamper(host, operation, np.random.default_rng(seed), settings, draw_donor)
        changed = (host != result.image).any(axis=2)
        assert np.array_equal(host, kept)
        assert not (changed & ~result.mask).any(), "an altered pixel is not in the mask"
        distance = cv2.distanceTransform((~changed).astype(np.uint8), cv2.DIST_L2, 5)
        assert distance[result.mask].max() <= 5, "the mask holds a larger unaltered part"
        difference = np.abs(host.astype(float) - result.image)[result.mask].mean()
        assert difference >= settings.min_change
        assert difference == pytest.approx(result.parameters["mean_abs_change"], abs=0.01)
        coverage.append(changed.sum() / result.mask.sum())
        low, high = settings.area_ranges[operation]
        assert 0.6 * low <= result.mask.mean() <= 1.15 * high
    assert np.mean(coverage) > 0.93


@pytest.mark.parametrize("operation", SELF_CONTAINED)
def test_the_generator_alone_decides_and_parameters_are_json(operation: str) -> None:
    def make(seed: int) -> Tampering:
        return tamper(picture(seed), operation, np.random.default_rng(seed), OperationSettings(), draw_donor)

    threads = cv2.getNumThreads()
    results = []
    try:
        for count in (1, 4):
            cv2.setNumThreads(count)
            results.append([make(seed) for seed in range(8)])
    finally:
        cv2.setNumThreads(threads)
    for first, again in zip(*results, strict=True):
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.mask, again.mask)
        assert first.parameters == again.parameters
        assert json.loads(json.dumps(first.parameters, allow_nan=False)) == first.parameters


def test_source_and_target_convention_adds_the_source() -> None:
    both = replace(OperationSettings(), mask_convention="source_and_target")
    for seed in range(6):
        host = picture(seed)
        target = tamper(host, "copy_move", np.random.default_rng(seed), OperationSettings(), draw_donor)
        union = tamper(host, "copy_move", np.random.default_rng(seed), both, draw_donor)
        assert np.array_equal(target.image, union.image)
        assert not (target.mask & ~union.mask).any()
        assert union.mask.sum() > 1.3 * target.mask.sum()


def test_exact_copy_move_copies_pixels_unchanged() -> None:
    settings = replace(OperationSettings(), max_feather=0.0, poisson=0.0)
    seen = 0
    for seed in range(60):
        host = picture(seed)
        result = tamper(host, "copy_move", np.random.default_rng(seed), settings, draw_donor)
        p = result.parameters
        if p["angle"] == 0 and p["scale"] == 1 and not p["flip"]:
            dx, dy = p["shift_xy"]
            moved = np.roll(host, (dy, dx), axis=(0, 1))
            assert np.array_equal(result.image[result.mask], moved[result.mask])
            seen += 1
    assert seen >= 3


def test_an_invisible_edit_is_never_returned() -> None:
    flat = np.full((196, 252, 3), 90, dtype=np.uint8)
    with pytest.raises(NoVisibleEditError, match="no visible edit"):
        tamper(flat, "copy_move", np.random.default_rng(0), OperationSettings(), draw_donor)
    half = flat.copy()
    half[:, 126:] = np.random.default_rng(0).integers(0, 255, (196, 126, 3), dtype=np.uint8)
    redraws = [
        tamper(half, "copy_move", np.random.default_rng(seed), OperationSettings(), draw_donor).parameters["redraws"]
        for seed in range(12)
    ]
    assert max(redraws) > 0  # some draws copied flat onto flat


def sky(seed: int, noise: float, trees: int = 46) -> np.ndarray:
    """(196, 252, 3) uint8: a clear sky, brighter towards the horizon, with `noise` levels of grain; trees below."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 1, 196)[:, None, None]
    levels = np.array([120, 160, 210]) + rows * np.array([60, 50, 30]) + noise * rng.standard_normal((196, 252, 1))
    if trees:
        levels[-trees:] = rng.integers(0, 120, (trees, 252, 3))
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def test_what_counts_as_visible() -> None:
    mask = np.zeros((196, 252), dtype=bool)
    mask[40:120, 50:150] = True
    clean, plain = sky(0, 0.0, trees=0), sky(0, 4.0, trees=0)
    assert visible_change(plain, plain, mask) == (0.0, 0.0)
    lifted = np.where(mask[..., None], plain + 2, plain)
    mean, share = visible_change(plain, lifted.astype(np.uint8), mask)
    assert 1.5 < mean <= 2.0  # the window reaches over the border of the region
    assert share > 0.95
    half = mask.copy()
    half[:, :100] = False
    part = np.where(half[..., None], plain + 8, plain).astype(np.uint8)
    assert visible_change(plain, part, mask)[1] == pytest.approx(0.5, abs=0.08)
    assert visible_change(plain, np.where(mask[..., None], clean, plain), mask)[1] > 0.9, "grain that is gone shows"
    other = np.where(mask[..., None], sky(1, 4.0, trees=0), plain)
    assert np.abs(other.astype(float) - plain)[mask].mean() > 3.0
    assert visible_change(plain, other, mask)[1] < 0.3, "one patch of plain noise in place of another shows nothing"


def test_an_edit_that_its_pixels_do_not_show_is_drawn_again() -> None:
    """Sky filled with sky: three levels differ at every pixel, since noise differs from noise, and nothing is seen."""
    shares = {}
    for least in (0.0, OperationSettings().min_visible_share):
        settings = replace(OperationSettings(), min_visible_share=least)
        shares[least] = [
            tamper(sky(seed, 4.5), "remove", np.random.default_rng(seed), settings, draw_donor).parameters
            for seed in range(8)
        ]
    assert all(edit["mean_abs_change"] >= 3 for edit in shares[0.0])
    assert sum(edit["visible_share"] < 0.5 for edit in shares[0.0]) >= 2
    assert all(edit["visible_share"] >= 0.5 for edit in shares[0.5])
    assert [e for e in shares[0.0] if e["visible_share"] >= 0.5] == [
        again for e, again in zip(shares[0.0], shares[0.5], strict=True) if e["visible_share"] >= 0.5
    ], "an edit that shows is not touched"


def test_what_post_processing_swallows_is_not_labelled() -> None:
    host = picture(3)
    with pytest.raises(NoVisibleEditError):
        tamper(host, "retouch", np.random.default_rng(0), OperationSettings(), draw_donor, lambda _: host)

    def shrink(image: np.ndarray) -> np.ndarray:
        return cv2.resize(jpeg_round_trip(image, 75), (189, 147), interpolation=cv2.INTER_AREA)

    for seed in range(6):
        result = tamper(host, "retouch", np.random.default_rng(seed), OperationSettings(), draw_donor, shrink)
        assert np.array_equal(result.finished, shrink(result.image))
        assert result.finished_mask.shape == (147, 189)
        assert result.finished_mask.mean() == pytest.approx(result.mask.mean(), abs=0.01)
        shown = visible_change(shrink(host), result.finished, result.finished_mask)
        parameters = result.parameters
        assert (parameters["visible_change"], parameters["visible_share"]) == pytest.approx(shown, abs=1e-3)


def laplace_oracle(values: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The exact discrete solution, one equation per pixel of the region; nothing flows through the picture's border."""
    points = np.argwhere(region)
    number = {(int(y), int(x)): i for i, (y, x) in enumerate(points)}
    matrix, right = lil_matrix((len(points), len(points))), np.zeros(len(points))
    for (y, x), i in number.items():
        for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if not (0 <= near[0] < region.shape[0] and 0 <= near[1] < region.shape[1]):
                continue
            matrix[i, i] += 1
            if near in number:
                matrix[i, number[near]] = -1
            else:
                right[i] += values[near]
    solved = values.astype(float).copy()
    solved[region] = spsolve(matrix.tocsr(), right)
    return solved


@pytest.mark.parametrize("touches_border", [False, True])
def test_membrane_solves_laplace(touches_border: bool) -> None:
    region = np.zeros((90, 110), dtype=np.uint8)
    cv2.ellipse(region, (20 if touches_border else 55, 45), (35, 22), 20, 0, 360, 1, -1)
    values = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 400, (90, 110, 3)).astype(np.float32), (0, 0), 8)
    inside = region.astype(bool)
    result = membrane(values, inside)
    assert np.array_equal(result[~inside], values[~inside])
    for channel in range(3):
        exact = laplace_oracle(values[..., channel], inside)
        spread = exact[inside].std()
        assert np.abs(result[..., channel] - exact)[inside].max() < 0.12 * max(spread, 1)
    scrambled = values.copy()
    scrambled[inside] = 1e4
    assert np.array_equal(membrane(scrambled, inside), result), "values inside the region must not matter"


def test_poisson_blending_keeps_gradients_and_hides_the_seam() -> None:
    jumps: dict[str, list[float]] = {"alpha": [], "poisson": []}
    for chance, name in ((0.0, "alpha"), (1.0, "poisson")):
        settings = replace(OperationSettings(), poisson=chance, max_feather=0.0, donor_match=0.0)
        for seed in range(16):
            host = picture(seed)
            result = tamper(host, "splice", np.random.default_rng(seed), settings, draw_donor)
            assert result.parameters["blend"] == name
            levels = result.image.astype(float)
            for axis in (0, 1):
                border = np.diff(result.mask.astype(int), axis=axis) != 0
                jumps[name].append(np.abs(np.diff(levels, axis=axis))[border].mean())
    assert np.mean(jumps["poisson"]) < 0.6 * np.mean(jumps["alpha"])


def test_a_matched_donor_fits_in_better() -> None:
    off: dict[float, list[float]] = {0.0: [], 1.0: []}
    for chance, found in off.items():
        settings = replace(OperationSettings(), donor_match=chance, poisson=0.0)
        for seed in range(24):
            host = picture(seed)
            result = tamper(host, "splice", np.random.default_rng(seed), settings, draw_donor)
            assert result.parameters["donor_match"] == bool(chance)
            assert ("noise_match" in result.parameters) == bool(chance)
            colours = [image[result.mask].mean(axis=0) for image in (host, result.image)]
            found.append(np.abs(colours[0] - colours[1]).mean())
    assert np.mean(off[1.0]) < 0.5 * np.mean(off[0.0])


@pytest.mark.parametrize(("piece", "host"), [(1.0, 6.0), (7.0, 2.0), (3.0, 3.0)])
def test_noise_is_estimated_and_matched(piece: float, host: float) -> None:
    rng = np.random.default_rng(0)
    slope = np.linspace(60, 180, 120)[None, :, None]
    inside = np.zeros((100, 120), dtype=bool)
    inside[20:80, 20:100] = True

    def noisy(sigma: float) -> np.ndarray:
        grain = rng.normal(0, sigma, (100, 120, 1))
        return np.clip(np.rint(slope + grain), 0, 255).astype(np.uint8).repeat(3, axis=2)

    content, surroundings = noisy(piece), noisy(host)
    assert noise_sigma(content, inside) == pytest.approx(piece, rel=0.15)
    matched, done = match_noise(content, inside, surroundings, seed=3)
    assert abs(noise_sigma(matched, inside) - host) <= max(0.45 * abs(piece - host), 0.4)
    assert (done["added"] > 0) == (host > piece * 1.1) or piece == host
    assert (done["softened"] > 0) == (piece > host * 1.2)


def test_every_method_of_erasing_occurs_and_biharmonic_only_in_small_holes() -> None:
    methods: dict[str, list[float]] = {}
    for seed in range(60):
        result = tamper(picture(seed), "erase", np.random.default_rng(seed), OperationSettings(), draw_donor)
        methods.setdefault(result.parameters["method"], []).append(float(result.mask.sum()))
    assert set(methods) == {"telea", "navier_stokes", "biharmonic"}
    assert max(methods["biharmonic"]) <= 3000


def stripes(size_hw: tuple[int, int] = (96, 128)) -> np.ndarray:
    rows, columns = np.indices(size_hw)
    pattern = 120 + 80 * np.sign(np.sin(columns * (2 * np.pi / 8))) + 20 * np.sign(np.sin(rows * (2 * np.pi / 24)))
    return np.stack([pattern, 0.8 * pattern, 0.5 * pattern], axis=2).astype(np.uint8)


def test_patch_fill_continues_a_periodic_pattern() -> None:
    image = stripes()
    hole = np.zeros(image.shape[:2], dtype=bool)
    hole[34:62, 50:78] = True
    damaged = np.where(hole[..., None], np.uint8(0), image)
    filled = patch_fill(damaged, hole, np.random.default_rng(0))
    assert np.array_equal(filled[~hole], image[~hole])
    error = np.abs(filled.astype(float) - image)[hole].mean()
    smooth = np.abs(cv2.inpaint(damaged, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA).astype(float) - image)[
        hole
    ].mean()
    assert error < 0.2 * smooth


def test_patch_fill_keeps_texture_and_grain_and_never_looks_inside_the_hole() -> None:
    image = picture(0, next(i for i, photo in enumerate(PHOTOS.photos) if photo.group == "gravel"), (224, 224))
    hole = np.zeros((224, 224), dtype=np.uint8)
    cv2.ellipse(hole, (110, 100), (45, 30), 15, 0, 360, 1, -1)
    inside = hole.astype(bool)
    other = image.copy()
    other[inside] = 77
    filled, again = (patch_fill(each, inside, np.random.default_rng(1)) for each in (image, other))
    assert np.array_equal(filled, again)
    assert 0.7 < filled[inside].std() / image[~inside].std() < 1.2
    assert noise_sigma(filled, inside) > 0.6 * noise_sigma(image, inside)
    grey = patch_fill(image[..., :1].repeat(3, axis=2), inside, np.random.default_rng(1))
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_patch_fill_refuses_a_hole_that_leaves_nothing_to_copy() -> None:
    hole = np.ones((64, 64), dtype=bool)
    hole[:3] = False
    with pytest.raises(DoesNotFitError):
        patch_fill(np.zeros((64, 64, 3), dtype=np.uint8), hole, np.random.default_rng(0))


def test_patch_fill_takes_holes_at_the_border_and_odd_sizes() -> None:
    for size_hw in ((97, 131), (61, 200), (33, 40)):
        image = picture(3, 0, size_hw)
        hole = np.zeros(size_hw, dtype=bool)
        hole[: size_hw[0] // 4, -size_hw[1] // 3 :] = True
        filled = patch_fill(image, hole, np.random.default_rng(0))
        assert np.array_equal(filled[~hole], image[~hole])
