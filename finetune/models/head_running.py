"""Running the heads of the forensic model: what they read is found and brought into their form, their outputs sized.

A mixin without parameters of its own; the modules it runs are built by `finetune.models.head_building`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from finetune.models.configuration import QwenForensicsOutput
from finetune.models.features import (
    TokenRuns,
    count_images,
    cropped,
    gather_states,
    images_from_patches,
    locate_runs,
    tower_to_raster,
)
from finetune.models.head_building import HeadBuilder
from finetune.models.heads import evidence_size, pool_evidence
from finetune.models.perturbation import VisionOffsets, add_offsets
from finetune.models.region_features import pool_regions, spread
from finetune.models.resizing import resize_bilinear


class Seen(NamedTuple):
    """What heads read of N images.

    vision: the tower's output, None where stored maps replace it. stream: N noise-residual maps, None without it.
    grid_thw, content_thw: (N, 3) patches of the images as they are given, and without their padding, of which neither
    `stream` nor `maps` has any. maps: stored maps of the tower's blocks, None where `vision` is to be read.
    """

    vision: BaseModelOutputWithPooling | None
    stream: list[Tensor] | None
    grid_thw: Tensor
    content_thw: Tensor
    maps: Sequence[Sequence[Tensor]] | None = None


class HeadRunner(HeadBuilder):
    """The steps of `forward` that concern the heads."""

    model: Any

    def _see(
        self,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor,
        maps: Sequence[Sequence[Tensor]] | None,
        offsets: VisionOffsets | None,
        content_sizes_hw: Sequence[tuple[int, int]] | None,
    ) -> Seen:
        """Vision tower, unless its maps are given, and noise-residual stream."""
        content = self._content_grid(image_grid_thw, content_sizes_hw)
        stream = None if pixel_values is None else self._residual_features(pixel_values, image_grid_thw, content)
        if maps is not None or pixel_values is None:
            return Seen(None, stream, image_grid_thw, content, maps)
        vision = self._encode_images(pixel_values, image_grid_thw)
        if offsets is not None:
            merge = self.config.vision_config.spatial_merge_size
            vision = add_offsets(vision, offsets, image_grid_thw, self.heads_config.vision_layers, merge)
        return Seen(vision, stream, image_grid_thw, content)

    def _content_grid(self, image_grid_thw: Tensor, sizes_hw: Sequence[tuple[int, int]] | None) -> Tensor:
        """(N, 3) patches of each image without padding; `sizes_hw` in pixels, None where there is none."""
        if sizes_hw is None:
            return image_grid_thw
        patch = self.config.vision_config.patch_size
        return image_grid_thw.new_tensor([(1, height // patch, width // patch) for height, width in sizes_hw])

    def _add_regions(
        self,
        inputs_embeds: Tensor,
        image: BaseModelOutputWithPooling,
        input_ids: Tensor,
        image_grid_thw: Tensor,
        boxes_xyxy: Tensor,
        region_index: Tensor,
    ) -> Tensor:
        """Embeddings (B, T, D) with what the tower saw in each region added to the tokens that name it.

        Args:
            boxes_xyxy: (B, R, 4) in pixels of the processed image, zeros where a sample has fewer; a sample with
                regions has one image. region_index: (B, T), see `region_features.spread`.
        """
        vision = self.config.vision_config
        merge, counts = vision.spatial_merge_size, self._images_per_row(input_ids)
        rows, first = [], 0
        for count, boxes in zip(counts, boxes_xyxy, strict=True):
            if count:
                _, h, w = (int(side) for side in image_grid_thw[first])
                tokens = image.pooler_output[first]
                rows.append(pool_regions(tokens, boxes, (h // merge, w // merge), merge * vision.patch_size))
            else:
                rows.append(boxes.new_zeros(len(boxes), 2 * inputs_embeds.shape[-1]))
            first += count
        pooled = torch.stack(rows)  # (B, R, 2 D)
        return inputs_embeds + spread(self.region_projection(pooled), region_index).to(inputs_embeds.dtype)

    def _images_per_row(self, input_ids: Tensor) -> list[int]:
        return count_images(input_ids, self.config.vision_start_token_id, self.config.image_token_id)

    def _encode_images(
        self, pixel_values: Tensor, image_grid_thw: Tensor, *, keeps_blocks: bool = True
    ) -> BaseModelOutputWithPooling:
        """Vision tower with the hidden states of every block; without a graph while all of it is frozen."""
        needs_graph = pixel_values.requires_grad or any(p.requires_grad for p in self.model.visual.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph):
            vision: BaseModelOutputWithPooling = self.model.get_image_features(
                pixel_values, image_grid_thw, output_hidden_states=keeps_blocks, return_dict=True
            )
        return vision

    def _find_runs(self, input_ids: Tensor | None, pixel_values: Tensor | None) -> tuple[TokenRuns, TokenRuns] | None:
        """Runs of cls and of mask tokens, or None where the heads have nothing to read."""
        config = self.config
        if not self.has_heads or input_ids is None or pixel_values is None:
            return None
        if not config.cls_token_ids or not config.mask_token_ids:
            return None
        images = self._images_per_row(input_ids)
        return (
            locate_runs(input_ids, config.cls_token_ids, images),
            locate_runs(input_ids, config.mask_token_ids, images),
        )

    def _residual_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, content_thw: Tensor
    ) -> list[Tensor] | None:
        if not hasattr(self, "noise_residual"):
            return None
        vision = self.config.vision_config
        images = images_from_patches(
            pixel_values,
            image_grid_thw,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            mean=self.config.image_mean,
            std=self.config.image_std,
        )
        return self.noise_residual(cropped(images, (content_thw[:, 1:] * vision.patch_size).tolist()))

    def _add_stream(self, vision: BaseModelOutputWithPooling, seen: Seen) -> BaseModelOutputWithPooling:
        """The image tokens the language model reads, with the pooled noise stream added where that is switched on."""
        if seen.stream is None or not hasattr(self, "stream_to_language"):
            return vision
        merge = self.config.vision_config.spatial_merge_size
        grids = zip((seen.grid_thw // merge).tolist(), (seen.content_thw // merge).tolist(), strict=True)
        tokens = []
        for embeds, features, grid in zip(vision.pooler_output, seen.stream, grids, strict=True):
            (_, full_h, full_w), (_, h, w) = grid
            pooled = F.adaptive_avg_pool2d(features, (h, w))  # (S, h, w)
            pooled = F.pad(pooled, (0, full_w - w, 0, full_h - h)).flatten(1).t()  # (full_h * full_w, S)
            tokens.append(embeds + self.stream_to_language(pooled).to(embeds.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=vision.last_hidden_state, pooler_output=tuple(tokens))

    def _run_heads(
        self,
        result: QwenForensicsOutput,
        outputs: Any,
        seen: Seen,
        runs: tuple[TokenRuns, TokenRuns],
        mask_sizes_hw: Sequence[tuple[int, int]] | None,
    ) -> None:
        assert seen.vision is not None
        cls_runs, mask_runs = runs
        maps: list[Tensor] = []
        if len(mask_runs.image):  # 5
            images = mask_runs.image.tolist()
            patches = self._patch_maps(seen.vision, seen.grid_thw, seen.content_thw)
            decoded = self.mask_head(
                self._token_states(outputs, mask_runs),
                [[layer[i] for i in images] for layer in patches],
                None if seen.stream is None else [seen.stream[i] for i in images],
            )
            maps = decoded.logits
            result.mask_logits = [
                self._at_size(m, i, seen.content_thw, mask_sizes_hw) for m, i in zip(maps, images, strict=True)
            ]
            result.mask_features = decoded.features
            result.operation_logits = self._operation_maps(decoded.features)
            result.mask_image_index = mask_runs.image
        if len(cls_runs.image):  # 6
            evidence = None
            if self.heads_config.cls_uses_mask:
                evidence = self._evidence(cls_runs, mask_runs, maps, result.mask_features)
            states = self._token_states(outputs, cls_runs)
            evidence = None if evidence is None else evidence.to(states.dtype)  # DeepSpeed casts the heads too
            result.cls_logits, result.image_features = self.cls_head(states, evidence)
            result.cls_image_index = cls_runs.image

    def _operation_maps(self, features: list[Tensor]) -> list[Tensor] | None:
        return self.operation_head.maps(features) if hasattr(self, "operation_head") else None

    def _evidence(
        self, cls_runs: TokenRuns, mask_runs: TokenRuns, maps: list[Tensor], features: list[Tensor] | None
    ) -> Tensor:
        """Evidence rows for the images with cls tokens; zeros for those without mask tokens."""
        width = evidence_size(self.mask_head.num_features)
        rows = torch.zeros(len(cls_runs.image), width, device=cls_runs.image.device)
        if not maps or features is None:
            return rows
        pooled = pool_evidence(maps, features).float()  # (M_m, E)
        row_of = {image: row for row, image in enumerate(cls_runs.image.tolist())}
        pairs = [(row_of[image], m) for m, image in enumerate(mask_runs.image.tolist()) if image in row_of]
        if not pairs:
            return rows
        targets, sources = (torch.tensor(side, device=rows.device) for side in zip(*pairs, strict=True))
        return rows.index_copy(0, targets, pooled[sources])

    def _token_states(self, outputs: Any, runs: TokenRuns) -> Tensor:
        """States (M, n, D) from the configured layer, in the heads' dtype."""
        layer = self.heads_config.layer
        if layer == "last":
            states = gather_states(outputs[0], runs)
        elif layer == "weighted":
            stacked = torch.stack([gather_states(h, runs) for h in outputs.hidden_states])  # (L + 1, M, n, D)
            weights = self.layer_mix.weight.flatten().softmax(dim=0)
            states = torch.einsum("l,lmnd->mnd", weights, stacked.to(weights.dtype))
        else:
            states = gather_states(outputs.hidden_states[int(layer)], runs)
        return states.to(self.cls_head.out.weight.dtype)

    def _patch_maps(
        self, vision: BaseModelOutputWithPooling, image_grid_thw: Tensor, content_thw: Tensor
    ) -> list[list[Tensor]]:
        """For each configured tower layer the N maps (C, h, w) of its output, in raster order, without padding."""
        config = self.config.vision_config
        depth, sizes = config.depth, content_thw[:, 1:].tolist()
        layers = (
            tower_to_raster(
                vision.hidden_states[block % depth + 1],  # index 0 is the patch embedding
                image_grid_thw,
                merge_size=config.spatial_merge_size,
                window_size=config.window_size,
                patch_size=config.patch_size,
            )
            for block in self.heads_config.vision_layers
        )
        return [cropped(maps, sizes) for maps in layers]

    def _at_size(
        self, logits: Tensor, image: int, content_thw: Tensor, sizes_hw: Sequence[tuple[int, int]] | None
    ) -> Tensor:
        """A logit map at the size asked for; with `mask_sigmoid` the interpolation runs on scores instead of logits."""
        patch = self.config.vision_config.patch_size
        size = sizes_hw[image] if sizes_hw is not None else tuple((content_thw[image, 1:] * patch).tolist())
        values = logits.float().sigmoid() if self.heads_config.mask_sigmoid else logits.float()
        values = resize_bilinear(values[None, None], size)[0, 0]
        return torch.logit(values, eps=1e-6) if self.heads_config.mask_sigmoid else values

    def _branch_anchor(self, result: QwenForensicsOutput, uses_vision: bool) -> Tensor:
        """0 with a gradient path to every trainable parameter that this batch may have left out of the graph.

        Args:
            uses_vision: all of the vision tower was used; heads on the tower use neither its last norm and projector
                nor blocks behind the last one they read.
        """
        parameters = [p for module in self.head_modules() for p in module.parameters()]
        if not uses_vision:
            parameters += list(self.model.visual.parameters())
        output = result.logits if result.logits is not None else result.cls_logits
        assert output is not None
        trained = [p for p in parameters if p.requires_grad and not hasattr(p, "ds_id")]  # ZeRO-3 left empty shells
        anchor: Tensor = _Anchor.apply(output, *trained)
        return anchor


class _Anchor(torch.autograd.Function):
    """0, with gradients of 0 for all inputs; as `sum(x.sum() * 0 for x in inputs)`, in a fraction of the calls."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.kinds = [(x.shape, x.dtype, x.device) for x in inputs]  # not the tensors: sharding may replace their memory
        return inputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.kinds)
