"""What the vision tower made of an image, kept for the later turns of its dialogue.

Every turn hands all images of the dialogue to the model again; the tower's answer to an image depends on that image
alone (attention does not cross images), so it is computed once. The model itself is not changed: its
`get_image_features` is answered from here while a dialogue is continued.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

NUM_IMAGES = 8
"""Images remembered at once; the one not asked for longest is forgotten first."""


class _Seen(NamedTuple):
    """One image: merged features (T, D), and the block outputs (P, C) that are read, by their place."""

    tokens: Tensor
    layers: dict[int, Tensor]


class ImageMemory:
    """Tower outputs of the images seen last.

    Args:
        base: model without wrappers, in evaluation mode; of its tower only the blocks its heads read are kept.
    """

    def __init__(self, base: Any, num_images: int = NUM_IMAGES) -> None:
        self.base, self.num_images = base, num_images
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def clear(self) -> None:
        """Forget every image."""
        self._seen.clear()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the model computes no image a second time."""
        inner = self.base.model
        inner.get_image_features = self._features
        try:
            yield
        finally:
            del inner.get_image_features  # the class's own again

    def _features(self, pixel_values: Tensor, image_grid_thw: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """As the model's `get_image_features`; `hidden_states` holds the blocks that are read, None in other places."""
        sizes = image_grid_thw.prod(dim=1).tolist()
        parts = list(zip(pixel_values.split(sizes), image_grid_thw, strict=True))
        keys = [_key(pixels, grid, self._layers()) for pixels, grid in parts]
        new = {key: part for key, part in zip(keys, parts, strict=True) if key not in self._seen}
        found = self._compute(new, options) if new else {}
        found |= {key: self._seen[key] for key in keys if key in self._seen}
        for key in keys:
            self._seen[key] = found[key]
            self._seen.move_to_end(key)
        while len(self._seen) > self.num_images:
            self._seen.popitem(last=False)
        rows = [found[key] for key in keys]
        kept = {index: torch.cat([row.layers[index] for row in rows]) for index in rows[0].layers}
        return BaseModelOutputWithPooling(
            pooler_output=tuple(row.tokens for row in rows),
            hidden_states=tuple(kept.get(index) for index in range(max(kept) + 1)) if kept else None,
        )

    def _compute(self, parts: dict[str, tuple[Tensor, Tensor]], options: dict[str, Any]) -> dict[str, _Seen]:
        pixels = torch.cat([part for part, _ in parts.values()])
        grid = torch.stack([grid for _, grid in parts.values()])
        vision = type(self.base.model).get_image_features(
            self.base.model, pixels, grid, **{**options, "output_hidden_states": True, "return_dict": True}
        )
        sizes = grid.prod(dim=1).tolist()
        layers = {index: vision.hidden_states[index].split(sizes) for index in self._layers()}
        return {
            key: _Seen(vision.pooler_output[i], {index: rows[i] for index, rows in layers.items()})
            for i, key in enumerate(parts)
        }

    def _layers(self) -> list[int]:
        """Places in `hidden_states` (0 is the patch embedding) of the blocks that the heads read."""
        if not self.base.has_heads:
            return []
        depth = self.base.config.vision_config.depth
        return sorted({block % depth + 1 for block in self.base.heads_config.vision_layers})


def _key(pixels: Tensor, grid: Tensor, layers: list[int]) -> str:
    digest = hashlib.sha256(pixels.float().cpu().contiguous().numpy().tobytes())
    digest.update(repr((grid.tolist(), layers)).encode())
    return digest.hexdigest()
