"""Patches of equal levels: against counting them one by one, on camera pictures, fills, patterns, after compression."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.config import NoiseResidualConfig
from finetune.data.synthesis.degradations import jpeg_round_trip
from finetune.data.synthesis.operations.patch_fill import patch_fill
from finetune.models.exact_repeats import MOST_COPIES, REPEAT_CHANNELS, SIDE, exact_repeats
from finetune.models.noise_residual import NoiseResidualStream


def _noisy(height: int = 96, width: int = 128, seed: int = 0, sigma: float = 2.0, channels: int = 3) -> np.ndarray:
    """A smooth scene as a sensor sees it; grey ones have three equal channels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    scene = 120 + 50 * np.sin(x / 17)[..., None] * np.cos(y / 23)[..., None]
    levels = scene + rng.normal(0, sigma, (height, width, channels))
    return np.broadcast_to(levels, (height, width, 3)).round().clip(0, 255).astype(np.uint8)


def _maps(image: np.ndarray) -> Tensor:
    return exact_repeats(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float())[0]


def _counted(image: np.ndarray) -> np.ndarray:
    """The same two maps, patch by patch."""
    height, width = image.shape[:2]
    corners = [(y, x) for y in range(height - SIDE + 1) for x in range(width - SIDE + 1)]
    patches = {(y, x): image[y : y + SIDE, x : x + SIDE] for y, x in corners}
    count = Counter(patch.tobytes() for patch in patches.values())
    pixels = np.zeros((2, height, width))
    for (y, x), patch in patches.items():
        times = count[patch.tobytes()]
        if times > 1 and patch.reshape(-1, 3).astype(np.float64).var(axis=0).mean() > 0.64:
            pixels[int(times > MOST_COPIES), y : y + SIDE, x : x + SIDE] = 1
    return pixels.reshape(2, height // 4, 4, width // 4, 4).mean(axis=(2, 4))


@pytest.mark.parametrize("levels", [2, 3, 256])
def test_they_are_what_counting_finds(levels: int) -> None:
    """Two levels in one colour agree often by chance, 256 never; and one patch is copied four, another eight times."""
    rng = np.random.default_rng(levels)
    image = rng.integers(0, levels, (48, 64, 3)).astype(np.uint8)
    if levels < 4:
        image[..., 0] *= 40
        image[..., 1:] = 90
    for piece, times in ((image[3:9, 5:12].copy(), 4), (image[30:35, 40:45].copy(), 8)):
        for _ in range(times):
            y, x = int(rng.integers(0, 42)), int(rng.integers(0, 57))
            image[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
    found = _maps(image)
    assert found.shape == (REPEAT_CHANNELS, 12, 16)
    np.testing.assert_allclose(found.numpy(), _counted(image), atol=1e-6)
    assert found[0].sum() > 0


@pytest.mark.parametrize("sigma", [0.6, 2.0, 6.0])
def test_a_camera_picture_has_none(sigma: float) -> None:
    assert all(_maps(_noisy(224, 224, seed, sigma)).abs().max() == 0 for seed in range(3))
    assert _maps(_noisy(224, 224, sigma=max(sigma, 1.0), channels=1)).mean() < 1e-3  # a third of the levels to agree on


def test_a_copied_piece_shows_at_both_places() -> None:
    image = _noisy()
    image[40:64, 80:112] = image[8:32, 16:48]
    found = _maps(image)[0]
    expected = torch.zeros_like(found)
    expected[10:16, 20:28] = expected[2:8, 4:12] = 1
    assert torch.equal(found, expected)


def test_content_aware_fill_leaves_them_until_it_is_compressed() -> None:
    image, hole = _noisy(112, 112, seed=4), np.zeros((112, 112), dtype=bool)
    hole[40:76, 32:72] = True
    filled = patch_fill(image, hole, np.random.default_rng(0))
    inside = torch.from_numpy(hole.reshape(28, 4, 28, 4).all(axis=(1, 3)))
    assert _maps(image).max() == 0
    assert _maps(filled)[0][inside].mean() > 0.15
    assert _maps(jpeg_round_trip(filled, 95))[0][inside].mean() < 0.05


def test_flat_places_say_nothing_and_patterns_are_apart() -> None:
    flat = np.full((32, 32, 3), 255, dtype=np.uint8)
    flat[:16] = 12
    flat[:16, ::2] += 1  # a variance of 1/4
    assert _maps(flat)[:, 1:3].abs().max() == 0
    board = np.where(np.indices((64, 64)).sum(axis=0) % 6 < 3, 40, 200)[..., None].repeat(3, axis=2).astype(np.uint8)
    seldom, often = _maps(board)
    assert (seldom[1:-1, 1:-1].max(), often.min()) == (0, 1)


def test_images_of_a_batch_do_not_meet() -> None:
    a, b = (torch.from_numpy(_noisy(seed=seed)).permute(2, 0, 1).float() for seed in (1, 2))
    b[:, 20:40, 20:40] = a[:, 20:40, 20:40]
    assert exact_repeats(torch.stack([a, b])).max() == 0
    a[:, 60:80, 20:40] = a[:, 20:40, 20:40]
    both = exact_repeats(torch.stack([a, b]))
    assert both[0].sum() > 0 == both[1].sum()
    assert torch.equal(both, exact_repeats(torch.stack([a, b]) + 0.2))  # levels come back from normalised pixels
    assert torch.equal(exact_repeats(a[None].bfloat16().float()), exact_repeats(a[None].bfloat16()))


def test_the_stream_reads_them_only_when_made_so() -> None:
    torch.manual_seed(0)
    settings = {"enabled": True, "channels": 8, "widths": [8, 8, 16]}
    plain = NoiseResidualStream(NoiseResidualConfig(**settings))
    stream = NoiseResidualStream(NoiseResidualConfig(**settings, exact_repeats=True))
    assert {name.split(".")[0] for name in set(stream.state_dict()) - set(plain.state_dict())} == {"repeats"}
    stream.load_state_dict(plain.state_dict(), strict=False)
    image = _noisy(seed=7)
    image[40:64, 80:112] = image[8:32, 16:48]
    picture = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    found = {}
    with torch.no_grad():
        for name, value in (("with", 1.0), ("without", 0.0)):
            stream.repeats.fine[0].weight.fill_(0).view(-1)[0] = value
            stream.repeats.coarse.weight.fill_(0)
            found[name] = stream.forward_batch(picture)
    assert (found["with"] - found["without"])[..., 10:16, 20:28].abs().mean() > 1e-4
