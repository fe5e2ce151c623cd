"""Where things are: states at the forensic tokens, vision-tower patches back in raster order, pixels back from patches.

Pure tensor bookkeeping without parameters. Tokens are found by id in `input_ids`, never by offset; the state read is
the one *at* the token. The vision tower works in window order and in merge groups (see `tower_to_raster`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index


class TokenRuns(NamedTuple):
    """Runs of forensic tokens in a batch, M in all, ordered by sample and position.

    sample: (M,) int64, row of the batch. position: (M, n) int64, column of each of the run's n tokens.
    image: (M,) int64, which image of the batch (row of `image_grid_thw`) the run belongs to.
    """

    sample: Tensor
    position: Tensor
    image: Tensor


def count_images(input_ids: Tensor, vision_start_id: int, image_token_id: int) -> list[int]:
    """Number of images in each row: `<|vision_start|>` directly followed by an image token.

    Args:
        input_ids: (B, T) int64.
    """
    starts = (input_ids[:, :-1] == vision_start_id) & (input_ids[:, 1:] == image_token_id)
    return starts.sum(dim=1).tolist()


def locate_runs(input_ids: Tensor, token_ids: Sequence[int], images_per_sample: Sequence[int]) -> TokenRuns:
    """Find every run of `token_ids` (in this order, not necessarily adjacent) and the image it belongs to.

    A row holds either no run or one per image; the k-th run belongs to the row's k-th image.

    Args:
        input_ids: (B, T) int64.
        token_ids: the n ids of one run, distinct.
        images_per_sample: number of images of each row, B values.

    Raises:
        ValueError: a row with incomplete or disordered runs, or with another number of runs than images.
    """
    n = len(token_ids)
    wanted = torch.tensor(list(token_ids), device=input_ids.device)
    samples: list[int] = []
    positions: list[Tensor] = []
    images: list[int] = []
    first_image = 0
    hits = torch.isin(input_ids, wanted)  # (B, T)
    has_any = hits.any(dim=1).tolist()
    for row, num_images in enumerate(images_per_sample):
        if has_any[row]:
            columns = hits[row].nonzero().flatten()  # (k,)
            found = input_ids[row, columns]
            if len(columns) != n * num_images or not torch.equal(found, wanted.repeat(num_images)):
                raise ValueError(
                    f"row {row} holds {len(columns)} of the tokens with ids {token_ids[0]}..{token_ids[-1]}; expected "
                    f"none, or one ordered run of {n} for each of its {num_images} images"
                )
            positions.append(columns.view(num_images, n))
            samples += [row] * num_images
            images += range(first_image, first_image + num_images)
        first_image += num_images
    device = input_ids.device
    return TokenRuns(
        torch.tensor(samples, dtype=torch.long, device=device),
        torch.cat(positions) if positions else torch.zeros(0, n, dtype=torch.long, device=device),
        torch.tensor(images, dtype=torch.long, device=device),
    )


def gather_states(hidden_states: Tensor, runs: TokenRuns) -> Tensor:
    """States at the tokens of each run: (B, T, D) -> (M, n, D)."""
    return hidden_states[runs.sample.unsqueeze(1), runs.position]


def tower_to_raster(
    hidden_states: Tensor, grid_thw: Tensor, *, merge_size: int, window_size: int, patch_size: int
) -> list[Tensor]:
    """Undo the tower's two reorderings: windows of merge groups, and the patches inside a 2x2 merge group.

    Args:
        hidden_states: (P, C) output of a tower block, all images of the batch one after another.
        grid_thw: (N, 3) int64 patches in time, height, width of each image; time is 1 for images.

    Returns:
        N tensors (C, h, w) in raster order, h and w in patches.

    Source: inverse of `transformers.vision_utils.get_vision_window_index` and `get_vision_position_ids`.
    """
    window_index, _ = get_vision_window_index(
        grid_thw, spatial_merge_size=merge_size, window_size=window_size, patch_size=patch_size
    )
    groups = hidden_states.view(-1, merge_size**2, hidden_states.shape[-1])  # (P / m^2, m^2, C)
    groups = groups[torch.argsort(window_index.to(groups.device))]
    sizes = grid_thw.prod(dim=1) // merge_size**2
    return [
        ungroup_patches(part, int(h), int(w), merge_size)
        for part, (_, h, w) in zip(groups.split(sizes.tolist()), grid_thw.tolist(), strict=True)
    ]


def ungroup_patches(groups: Tensor, height: int, width: int, merge_size: int) -> Tensor:
    """Merge groups (h*w / m^2, m^2, C) of one image -> raster (C, h, w)."""
    m = merge_size
    raster = groups.reshape(height // m, width // m, m, m, -1)  # (h/m, w/m, m, m, C)
    return raster.permute(4, 0, 2, 1, 3).reshape(-1, height, width)


def images_from_patches(
    pixel_values: Tensor,
    grid_thw: Tensor,
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Tensor]:
    """The processed images, rebuilt from the patches the processor made of them.

    Args:
        pixel_values: (P, 3 * temporal * patch^2) normalised patches in merge-group order.
        grid_thw: (N, 3) int64.
        mean, std: the processor's normalisation constants, for values in [0, 1].

    Returns:
        N float32 tensors (3, H, W), RGB in [0, 255], H = 14 h and W = 14 w.
    """
    sizes = grid_thw.prod(dim=1).tolist()
    p, m = patch_size, merge_size
    scale = torch.tensor(std, dtype=torch.float32, device=pixel_values.device).view(3, 1, 1)
    shift = torch.tensor(mean, dtype=torch.float32, device=pixel_values.device).view(3, 1, 1)
    images = []
    for patches, (_, h, w) in zip(pixel_values.split(sizes), grid_thw.tolist(), strict=True):
        first_frame = patches.view(-1, 3, temporal_patch_size, p, p)[:, :, 0].float()  # (h*w, 3, p, p)
        blocks = first_frame.view(h // m, w // m, m, m, 3, p, p)
        image = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * p, w * p)
        images.append((image * scale + shift) * 255)
    return images


def cropped(maps: Sequence[Tensor], sizes_hw: Sequence[Sequence[int]]) -> list[Tensor]:
    """The upper left (h, w) of each map (..., H, W)."""
    return [each[..., :height, :width].contiguous() for each, (height, width) in zip(maps, sizes_hw, strict=True)]


def by_shape(tensors: Sequence[Tensor], function: Callable[[Tensor, list[int]], Sequence[Tensor]]) -> list[Tensor]:
    """Apply a batched function to tensors of different shapes, one call per distinct shape, order kept.

    Args:
        function: called with the stacked tensors (k, ...) and their indices; returns k results.
    """
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in groups.values():
        results.update(zip(indices, function(torch.stack([tensors[i] for i in indices]), indices), strict=True))
    return [results[index] for index in range(len(tensors))]
