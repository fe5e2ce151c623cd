"""Patches come back at their cell and pixels at their place: odd grids, several images, every block of the tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import STREAM, collate, load, record_named, samples_of
from PIL import Image

from finetune.models.features import count_images, images_from_patches, locate_runs, tower_to_raster
from finetune.models.loading import Bundle

SIZES_HW = [(112, 252), (140, 84), (224, 196)]
"""Patches: 8x18, 10x6 and 16x14; none is a multiple of the 8-patch window in both directions."""


@pytest.fixture(scope="module")
def bundle(tied: Path) -> Bundle:
    return load(tied, noise_residual=STREAM)


def grey(size_hw: tuple[int, int], marked: tuple[int, int] | None = None) -> Image.Image:
    pixels = np.full((*size_hw, 3), 128, np.uint8)
    if marked is not None:
        y, x = 14 * marked[0], 14 * marked[1]
        pixels[y : y + 14, x : x + 14] = np.random.default_rng(0).integers(0, 256, (14, 14, 3))
    return Image.fromarray(pixels)


def block_maps(bundle: Bundle, images: list[Image.Image]) -> list[list[torch.Tensor]]:
    """For the patch embedding and each block, the images' maps (C, h, w)."""
    inputs = bundle.processor.image_processor(images=images, return_tensors="pt")
    vision = bundle.base.config.vision_config
    with torch.no_grad():
        encoded = bundle.base._encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    assert len(encoded.hidden_states) == vision.depth + 1
    return [
        tower_to_raster(
            states,
            inputs["image_grid_thw"],
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        for states in encoded.hidden_states
    ]


@pytest.mark.parametrize("image", range(len(SIZES_HW)))
def test_marked_patch_is_found_at_its_cell(bundle: Bundle, image: int) -> None:
    """Alone in the patch embedding; largest, and within its window, in the blocks before full attention."""
    rows, columns = SIZES_HW[image][0] // 14, SIZES_HW[image][1] // 14
    plain = block_maps(bundle, [grey(size) for size in SIZES_HW])
    for cell in [(0, 0), (rows - 1, columns - 1), (rows - 2, 1), (5, columns - 3)]:
        marked = block_maps(bundle, [grey(size, cell if i == image else None) for i, size in enumerate(SIZES_HW)])
        for depth in range(3):  # embedding and two windowed blocks; block 2 attends to everything
            changes = [(a - b).abs().sum(dim=0) for a, b in zip(marked[depth], plain[depth], strict=True)]
            assert [tuple(change.shape) for change in changes] == [(h // 14, w // 14) for h, w in SIZES_HW]
            assert all(float(change.max()) < 1e-4 for i, change in enumerate(changes) if i != image)
            change = changes[image]
            assert divmod(int(change.argmax()), columns) == cell
            same_window = torch.zeros(rows, columns, dtype=torch.bool)
            y, x = cell[0] // 8 * 8, cell[1] // 8 * 8
            same_window[y : y + 8, x : x + 8] = True
            assert float(change[~same_window].max()) < 1e-4
            if depth == 0:
                assert int((change > 1e-4).sum()) == 1
            else:
                assert int((change > 1e-4).sum()) > 1  # the window did mix


def test_merged_output_is_the_raster_of_the_last_block(bundle: Bundle) -> None:
    """Merging the raster maps 2x2 by 2x2 gives the tower's own output, which transformers puts in order itself."""
    images = [grey(size, (3, 2)) for size in SIZES_HW]
    inputs = bundle.processor.image_processor(images=images, return_tensors="pt")
    maps = block_maps(bundle, images)[-1]
    with torch.no_grad():
        expected = bundle.base._encode_images(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        for raster, merged in zip(maps, expected, strict=True):
            c, h, w = raster.shape
            groups = raster.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, c)
            torch.testing.assert_close(bundle.base.model.visual.merger(groups), merged, rtol=0, atol=1e-4)


def test_images_come_back_from_their_patches(bundle: Bundle) -> None:
    """Without a resize the pixels are exact to 1e-4 of a grey level, for several images of odd sizes."""
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES_HW]
    inputs = bundle.processor.image_processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")
    config = bundle.base.config
    rebuilt = images_from_patches(
        inputs["pixel_values"],
        inputs["image_grid_thw"],
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        mean=config.image_mean,
        std=config.image_std,
    )
    for found, picture in zip(rebuilt, pictures, strict=True):
        expected = torch.from_numpy(picture).permute(2, 0, 1).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_noise_stream_reads_the_same_pixels_as_the_tower(bundle: Bundle) -> None:
    """Its map is at the image's own stride and changes only around the marked patch of the right image."""
    calls: list[list[torch.Tensor]] = []
    handle = bundle.base.noise_residual.register_forward_pre_hook(lambda _m, inputs: calls.append(list(inputs[0])))
    inputs = bundle.processor.image_processor(images=[grey(s, (2, 4)) for s in SIZES_HW], return_tensors="pt")
    grid = inputs["image_grid_thw"]
    with torch.no_grad():
        maps = bundle.base._residual_features(inputs["pixel_values"], grid, grid)
    handle.remove()
    assert [tuple(m.shape[1:]) for m in maps] == [(h // 4, w // 4) for h, w in SIZES_HW]
    for image, size in zip(calls[0], SIZES_HW, strict=True):
        expected = torch.from_numpy(np.array(grey(size, (2, 4)))).permute(2, 0, 1).float()
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_our_batch_is_the_official_processor_s(bundle: Bundle, photo_records: Path, padding_side: str) -> None:
    """Same ids, token types and pixels as `Qwen2_5_VLProcessor` on the same rendered text."""
    samples = samples_of(bundle, record_named(photo_records))
    ours = collate(bundle, samples, padding_side)  # type: ignore[arg-type]
    pad = bundle.processor.image_token
    texts = []
    for sample in samples:
        text = bundle.tokenizer.decode(sample.input_ids)
        texts.append(pad.join(piece for piece in text.split(pad) if piece))
        assert texts[-1].count(pad) == len(sample.images)
    images = [image for sample in samples for image in sample.images]
    options = {"padding": True, "padding_side": padding_side, "return_mm_token_type_ids": True, "return_tensors": "pt"}
    theirs = bundle.processor(text=texts, images=images, **options)
    assert set(theirs) <= set(ours)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


def test_images_are_counted_by_their_start(bundle: Bundle) -> None:
    config = bundle.base.config
    start, pad, video = config.vision_start_token_id, config.image_token_id, config.video_token_id
    ids = torch.tensor([[start, pad, pad, 5, start, pad], [5, start, video, 5, 5, start], [pad, pad, 5, 5, 5, 5]])
    assert count_images(ids, start, pad) == [2, 0, 0]


def test_runs_belong_to_the_images_in_order() -> None:
    """Rows without runs still take up images; other tokens may stand between those of a run."""
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 0], [0, 0, 0, 0, 0, 0, 0], [0, 7, 0, 8, 0, 0, 9]])
    runs = locate_runs(ids, [7, 8, 9], [2, 3, 1])
    assert runs.sample.tolist() == [0, 0, 2]
    assert runs.position.tolist() == [[0, 1, 2], [3, 4, 5], [1, 3, 6]]
    assert runs.image.tolist() == [0, 1, 5]


@pytest.mark.parametrize(
    ("row", "num_images"),
    [([7, 0, 0, 0], 1), ([8, 7, 0, 0], 1), ([7, 8, 7, 8], 1), ([7, 8, 0, 0], 2), ([7, 7, 8, 8], 2), ([7, 8, 0, 0], 0)],
)
def test_incomplete_or_disordered_runs_are_refused(row: list[int], num_images: int) -> None:
    with pytest.raises(ValueError, match=r"row 0 holds .* expected none, or one ordered run of 2"):
        locate_runs(torch.tensor([row]), [7, 8], [num_images])
