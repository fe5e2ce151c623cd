"""Heads on the vision tower alone (`heads.source: vision`): every image gets a score and a map, no text is needed.

Learned queries stand where mask tokens stand otherwise, the pooled map of the neck where `<cls>` stands; the heads
themselves are the same. `VisionOnlyModel` is Qwen2.5-VL without its language model, for runs that never read any text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
)

from finetune.errors import ConfigError
from finetune.models.configuration import QwenForensicsConfig, QwenForensicsOutput
from finetune.models.head_running import HeadRunner, Seen
from finetune.models.heads import pool_evidence

NO_LANGUAGE = (
    "the language model was left out of this model, so it can neither read nor write text; load it with "
    "model.language: load"
)


class VisionOnlyModel(Qwen2_5_VLModel):
    """The inner model with its vision tower (`visual`, under the released names) and without `language_model`."""

    def __init__(self, config: QwenForensicsConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.rope_deltas = None
        self.post_init()


class VisionHeadRunner(HeadRunner):
    """The steps of `forward` that concern heads on the tower."""

    @property
    def reads_tower(self) -> bool:
        """Whether the heads need the vision tower alone."""
        return bool(self.has_heads and self.heads_config.source == "vision")

    def tower_maps(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        content_sizes_hw: Sequence[tuple[int, int]] | None = None,
    ) -> list[list[Tensor]]:
        """What the heads read of the tower; may be stored and given back as `forward(tower_maps=...)`.

        Args:
            pixel_values: (P, 1176) patches. image_grid_thw: (N, 3), both as the processor gives them.
            content_sizes_hw: as `forward` takes them.

        Returns:
            For each of `heads.vision_layers` the N maps (C, h, w) of that block's output, without padding, in raster
            order and in the tower's dtype; without a graph where the tower is frozen.
        """
        content = self._content_grid(image_grid_thw, content_sizes_hw)
        return self._patch_maps(self._encode_images(pixel_values, image_grid_thw), image_grid_thw, content)

    def _check_inputs(
        self, has_text: bool, pixel_values: Tensor | None, maps: Sequence[Sequence[Tensor]] | None
    ) -> None:
        """Refuse what no step could work with.

        Raises:
            ConfigError: text for a model without its language model.
            ValueError: stored maps where they cannot be used, or nothing to look at.
        """
        if has_text and not self.config.has_language:
            raise ConfigError(NO_LANGUAGE)
        if maps is not None:
            if not self.reads_tower or has_text:
                raise ValueError("tower_maps go with heads.source: vision and without text")
            if hasattr(self, "noise_residual") and pixel_values is None:
                raise ValueError("tower_maps without pixel_values, which the noise-residual stream reads")
        elif self.reads_tower and not has_text and pixel_values is None:
            raise ValueError("neither images nor text: give pixel_values and image_grid_thw, or tower_maps")

    def _run_on_tower(
        self,
        result: QwenForensicsOutput,
        seen: Seen,
        mask_sizes_hw: Sequence[tuple[int, int]] | None,
    ) -> None:
        """Neck, masks, then image scores, for each of the N images that were seen."""
        count = len(seen.grid_thw)
        everyone = torch.arange(count, device=seen.grid_thw.device)
        maps = seen.maps
        if seen.vision is not None:
            maps = self._patch_maps(seen.vision, seen.grid_thw, seen.content_thw)
        fused, states = self.neck(maps, seen.stream)  # N x (d, h, w), (N, 3, d)
        evidence = None
        if hasattr(self, "mask_head"):
            places = torch.arange(self.heads_config.num_queries, device=states.device)
            queries = self.mask_queries(places).expand(count, -1, -1)  # (N, n, d)
            decoded = self.mask_head(queries, [fused], seen.stream)
            result.mask_logits = [
                self._at_size(m, i, seen.content_thw, mask_sizes_hw) for i, m in enumerate(decoded.logits)
            ]
            result.mask_features = decoded.features
            result.operation_logits = self._operation_maps(decoded.features)
            result.mask_image_index = everyone
            if self.heads_config.cls_uses_mask:
                evidence = pool_evidence(decoded.logits, decoded.features).to(states.dtype)  # (N, E)
        result.cls_logits, result.image_features = self.cls_head(states, evidence)
        result.cls_image_index = everyone
