"""What texture and brightness explain is taken out; what they do not explain stays, whatever the picture shows; the
stream with these maps is an addition that old models do without."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.config import NoiseResidualConfig
from finetune.models.box_means import local_mean
from finetune.models.content_residuals import RESIDUAL_CHANNELS, content_residuals, outlier_distance
from finetune.models.forensic_statistics import forensic_statistics
from finetune.models.noise_residual import NoiseResidualStream

REGION = (slice(60, 140), slice(72, 152))  # rows, columns in pixels
CELLS = tuple(slice(part.start // 4, part.stop // 4) for part in REGION)


def _brighter_to_the_right(seed: int, gain: float = 0.04, extra: float = 0.0) -> Tensor:
    """(1, 3, 192, 224): a ramp with waves, noise variance growing with brightness, more of it inside `REGION`."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:192, :224]
    picture = 40 + 0.7 * columns + 12 * np.sin(rows / 9) * np.sin(columns / 13)
    variance = 0.3 + gain * picture
    variance[REGION] += extra
    noise = rng.standard_normal((3, 192, 224)) * np.sqrt(variance)
    return torch.from_numpy(picture + noise).clamp(0, 255).round().float()[None]


def _residuals(picture: Tensor) -> Tensor:
    return content_residuals(forensic_statistics(picture).cells)[0]


def _frequency_band(cells: np.ndarray, low: int, high: int) -> np.ndarray:
    frequency = np.add.outer(np.arange(8), np.arange(8)).ravel()
    return cells[32:][(frequency >= low) & (frequency <= high)].mean(0)


def _window_means(plane: np.ndarray, side: int) -> np.ndarray:
    h, w = plane.shape
    reach = side // 2
    return np.array(
        [
            [plane[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].mean() for x in range(w)]
            for y in range(h)
        ]
    )


def _spectral(c: np.ndarray) -> list[np.ndarray]:
    colour, variance, brightness = c[28:31], c[31], c[28:31].mean(0)
    texture = [variance, _frequency_band(c, 1, 1), _frequency_band(c, 2, 2)]
    wide = [_window_means(plane, 5) for plane in texture]
    return [*colour, *texture, *wide, brightness**2, variance**2, brightness * variance]


def _smooth(c: np.ndarray) -> list[np.ndarray]:
    colour, brightness = c[28:31], c[28:31].mean(0)
    levels = 128 * brightness
    near, wide = (
        np.log(_window_means(levels**2, side) - _window_means(levels, side) ** 2 + 0.5) / 4 for side in (3, 7)
    )
    return [*colour, near, wide, brightness**2, near**2, brightness * near, brightness * wide]


def _least_squares(c: np.ndarray, content: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """By numpy, the penalty as further rows: (32, h * w) residuals over their root mean square."""
    columns = [((v - v.mean()) / np.sqrt(v.var() + 1e-5)).ravel() for v in content]
    design = np.stack([*columns, np.ones(c[0].size)], axis=1)
    bands = [_frequency_band(c, *band) for band in ((3, 4), (5, 6), (7, 8), (9, 14))]
    wanted = np.concatenate([c[:28], bands]).reshape(32, -1).T
    rows = np.sqrt(weights)[:, None]
    size = design.shape[1]
    strength = np.sqrt(1e-3 * ((rows * design) ** 2).sum(0).mean())
    penalty = strength * np.diag([1.0] * (size - 1) + [0.0])
    known, sought = np.vstack([rows * design, penalty]), np.vstack([rows * wanted, np.zeros((size, 32))])
    left = wanted - design @ np.linalg.lstsq(known, sought, rcond=None)[0]
    return (left / (np.sqrt((left**2).mean(0)) + 1e-3)).T


def _auc(inside: Tensor, outside: Tensor) -> float:
    """Chance that a cell inside has the larger value."""
    return float((inside[:, None] > outside[None]).float().mean())


def _split(plane: Tensor) -> tuple[Tensor, Tensor]:
    region = torch.zeros_like(plane, dtype=torch.bool)
    region[CELLS] = True
    return plane[region], plane[~region]


@pytest.mark.parametrize(("which", "by_hand"), [(0, _spectral), (1, _smooth)], ids=["spectral", "smooth"])
def test_residuals_are_those_of_a_weighted_ridge_regression(
    which: int, by_hand: Callable[[np.ndarray], list[np.ndarray]]
) -> None:
    cells = forensic_statistics(_brighter_to_the_right(0, extra=9.0)).cells
    c = cells[0].double().numpy()
    first = _least_squares(c, by_hand(c), np.ones(c[0].size))
    squares = first.reshape(32, c.shape[1] // 4, 4, c.shape[2] // 4, 4).mean(axis=(2, 4))
    misfit = (squares**2).mean(0).repeat(4, axis=0).repeat(4, axis=1)
    expected = _least_squares(c, by_hand(c), 1 / (1 + misfit / misfit.mean()).ravel()).clip(-4, 4)
    found = content_residuals(cells)[0, 32 * which : 32 * (which + 1)].flatten(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=5e-3)


def test_noise_that_grows_with_brightness_is_explained_and_further_noise_is_not() -> None:
    filter_ = 10  # SRM's 3x3 square
    untouched, noisier = (forensic_statistics(_brighter_to_the_right(2, extra=extra)).cells for extra in (0.0, 4.0))
    brightness = untouched[0, 28:31].mean(0).flatten()
    for first in (0, 32):
        left = content_residuals(untouched)[0, first + filter_].flatten()
        assert abs(np.corrcoef(left, brightness)[0, 1]) < 0.05
    assert np.corrcoef(untouched[0, filter_].flatten(), brightness)[0, 1] > 0.5
    raw, left = noisier[:, filter_ : filter_ + 1], content_residuals(noisier)[:, 32 + filter_ : 33 + filter_]
    auc = {name: _auc(*_split(local_mean(maps, 5)[0, 0])) for name, maps in (("raw", raw), ("left", left))}
    assert auc["left"] > 0.95
    assert auc["left"] > auc["raw"] + 0.05


def test_outliers_are_where_the_picture_was_smoothed() -> None:
    picture = _brighter_to_the_right(6)
    changed = picture[0].permute(1, 2, 0).numpy().copy()
    changed[REGION] = cv2.GaussianBlur(changed, (0, 0), 1.0)[REGION]
    smoothed = torch.from_numpy(changed).permute(2, 0, 1)[None].round()
    auc = [
        [_auc(*_split(distance)) for distance in content_residuals(forensic_statistics(image).cells)[0, 64:]]
        for image in (picture, smoothed)
    ]
    assert max(auc[0]) < 0.7
    assert max(auc[1]) > 0.93


def test_outlier_distance_is_the_mahalanobis_distance_from_the_majority() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((3, 3))
    points = rng.standard_normal((3, 4000))
    points[:, :400] += 12  # a tenth of the places lies elsewhere
    found = 2 * outlier_distance(torch.from_numpy(mixing @ points).float().view(1, 3, 40, 100)).flatten().numpy()
    expected = (points**2).sum(0)
    expected = np.log(expected / np.median(expected)).clip(np.log(1e-3), np.log(1e3))
    assert found[:400].min() > 3 > found[400:].max() - 1
    assert np.corrcoef(found[400:], expected[400:])[0, 1] > 0.97


def test_a_flat_picture_has_nothing_to_explain() -> None:
    maps = content_residuals(forensic_statistics(torch.full((1, 3, 64, 64), 77.0)).cells)
    assert (maps[:, :64].abs() < 1e-3).all()
    assert maps.isfinite().all()


def test_a_picture_is_explained_by_itself_alone_and_in_full_precision() -> None:
    cells = forensic_statistics(torch.cat([_brighter_to_the_right(3), _brighter_to_the_right(4, gain=0.2)])).cells
    with torch.autocast("cpu", torch.bfloat16):
        both = content_residuals(cells)
    assert both.dtype == torch.float32
    assert both.shape == (2, RESIDUAL_CHANNELS, 48, 56)
    assert both.abs().max() <= 4
    for alone, found in zip(cells, both, strict=True):
        torch.testing.assert_close(content_residuals(alone[None])[0], found, rtol=1e-4, atol=1e-4)


def test_the_stream_reads_them_only_when_made_so() -> None:
    torch.manual_seed(0)
    settings = {"enabled": True, "channels": 8, "widths": [8, 8, 16]}
    plain = NoiseResidualStream(NoiseResidualConfig(**settings))
    stream = NoiseResidualStream(NoiseResidualConfig(**settings, content_residuals=True))
    new = set(stream.state_dict()) - set(plain.state_dict())
    assert {name.split(".")[0] for name in new} == {"content"}
    stream.load_state_dict(plain.state_dict(), strict=False)
    pictures = torch.cat([_brighter_to_the_right(5), _brighter_to_the_right(5, extra=9.0)])
    with torch.no_grad():
        difference = (stream.forward_batch(pictures) - plain.forward_batch(pictures)).abs().mean()
    assert difference > 1e-3
    stream.forward_batch(pictures).square().mean().backward()
    assert all(parameter.grad is not None for parameter in stream.content.parameters())
