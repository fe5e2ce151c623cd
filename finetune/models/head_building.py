"""Building and initialising the heads of the forensic model, from the configuration and from a seed of their own.

A mixin without a `forward`: running the heads is `finetune.models.head_running`'s part.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from finetune.config import HeadsConfig
from finetune.models.configuration import HEAD_MODULES, QwenForensicsConfig, check_heads
from finetune.models.heads import HEADS, ClsHead, OperationHead, evidence_size
from finetune.models.neck import NUM_POOLED, FusionNeck
from finetune.models.noise_residual import NoiseResidualStream
from finetune.models.region_features import RegionProjection


class HeadBuilder(nn.Module):
    """What the model class needs to own heads; they are attributes of the model itself, named in `HEAD_MODULES`."""

    config: QwenForensicsConfig

    def replace_heads(self, settings: Mapping[str, Any]) -> None:
        """Drop the heads and build those that `settings` describe, new from their seed; nothing else changes.

        Args:
            settings: fields of `QwenForensicsConfig`, such as `heads`, `cls_token_ids` and `mask_token_ids`.
        """
        for name in HEAD_MODULES:
            if hasattr(self, name):
                delattr(self, name)
        for key, value in settings.items():
            setattr(self.config, key, value)
        for ids, count in (("cls_token_ids", "num_cls"), ("mask_token_ids", "num_mask")):
            if getattr(self.config, ids):
                setattr(self.config, count, len(getattr(self.config, ids)))
        self._set_heads()

    def _set_heads(self) -> None:
        heads = self.config.heads_config
        self.heads_config = heads
        self.has_heads = heads.enabled
        check_heads(self.config)
        if heads.enabled:
            self._build_heads(heads)
        if self.config.region_features:
            self.region_projection = RegionProjection(self.config.text_config.hidden_size)
        if self.head_modules() and next(self.parameters()).device.type != "meta":
            self.init_heads()

    def _build_heads(self, heads: HeadsConfig) -> None:
        text, residual = self.config.text_config, heads.noise_residual
        stream_channels = residual.channels if residual.enabled else 0
        if heads.source == "vision":
            self._build_on_tower(heads, stream_channels)
        else:
            self.mask_head = HEADS[heads.mask](
                heads, text.hidden_size, self.config.vision_config.hidden_size, self.config.num_mask, stream_channels
            )
            self.cls_head = ClsHead(heads, text.hidden_size, self.config.num_cls, self._evidence_size(heads))
        if heads.operations and heads.mask != "none":
            self.operation_head = OperationHead(self.mask_head.num_features, len(heads.operations))
        if residual.enabled:
            self.noise_residual = NoiseResidualStream(residual)
            if residual.to_language:
                self.stream_to_language = nn.Linear(stream_channels, text.hidden_size)
        if heads.layer == "weighted":
            self.layer_mix = nn.Linear(text.num_hidden_layers + 1, 1, bias=False)

    def _build_on_tower(self, heads: HeadsConfig, stream_channels: int) -> None:
        """Neck, mask head on the neck's map with learned queries, image head on the neck's pooled states."""
        width = heads.hidden_size
        self.neck = FusionNeck(heads, self.config.vision_config.hidden_size, stream_channels)
        if heads.mask != "none":
            fused = replace(heads, vision_layers=[-1])  # one map, whatever the neck made it from
            self.mask_head = HEADS[heads.mask](fused, width, width, heads.num_queries, stream_channels)
            self.mask_queries = nn.Embedding(heads.num_queries, width)
        self.cls_head = ClsHead(heads, width, NUM_POOLED, self._evidence_size(heads))

    def _evidence_size(self, heads: HeadsConfig) -> int:
        has_evidence = heads.cls_uses_mask and heads.mask != "none"
        return evidence_size(self.mask_head.num_features) if has_evidence else 0

    def init_heads(self, names: Collection[str] = HEAD_MODULES) -> None:
        """(Re-)initialise the heads of these names from `heads.seed`, leaving the global RNG untouched."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.heads_config.seed)
            for name, module in self._own_modules():
                if name not in names:
                    continue
                for part in module.modules():
                    reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
                    if reset is not None:
                        reset()
                if name == "layer_mix":
                    module.weight.zero_()  # softmax of zeros: plain mean of the layers
                elif name == "stream_to_language":
                    module.weight.zero_()
                    module.bias.zero_()
                elif isinstance(module, RegionProjection):
                    module.zero_output()

    def head_modules(self) -> list[nn.Module]:
        """The modules this class adds, in a fixed order."""
        return [module for _, module in self._own_modules()]

    def _own_modules(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in HEAD_MODULES if hasattr(self, name)]
