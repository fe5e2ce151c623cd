"""Qwen2.5-VL with a classification and a mask head on forensic tokens: config, model, typed output.

`QwenForensicsForConditionalGeneration` is a `Qwen2_5_VLForConditionalGeneration`: with the heads off, or without
forensic tokens in the input, it computes exactly what the base class computes. It knows token ids, not token texts,
and no losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.cache_utils import Cache  # noqa: E402
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput  # noqa: E402
from transformers.modeling_utils import slice_logits_to_keep  # noqa: E402

from finetune.config import HeadsConfig, build  # noqa: E402
from finetune.errors import ConfigError  # noqa: E402
from finetune.models.features import (  # noqa: E402
    TokenRuns,
    count_images,
    gather_states,
    images_from_patches,
    locate_runs,
    tower_to_raster,
)
from finetune.models.heads import HEADS, ClsHead, evidence_size, pool_evidence  # noqa: E402
from finetune.models.noise_residual import NoiseResidualStream  # noqa: E402
from finetune.models.perturbation import VisionOffsets, add_offsets  # noqa: E402

HEAD_MODULES = ("cls_head", "mask_head", "noise_residual", "layer_mix", "stream_to_language")
"""Attribute names of everything this class adds to Qwen2.5-VL."""


class QwenForensicsConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration plus the heads and the ids of the forensic tokens.

    Args:
        heads: fields of `finetune.config.HeadsConfig`; None means its defaults.
        cls_token_ids, mask_token_ids: ids of `<cls>`.. and `<mask_1>`..; without them the heads cannot run.
        num_cls, num_mask: sizes of the heads; implied by the id lists when those are given.
        image_mean, image_std: the processor's normalisation, which the noise-residual stream undoes.
    """

    model_type = "qwen_forensics"

    heads: dict | None = None
    cls_token_ids: list | None = None
    mask_token_ids: list | None = None
    num_cls: int = 1
    num_mask: int = 32
    image_mean: list | tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: list | tuple = (0.26862954, 0.26130258, 0.27577711)

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

    logits: (B, T, V), or (K, V) where `logits_to_keep` is a boolean mask with K True positions.
    cls_logits: (M_c,) tampering logits; cls_image_index: (M_c,) which of the N images each is about.
    mask_logits: M_m maps (H, W) at `mask_sizes_hw`, by default the processed image's size; mask_image_index: (M_m,).
    mask_features: M_m maps (C, h, w) the masks were decoded from. image_features: (M_c, C) embedding behind
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
    image_features: Tensor | None = None
    branch_anchor: Tensor | None = None


class QwenForensicsForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """See the module docstring. Parameters of the base class keep their names, on disk and in memory."""

    config_class = QwenForensicsConfig
    config: QwenForensicsConfig
    _keep_in_fp32_modules_strict = list(HEAD_MODULES)  # noqa: RUF012  (the base class wants a list)

    def __init__(self, config: QwenForensicsConfig) -> None:
        super().__init__(config)
        self._set_heads()

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
        _check_layers(heads, self.config.text_config.num_hidden_layers, self.config.vision_config.depth)
        if heads.enabled:
            self._build_heads(heads)
            if self.lm_head.weight.device.type != "meta":
                self.init_heads()

    def _build_heads(self, heads: HeadsConfig) -> None:
        text, vision = self.config.text_config, self.config.vision_config
        residual = heads.noise_residual
        stream_channels = residual.channels if residual.enabled else 0
        self.mask_head = HEADS[heads.mask](
            heads, text.hidden_size, vision.hidden_size, self.config.num_mask, stream_channels
        )
        size = evidence_size(self.mask_head.num_features) if heads.cls_uses_mask else 0
        self.cls_head = ClsHead(heads, text.hidden_size, self.config.num_cls, size)
        if residual.enabled:
            self.noise_residual = NoiseResidualStream(residual)
            if residual.to_language:
                self.stream_to_language = nn.Linear(stream_channels, text.hidden_size)
        if heads.layer == "weighted":
            self.layer_mix = nn.Linear(text.num_hidden_layers + 1, 1, bias=False)

    def init_heads(self) -> None:
        """(Re-)initialise every head from `heads.seed`, leaving the global RNG untouched."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.heads_config.seed)
            for module in self.head_modules():
                for part in module.modules():
                    reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
                    if reset is not None:
                        reset()
            if hasattr(self, "layer_mix"):
                self.layer_mix.weight.zero_()  # softmax of zeros: plain mean of the layers
            if hasattr(self, "stream_to_language"):
                self.stream_to_language.weight.zero_()
                self.stream_to_language.bias.zero_()

    def head_modules(self) -> list[nn.Module]:
        """The modules this class adds, in a fixed order."""
        return [getattr(self, name) for name in HEAD_MODULES if hasattr(self, name)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a plain Qwen2.5-VL folder (heads new, from `heads.seed`) or a folder saved by this class (heads kept).

        Keyword arguments `heads`, `cls_token_ids` and `mask_token_ids` set the configuration; others go to
        transformers.

        Raises:
            ValueError: a saved folder has some head weights but not all of them.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        for ids, count in (("cls_token_ids", "num_cls"), ("mask_token_ids", "num_mask")):
            if kwargs.get(ids):  # transformers sets keyword arguments one by one, after the config is built
                kwargs[count] = len(kwargs[ids])
        with torch.random.fork_rng(devices=[]):  # transformers initialises missing weights from the global RNG
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        expected = {name for name, _ in model.named_parameters() if name.split(".")[0] in HEAD_MODULES}
        missing = expected & set(info["missing_keys"])
        if missing and missing != expected:
            raise ValueError(
                f"{pretrained_model_name_or_path}: {len(missing)} of {len(expected)} head weights are missing, e.g. "
                f"'{min(missing)}'; the heads configuration does not fit these weights"
            )
        for module in model.head_modules():
            module.float()  # `_keep_in_fp32_modules_strict` reaches stored weights only, not new ones
        if missing:
            model.init_heads()
            info["missing_keys"] = type(info["missing_keys"])(k for k in info["missing_keys"] if k not in missing)
        return (model, info) if wants_info else model

    def _supports_mm_encoder_outputs(self) -> bool:
        """False with heads: else `generate` encodes the images beforehand and drops the pixels the heads need."""
        return not self.has_heads and super()._supports_mm_encoder_outputs()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mask_sizes_hw: Sequence[tuple[int, int]] | None = None,
        vision_offsets: VisionOffsets | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QwenForensicsOutput:
        """Base-class forward plus heads; every argument not named here is the base class's.

        Args:
            mask_sizes_hw: (H, W) of the mask wanted for each of the N images; default: the processed image's size.
            vision_offsets: added to what the vision tower gives; needs heads and forensic tokens in the input.
            return_dict: accepted for the base class's callers; the output is always a `QwenForensicsOutput`.

        The steps: 1 vision tower and noise stream; 2 language model; 3 text logits; 4 states at the forensic tokens;
        5 masks; 6 image scores, which read the masks' evidence.
        """
        runs = self._find_runs(input_ids, pixel_values)
        uses_vision = pixel_values is not None or pixel_values_videos is not None
        stream: list[Tensor] | None = None
        vision: BaseModelOutputWithPooling | None = None
        if runs is not None and pixel_values is not None and image_grid_thw is not None:  # 1
            vision = self._encode_images(pixel_values, image_grid_thw)
            if vision_offsets is not None:
                merge = self.config.vision_config.spatial_merge_size
                vision = add_offsets(vision, vision_offsets, image_grid_thw, self.heads_config.vision_layers, merge)
            stream = self._residual_features(pixel_values, image_grid_thw)
            mm_encoder_outputs = {
                **(mm_encoder_outputs or {}),
                "image": self._add_stream(vision, stream, image_grid_thw),
            }
            pixel_values = None

        wants_layers = self.has_heads and runs is not None and self.heads_config.layer != "last"
        outputs = self.model(  # 2
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_token_type_ids=mm_token_type_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            output_hidden_states=output_hidden_states or wants_layers,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs[0], logits_to_keep))  # 3
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        result = QwenForensicsOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )
        if self.training:  # also without heads: a text-only batch leaves the vision tower out
            result.branch_anchor = self._branch_anchor(logits, uses_vision=uses_vision)
        if runs is not None and vision is not None and image_grid_thw is not None:  # 4, 5, 6
            self._run_heads(result, outputs, vision, stream, image_grid_thw, runs, mask_sizes_hw)
        return result

    def _find_runs(self, input_ids: Tensor | None, pixel_values: Tensor | None) -> tuple[TokenRuns, TokenRuns] | None:
        """Runs of cls and of mask tokens, or None where the heads have nothing to read."""
        config = self.config
        if not self.has_heads or input_ids is None or pixel_values is None:
            return None
        if not config.cls_token_ids or not config.mask_token_ids:
            return None
        images = count_images(input_ids, config.vision_start_token_id, config.image_token_id)
        return (
            locate_runs(input_ids, config.cls_token_ids, images),
            locate_runs(input_ids, config.mask_token_ids, images),
        )

    def _encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> BaseModelOutputWithPooling:
        """Vision tower with the hidden states of every block; without a graph while all of it is frozen."""
        needs_graph = pixel_values.requires_grad or any(p.requires_grad for p in self.model.visual.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph):
            return self.model.get_image_features(
                pixel_values, image_grid_thw, output_hidden_states=True, return_dict=True
            )

    def _residual_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> list[Tensor] | None:
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
        return self.noise_residual(images)

    def _add_stream(
        self, vision: BaseModelOutputWithPooling, stream: list[Tensor] | None, image_grid_thw: Tensor
    ) -> BaseModelOutputWithPooling:
        """The image tokens the language model reads, with the pooled noise stream added where that is switched on."""
        if stream is None or not hasattr(self, "stream_to_language"):
            return vision
        merge = self.config.vision_config.spatial_merge_size
        tokens = []
        for embeds, features, (_, h, w) in zip(vision.pooler_output, stream, image_grid_thw.tolist(), strict=True):
            pooled = F.adaptive_avg_pool2d(features, (h // merge, w // merge)).flatten(1).t()  # (h*w/m^2, S)
            tokens.append(embeds + self.stream_to_language(pooled).to(embeds.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=vision.last_hidden_state, pooler_output=tuple(tokens))

    def _run_heads(
        self,
        result: QwenForensicsOutput,
        outputs: Any,
        vision: BaseModelOutputWithPooling,
        stream: list[Tensor] | None,
        image_grid_thw: Tensor,
        runs: tuple[TokenRuns, TokenRuns],
        mask_sizes_hw: Sequence[tuple[int, int]] | None,
    ) -> None:
        cls_runs, mask_runs = runs
        maps: list[Tensor] = []
        if len(mask_runs.image):  # 5
            images = mask_runs.image.tolist()
            patches = self._patch_maps(vision, image_grid_thw)
            decoded = self.mask_head(
                self._token_states(outputs, mask_runs),
                [[layer[i] for i in images] for layer in patches],
                None if stream is None else [stream[i] for i in images],
            )
            maps = decoded.logits
            result.mask_logits = [
                self._at_size(m, i, image_grid_thw, mask_sizes_hw) for m, i in zip(maps, images, strict=True)
            ]
            result.mask_features = decoded.features
            result.mask_image_index = mask_runs.image
        if len(cls_runs.image):  # 6
            evidence = None
            if self.heads_config.cls_uses_mask:
                evidence = self._evidence(cls_runs, mask_runs, maps, result.mask_features)
            states = self._token_states(outputs, cls_runs)
            evidence = None if evidence is None else evidence.to(states.dtype)  # DeepSpeed casts the heads too
            result.cls_logits, result.image_features = self.cls_head(states, evidence)
            result.cls_image_index = cls_runs.image

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

    def _patch_maps(self, vision: BaseModelOutputWithPooling, image_grid_thw: Tensor) -> list[list[Tensor]]:
        """For each configured tower layer the N maps (C, h, w) of its output, in raster order."""
        config = self.config.vision_config
        depth = config.depth
        return [
            tower_to_raster(
                vision.hidden_states[block % depth + 1],  # index 0 is the patch embedding
                image_grid_thw,
                merge_size=config.spatial_merge_size,
                window_size=config.window_size,
                patch_size=config.patch_size,
            )
            for block in self.heads_config.vision_layers
        ]

    def _at_size(
        self, logits: Tensor, image: int, image_grid_thw: Tensor, sizes_hw: Sequence[tuple[int, int]] | None
    ) -> Tensor:
        """A logit map at the size asked for; with `mask_sigmoid` the interpolation runs on scores instead of logits."""
        patch = self.config.vision_config.patch_size
        size = sizes_hw[image] if sizes_hw is not None else tuple((image_grid_thw[image, 1:] * patch).tolist())
        values = logits.float().sigmoid() if self.heads_config.mask_sigmoid else logits.float()
        values = F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
        return torch.logit(values, eps=1e-6) if self.heads_config.mask_sigmoid else values

    def _branch_anchor(self, logits: Tensor, uses_vision: bool) -> Tensor:
        """0 with a gradient path to every trainable parameter that this batch may have left out of the graph."""
        parameters = [p for module in self.head_modules() for p in module.parameters()]
        if not uses_vision:
            parameters += list(self.model.visual.parameters())
        anchor = logits.float().sum() * 0
        for parameter in parameters:
            if parameter.requires_grad and not hasattr(parameter, "ds_id"):  # ZeRO-3 left an empty shell of those
                anchor = anchor + parameter.float().sum() * 0
        return anchor


def _check_layers(heads: HeadsConfig, num_layers: int, depth: int) -> None:
    """Refuse layers the model does not have, before anything is computed from another one.

    Raises:
        ConfigError: `heads.layer` or one of `heads.vision_layers` out of range.
    """
    layer = heads.layer
    if layer not in ("last", "weighted") and not (isinstance(layer, int) and -num_layers - 1 <= layer <= num_layers):
        raise ConfigError(f"heads.layer is {layer!r}; expected last, weighted or 0 (embeddings) to {num_layers}")
    outside = [block for block in heads.vision_layers if not -depth <= block < depth]
    if outside or not heads.vision_layers:
        raise ConfigError(
            f"heads.vision_layers is {heads.vision_layers}; expected blocks of the vision tower, 0 to {depth - 1} "
            "(or -1, -2, ... from the end)"
        )


# Checkpoint names on disk ("visual.*", "model.layers.*") are mapped per class: without this line a subclass of the
# released model finds none of its weights and starts from random ones.
register_checkpoint_conversion_mapping(
    QwenForensicsForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__) or [],
    overwrite=True,
)
AutoConfig.register(QwenForensicsConfig.model_type, QwenForensicsConfig, exist_ok=True)
AutoModelForImageTextToText.register(QwenForensicsConfig, QwenForensicsForConditionalGeneration, exist_ok=True)
