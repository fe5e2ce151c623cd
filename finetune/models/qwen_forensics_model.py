"""Qwen2.5-VL with a classification and a mask head on forensic tokens: the model's entry point.

`QwenForensicsForConditionalGeneration` is a `Qwen2_5_VLForConditionalGeneration`: with the heads off, or without
forensic tokens in the input, it computes exactly what the base class computes. It knows token ids, not token texts,
and no losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.cache_utils import Cache  # noqa: E402
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling  # noqa: E402
from transformers.modeling_utils import slice_logits_to_keep  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel  # noqa: E402

from finetune.errors import ConfigError  # noqa: E402
from finetune.models.configuration import (  # noqa: E402
    HEAD_MODULES,
    REGION_MODULE,
    QwenForensicsConfig,
    QwenForensicsOutput,
)
from finetune.models.head_running import Seen  # noqa: E402
from finetune.models.patch_embedding import PatchEmbed  # noqa: E402
from finetune.models.perturbation import VisionOffsets  # noqa: E402
from finetune.models.vision_heads import NO_LANGUAGE, VisionHeadRunner, VisionOnlyModel  # noqa: E402

__all__ = [
    "HEAD_MODULES",
    "QwenForensicsConfig",
    "QwenForensicsForConditionalGeneration",
    "QwenForensicsOutput",
]


class QwenForensicsForConditionalGeneration(VisionHeadRunner, Qwen2_5_VLForConditionalGeneration):
    """See the module docstring. Parameters of the base class keep their names, on disk and in memory."""

    config_class = QwenForensicsConfig
    config: QwenForensicsConfig
    _keep_in_fp32_modules_strict = list(HEAD_MODULES)  # noqa: RUF012  (the base class wants a list)

    def __init__(self, config: QwenForensicsConfig) -> None:
        if config.has_language:
            super().__init__(config)
        else:
            Qwen2_5_VLPreTrainedModel.__init__(self, config)
            self._tied_weights_keys = None  # there is no lm_head to tie
            self.model = VisionOnlyModel(config)
            self.post_init()
        self.model.visual.patch_embed = PatchEmbed(self.model.visual.patch_embed)
        self._set_heads()

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
        for module in model.head_modules():
            module.float()  # `_keep_in_fp32_modules_strict` reaches stored weights only, not new ones
        heads = tuple(name for name in HEAD_MODULES if name != REGION_MODULE)
        for modules in (heads, (REGION_MODULE,)):  # regions may come to a folder that has heads
            expected = {name for name, _ in model.named_parameters() if name.split(".")[0] in modules}
            missing = expected & set(info["missing_keys"])
            if missing and missing != expected:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {len(missing)} of {len(expected)} head weights are missing, "
                    f"e.g. '{min(missing)}'; the heads configuration does not fit these weights"
                )
            if missing:
                model.init_heads(modules)
                info["missing_keys"] = type(info["missing_keys"])(k for k in info["missing_keys"] if k not in missing)
        return (model, info) if wants_info else model

    def _supports_mm_encoder_outputs(self) -> bool:
        """False with heads or regions: else `generate` encodes the images beforehand and drops what these need."""
        return not self.head_modules() and super()._supports_mm_encoder_outputs()

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
        content_sizes_hw: Sequence[tuple[int, int]] | None = None,
        vision_offsets: VisionOffsets | None = None,
        tower_maps: Sequence[Sequence[Tensor]] | None = None,
        region_boxes: Tensor | None = None,
        region_index: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QwenForensicsOutput:
        """Base-class forward plus heads; every argument not named here is the base class's.

        With `heads.source: vision` images alone are enough: without `input_ids` no text is computed.

        Args:
            mask_sizes_hw: (H, W) of the mask wanted for each of the N images; default: the processed image's size.
            content_sizes_hw: (H, W) of the part at the upper left of each processed image that is not padding, in whole
                merge groups of patches: heads read nothing else, masks show nothing else; default: all of it.
            vision_offsets: added to what the vision tower gives; needs heads, and forensic tokens where they read them.
            tower_maps: what `self.tower_maps` gave for these images, instead of running the tower; `pixel_values` are
                then needed for the noise-residual stream only.
            region_boxes: (B, R, 4) x1, y1, x2, y2 in pixels of the processed image, padded with zeros; a sample with
                regions has one image. Read by a model with `region_features` where it reads pixels.
            region_index: (B, T) which tokens name them: 0 none, k the sample's box k - 1.
            return_dict: accepted for the base class's callers; the output is always a `QwenForensicsOutput`.

        The steps: 1 vision tower, noise stream, regions; 2 language model; 3 text logits; 4 states at the forensic
        tokens, or of the tower; 5 masks; 6 image scores, which read the masks' evidence.
        """
        has_text = input_ids is not None or inputs_embeds is not None
        self._check_inputs(has_text, pixel_values, tower_maps)
        runs = None if self.reads_tower else self._find_runs(input_ids, pixel_values)
        uses_vision = pixel_values is not None or pixel_values_videos is not None
        seen: Seen | None = None
        if (runs is not None or self.reads_tower) and image_grid_thw is not None:  # 1
            if pixel_values is not None or tower_maps is not None:
                seen = self._see(pixel_values, image_grid_thw, tower_maps, vision_offsets, content_sizes_hw)
            if seen is not None and seen.vision is not None:
                image = self._add_stream(seen.vision, seen)
                mm_encoder_outputs = {**(mm_encoder_outputs or {}), "image": image}
                pixel_values = None
        is_plain = pixel_values_videos is None and "image" not in (mm_encoder_outputs or {})
        if (
            has_text and is_plain and pixel_values is not None and image_grid_thw is not None
        ):  # no head: no graph either
            image = self._encode_images(pixel_values, image_grid_thw, keeps_blocks=False)
            mm_encoder_outputs = {**(mm_encoder_outputs or {}), "image": image}
            pixel_values = None
        if self.config.region_features and region_boxes is not None and region_index is not None:
            seen_images = (mm_encoder_outputs or {}).get("image")
            if seen_images is not None and input_ids is not None:  # else a later step of generation
                embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
                inputs_embeds = self._add_regions(
                    embeds, seen_images, input_ids, image_grid_thw, region_boxes, region_index
                )

        result, outputs = QwenForensicsOutput(), None
        if has_text or not self.reads_tower:
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
            result.logits = self.lm_head(slice_logits_to_keep(outputs[0], logits_to_keep))  # 3
            if labels is not None:
                result.loss = self.loss_function(
                    logits=result.logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
                )
            result.past_key_values = outputs.past_key_values
            result.hidden_states = outputs.hidden_states if output_hidden_states else None
            result.attentions = outputs.attentions
        if seen is not None and image_grid_thw is not None:  # 4, 5, 6
            if runs is not None:
                self._run_heads(result, outputs, seen, runs, mask_sizes_hw)
            else:
                self._run_on_tower(result, seen, mask_sizes_hw)
        if self.training:  # also without heads: a text-only batch leaves the vision tower out
            result.branch_anchor = self._branch_anchor(result, uses_vision=uses_vision and has_text)
        return result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class.

        Raises:
            ConfigError: the language model was left out.
        """
        if not self.config.has_language:
            raise ConfigError(NO_LANGUAGE)
        return super().generate(*args, **kwargs)


# Checkpoint names on disk ("visual.*", "model.layers.*") are mapped per class: without this line a subclass of the
# released model finds none of its weights and starts from random ones.
register_checkpoint_conversion_mapping(
    QwenForensicsForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__) or [],
    overwrite=True,
)
AutoConfig.register(QwenForensicsConfig.model_type, QwenForensicsConfig, exist_ok=True)
AutoModelForImageTextToText.register(QwenForensicsConfig, QwenForensicsForConditionalGeneration, exist_ok=True)
