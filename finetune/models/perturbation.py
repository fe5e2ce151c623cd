"""Changes to what the vision tower gives, in units of its own size; adversarial training looks for the worst ones.

Only addition: which offsets are looked for, and how large they may be, is `finetune.training.adversarial`'s part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


class VisionOffsets(NamedTuple):
    """What is added to the tower's outputs, 1 = their root mean square over the image.

    embeds: (T, D) for the image tokens of the N images one after another, in the order of the merged output.
    patches: for each of `heads.vision_layers` (P, C), in the tower's own order of patches.
    """

    embeds: Tensor
    patches: tuple[Tensor, ...]


def add_offsets(
    vision: BaseModelOutputWithPooling,
    offsets: VisionOffsets,
    image_grid_thw: Tensor,
    blocks: Sequence[int],
    merge_size: int,
) -> BaseModelOutputWithPooling:
    """The tower's output with offsets added to the image tokens and to the patches of `blocks`.

    Args:
        blocks: indices into the tower's blocks, one for each of `offsets.patches`.
    """
    sizes = image_grid_thw.prod(dim=1).tolist()
    hidden = list(vision.hidden_states)
    for block, change in zip(blocks, offsets.patches, strict=True):
        place = block % (len(hidden) - 1) + 1  # index 0 is the patch embedding
        hidden[place] = hidden[place] + _sized(hidden[place], change, sizes)
    embeds = torch.cat(list(vision.pooler_output))  # (T, D)
    tokens = [size // merge_size**2 for size in sizes]
    embeds = embeds + _sized(embeds, offsets.embeds, tokens)
    return BaseModelOutputWithPooling(
        last_hidden_state=vision.last_hidden_state,
        pooler_output=tuple(embeds.split(tokens)),
        hidden_states=tuple(hidden),
    )


def _sized(values: Tensor, change: Tensor, sizes: Sequence[int]) -> Tensor:
    """`change` times the root mean square of each image's `values`, in their dtype."""
    parts = zip(values.detach().float().split(sizes), change.split(sizes), strict=True)
    return torch.cat([part * value.square().mean().sqrt() for value, part in parts]).to(values.dtype)
