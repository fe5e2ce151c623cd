"""Configuration and output of the forensic Qwen2.5-VL: the released one's fields plus heads and forensic token ids.

Nothing here computes; the model that reads it is `finetune.models.qwen_forensics_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

from torch import Tensor  # noqa: E402
from transformers import Qwen2_5_VLConfig  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402
from transformers.modeling_outputs import ModelOutput  # noqa: E402

from finetune.config import HeadsConfig, build  # noqa: E402
from finetune.errors import ConfigError  # noqa: E402

TOWER_HEADS = ("neck", "mask_queries")
REGION_MODULE = "region_projection"
HEAD_MODULES = (
    "cls_head", "mask_head", "noise_residual", "layer_mix", "stream_to_language", *TOWER_HEADS, REGION_MODULE,
    "operation_head",
)  # fmt: skip
"""Attribute names of everything this class adds to Qwen2.5-VL; `TOWER_HEADS` with `heads.source: vision` only,
`REGION_MODULE` with `region_features` only, heads or not, `operation_head` with `heads.operations`. New ones go to the
end: the seed of the heads initialises them in this order."""


class QwenForensicsConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration plus the heads and the ids of the forensic tokens.

    Args:
        heads: fields of `finetune.config.HeadsConfig`; None means its defaults.
        cls_token_ids, mask_token_ids: ids of `<cls>`.. and `<mask_1>`..; without them the heads cannot run.
        num_cls, num_mask: sizes of the heads; implied by the id lists when those are given.
        image_mean, image_std: the processor's normalisation, which the noise-residual stream undoes.
        has_language: whether the language model and its lm_head are part of the model; heads on the vision tower do
            without.
        region_features: whether tokens that name a region gain what the tower saw there
            (`finetune.models.region_features`).
    """

    model_type = "qwen_forensics"

    heads: dict | None = None
    cls_token_ids: list | None = None
    mask_token_ids: list | None = None
    num_cls: int = 1
    num_mask: int = 32
    image_mean: list | tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: list | tuple = (0.26862954, 0.26130258, 0.27577711)
    has_language: bool = True
    region_features: bool = False

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the base class; a plain Qwen2.5-VL configuration becomes one of ours without a warning."""
        config, unused = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == Qwen2_5_VLConfig.model_type:
            config["model_type"] = cls.model_type
        return config, unused

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.heads = dict(self.heads or {})
        if self.cls_token_ids:
            self.num_cls = len(self.cls_token_ids)
        if self.mask_token_ids:
            self.num_mask = len(self.mask_token_ids)

    @property
    def heads_config(self) -> HeadsConfig:
        """`heads` as a checked dataclass."""
        return build(HeadsConfig, self.heads or {}, where="heads")


@dataclass
class QwenForensicsOutput(ModelOutput):
    """Output of one forward pass over B sequences with N images, M of which have forensic tokens.

    With `heads.source: vision` M is N, and all of it is there for every image.

    logits: (B, T, V), or (K, V) where `logits_to_keep` is a boolean mask with K True positions; None where no text was
    given.
    cls_logits: (M_c,) tampering logits; cls_image_index: (M_c,) which of the N images each is about.
    mask_logits: M_m maps (H, W) at `mask_sizes_hw`, by default the processed image's size, padding left out;
    mask_image_index: (M_m,).
    mask_features: M_m maps (C, h, w) the masks were decoded from. operation_logits: M_m maps (1 + K, h, w), authentic
    and the K `heads.operations`, None without them. image_features: (M_c, C) embedding behind
    `cls_logits`.
    branch_anchor: in training, a scalar 0 that depends on every parameter which this batch may have left unused.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cls_logits: Tensor | None = None
    cls_image_index: Tensor | None = None
    mask_logits: list[Tensor] | None = None
    mask_image_index: Tensor | None = None
    mask_features: list[Tensor] | None = None
    operation_logits: list[Tensor] | None = None
    image_features: Tensor | None = None
    branch_anchor: Tensor | None = None


def check_heads(config: QwenForensicsConfig) -> None:
    """Refuse heads that this model cannot have, before anything is computed from another layer than the one meant.

    Raises:
        ConfigError: `heads.layer` or one of `heads.vision_layers` out of range, or switches that exclude each other.
    """
    heads = config.heads_config
    if config.region_features and not config.has_language:
        raise ConfigError("model.region_features adds to what the language model reads, which is left out")
    if not heads.enabled:
        return
    num_layers, depth = config.text_config.num_hidden_layers, config.vision_config.depth
    layer = heads.layer
    if layer not in ("last", "weighted") and not (isinstance(layer, int) and -num_layers - 1 <= layer <= num_layers):
        raise ConfigError(f"heads.layer is {layer!r}; expected last, weighted or 0 (embeddings) to {num_layers}")
    outside = [block for block in heads.vision_layers if not -depth <= block < depth]
    if outside or not heads.vision_layers:
        raise ConfigError(
            f"heads.vision_layers is {heads.vision_layers}; expected blocks of the vision tower, 0 to {depth - 1} "
            "(or -1, -2, ... from the end)"
        )
    _check_widths(heads)
    if len(set(heads.operations)) < len(heads.operations):
        raise ConfigError(f"heads.operations is {heads.operations}, a name twice; expected each operation once")
    if heads.source == "vision":
        _check_vision(heads, depth)
    elif not config.has_language:
        raise ConfigError("heads.source: tokens reads the language model, which is left out; use model.language: load")
    elif heads.mask == "none":
        raise ConfigError("heads.mask: none goes with heads.source: vision only; expected query or grid")


def _check_widths(heads: HeadsConfig) -> None:
    """Sizes of the heads' layers, and how they divide."""
    stream = heads.noise_residual
    for name, value, least in (
        ("hidden_size", heads.hidden_size, 1),
        ("num_heads", heads.num_heads, 1),
        ("num_layers", heads.num_layers, 1),
        ("grid_size", heads.grid_size, 1),
        ("noise_residual.channels", stream.channels, 1),
        ("noise_residual.stem_width", stream.stem_width, 0),
        ("noise_residual.global_blocks", stream.global_blocks, 0),
    ):
        if value < least:
            raise ConfigError(f"heads.{name} is {value}; expected at least {least}")
    if heads.mask == "query" and heads.hidden_size % heads.num_heads:
        raise ConfigError(
            f"heads.hidden_size is {heads.hidden_size}; expected a multiple of heads.num_heads, {heads.num_heads}"
        )
    widths = stream.widths
    has_groups = len(widths) == 3 and min(widths) >= 1 and not any(width % max(1, width // 16) for width in widths)
    if not has_groups or widths[-1] % 4:  # of the normalisations, and of the attention at 1/16
        raise ConfigError(
            f"heads.noise_residual.widths is {widths}; expected three numbers that divide into groups of 16 or a few "
            "more (multiples of 16 do), the last one a multiple of 4"
        )


def _check_vision(heads: HeadsConfig, depth: int) -> None:
    if heads.layer != "last":
        raise ConfigError(
            f"heads.layer is {heads.layer!r} with heads.source: vision, which reads no layer of the language model; "
            "leave it at last (vision_layers chooses the blocks of the tower)"
        )
    if heads.noise_residual.enabled and heads.noise_residual.to_language:
        raise ConfigError(
            "heads.noise_residual.to_language adds to what the language model reads; expected false with "
            "heads.source: vision"
        )
    if heads.num_queries < 1:
        raise ConfigError(f"heads.num_queries is {heads.num_queries}; expected at least 1")
    blocks = [block % depth for block in heads.vision_layers]
    if len(set(blocks)) < len(blocks):
        raise ConfigError(f"heads.vision_layers is {heads.vision_layers}, a block twice; expected each block once")
