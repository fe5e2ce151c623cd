"""A copied piece lights up wherever it is and however it was turned; a texture without a copy does not; the stream with
these maps is an addition that old models do without."""

import cv2
import numpy as np
import pytest
import torch

from finetune.config import NoiseResidualConfig, RunConfig
from finetune.models.copied_regions import copied_regions, find_copies
from finetune.models.noise_residual import NoiseResidualStream
from finetune.models.self_similarity import (
    MAX_PIXELS,
    SIMILARITY_CHANNELS,
    _row_maxima,
    agreement,
    self_similarity,
)
from finetune.training.checks import run_problems

SOURCE = np.s_[30:90, 20:80]
TARGET_CENTRE = (160, 150)  # x, y


def _texture(seed: int, height: int = 224, width: int = 224) -> np.ndarray:
    """(H, W, 3) uint8: blobs of several sizes with camera-like noise, no place twice."""
    rng = np.random.default_rng(seed)
    levels = np.full((height, width), 128.0, np.float32)
    for sigma, contrast in ((1.5, 12), (4, 25), (12, 25)):
        field = cv2.GaussianBlur(rng.standard_normal((height, width), dtype=np.float32), (0, 0), sigma)
        levels += contrast * field / field.std()
    levels = levels + rng.normal(0, 2, levels.shape)
    return np.repeat(np.clip(levels, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _with_copy(
    image: np.ndarray, angle: float, scale: float, flip: bool, smooth: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The picture with `SOURCE` a second time around `TARGET_CENTRE`, and the (H, W) bool region of the copy."""
    matrix = cv2.getRotationMatrix2D((50, 60), angle, scale)
    matrix[:, 2] += np.array(TARGET_CENTRE) - (50, 60)
    if flip:
        matrix = np.vstack([matrix, [0, 0, 1]])[:2] @ np.array([[-1, 0, 100], [0, 1, 0], [0, 0, 1.0]])
    region = np.zeros(image.shape[:2], np.uint8)
    region[SOURCE] = 1
    size = image.shape[1::-1]
    moved, region = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC), cv2.warpAffine(region, matrix, size) > 0
    if smooth:
        moved = cv2.GaussianBlur(moved, (0, 0), smooth)
    return np.where(region[..., None], moved, image), region


def _inner(region: np.ndarray) -> np.ndarray:
    return cv2.erode(region.astype(np.uint8), np.ones((13, 13), np.uint8)) > 0


def _maps(image: np.ndarray) -> torch.Tensor:
    return self_similarity(torch.from_numpy(image).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("angle", "scale", "flip"), [(0, 1, False), (20, 1, False), (0, 1.3, False), (-25, 0.8, False), (10, 1.1, True)]
)
def test_turned_resized_and_mirrored_copies_light_up_with_their_source(angle: float, scale: float, flip: bool) -> None:
    image, region = _with_copy(_texture(1), angle, scale, flip)
    maps = copied_regions(image[..., 0])
    outside = ~region
    outside[SOURCE] = False
    assert maps[0][_inner(region)].mean() > 0.6
    assert maps[0][SOURCE][10:-10, 10:-10].mean() > 0.6
    assert maps[0][outside].mean() < 0.3  # of smooth blobs some resemble each other


def test_the_best_map_is_the_one_the_piece_was_moved_by() -> None:
    image, _ = _with_copy(_texture(2), 20, 1.2, False)
    matrix = find_copies(image[..., 0])[0].matrix
    expected = cv2.getRotationMatrix2D((50, 60), 20, 1.2)
    expected[:, 2] += np.array(TARGET_CENTRE) - (50, 60)
    corners = np.array([[25, 35, 1], [75, 35, 1], [50, 85, 1]], np.float64).T
    there, back = matrix @ corners, cv2.invertAffineTransform(expected) @ corners
    assert min(np.abs(there - expected @ corners).max(), np.abs(there - back).max()) < 1.5  # either direction


def test_a_texture_without_a_copy_stays_dark() -> None:
    for seed in range(4):
        maps = _maps(_texture(seed))
        assert maps[4].mean() < 0.03  # no copied region
        assert maps[2].mean() < 0.15  # hardly a neighbour agrees by chance


def test_neighbours_agree_where_pixels_were_copied() -> None:
    image, region = _with_copy(_texture(3), 0, 1, False)
    maps = _maps(image)
    inside = torch.from_numpy(_inner(region)[2::4, 2::4].copy())
    elsewhere = torch.from_numpy(~region[2::4, 2::4].copy())
    assert maps[0][inside].mean() > maps[0][elsewhere].mean() + 0.1
    assert maps[3][inside].mean() > 1.5 > 0.6 > maps[3][elsewhere].mean()


def test_the_smoothed_one_of_two_equal_places_has_less_energy() -> None:
    image, region = _with_copy(_texture(4), 0, 1, False, smooth=0.7)
    maps = copied_regions(image[..., 0])
    assert maps[2][_inner(region)].mean() < -0.1 < 0.1 < maps[2][SOURCE][10:-10, 10:-10].mean()


def test_agreement_counts_equal_neighbours() -> None:
    offsets = torch.zeros(2, 5, 5, dtype=torch.long)
    offsets[:, 0, 0] = 40
    near, far = agreement(offsets)
    assert near[2, 2] == 8
    assert far[2, 2] == 23
    assert near[0, 0] == 0
    assert near[0, 1] == 4
    assert near[4, 4] == 3


@pytest.mark.parametrize("size_hw", [(224, 224), (196, 252), (32, 32), (400, 300)])
def test_maps_have_a_quarter_of_the_size_whatever_it_is(size_hw: tuple[int, int]) -> None:
    maps = _maps(_texture(5, *size_hw))
    assert maps.shape == (SIMILARITY_CHANNELS, size_hw[0] // 4, size_hw[1] // 4)
    assert maps.dtype == torch.float32
    assert torch.isfinite(maps).all()
    assert (maps[-1] == 1).all()


def test_copies_are_found_in_pictures_larger_than_the_limit() -> None:
    image, region = _with_copy(_texture(6), 15, 1, False)
    image, region = (cv2.resize(each.astype(np.uint8), (448, 448)) for each in (image, region))
    assert image.shape[0] * image.shape[1] > MAX_PIXELS
    maps = _maps(image)
    inside = torch.from_numpy(_inner(region > 0)[2::4, 2::4].copy())
    assert maps[4][inside].mean() > 0.5


def test_a_flat_picture_repeats_nothing() -> None:
    maps = _maps(np.full((64, 64, 3), 90, np.uint8))
    assert torch.isfinite(maps).all()
    assert maps[4:8].abs().max() == 0


def _stream(**settings: object) -> NoiseResidualStream:
    torch.manual_seed(0)
    return NoiseResidualStream(NoiseResidualConfig(enabled=True, channels=8, widths=[16, 16, 32], **settings))  # type: ignore[arg-type]


def test_the_stream_without_it_has_the_parameters_of_older_models() -> None:
    without, with_it = _stream(), _stream(self_similarity=True)
    added = {name for name in with_it.state_dict() if name not in without.state_dict()}
    assert added
    assert all(name.startswith("similarity.") for name in added)


def test_the_stream_reads_the_maps_and_each_picture_alone() -> None:
    images = [
        torch.from_numpy(_texture(7, *size)).permute(2, 0, 1).float() for size in ((112, 84), (84, 112), (112, 84))
    ]
    stream = _stream(self_similarity=True).eval()
    together = stream(images)
    for image, features in zip(images, together, strict=True):
        assert features.shape == (8, image.shape[1] // 4, image.shape[2] // 4)
        torch.testing.assert_close(stream([image])[0], features)
    stream(images)[0].sum().backward()
    assert stream.similarity is not None
    gradients = {name: parameter.grad for name, parameter in stream.similarity.named_parameters()}
    assert gradients["fine.0.weight"] is not None
    assert gradients["fine.0.weight"].abs().max() > 0


def test_only_a_share_of_the_training_pictures_is_searched_and_always_the_same_ones() -> None:
    stream = _stream(self_similarity=True, similarity_share=0.5)
    images = [torch.from_numpy(_texture(seed, 32, 32)).permute(2, 0, 1).float() for seed in range(24)]
    searched = [bool(stream._search(image).any()) for image in images]
    assert 4 <= sum(searched) <= 20
    assert searched == [bool(stream._search(image).any()) for image in images]
    stream.eval()
    assert all(stream._search(image).any() for image in images)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_said_before_a_run(share: float) -> None:
    config = RunConfig()
    config.heads.noise_residual.similarity_share = share
    assert any(f"similarity_share is {share}" in problem for problem in run_problems(config))


@pytest.mark.parametrize("columns", [5, 128, 256, 300])
def test_row_maxima_are_torch_s_the_first_of_equals(columns: int) -> None:
    values = torch.randint(0, 40, (50, columns), generator=torch.Generator().manual_seed(0)).float()
    values[0] = 3.0
    score, place = _row_maxima(values)
    expected = values.numpy()
    assert torch.equal(score, values.amax(dim=1))
    assert place.tolist() == expected.argmax(axis=1).tolist()
