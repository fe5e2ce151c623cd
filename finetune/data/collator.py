"""Samples become one batch: padded ids, every key the image processor returns, targets at their own sizes.

What a batch holds is defined here, once; see `ForensicCollator.__call__`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from finetune.data.dataset import Sample
from finetune.data.image_frame import framed, has_own_frame, is_padded, padded_size
from finetune.special_tokens import IGNORE_INDEX, SpecialTokens

MODEL_KEYS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "pixel_values",
    "image_grid_thw",
    "logits_to_keep",
    "mask_sizes_hw",
    "content_sizes_hw",
    "region_boxes",
    "region_index",
)
"""Keys of a batch that are arguments of the model's forward; the others are targets and names."""


def processed_images(images: Sequence[Image.Image], image_processor: Any) -> dict[str, Any]:
    """What the processor makes of RGB images, at once in the frame the model sees: pixel_values, image_grid_thw and
    anything else it returns."""
    resizing = {}
    if has_own_frame(image_processor):
        images = [framed(image, image_processor) for image in images]
        resizing = {"do_resize": False}
    return dict(image_processor(images=list(images), return_tensors="pt", **resizing))


class ForensicCollator:
    """Callable for a DataLoader.

    Args:
        padding_side: right for training and left for generation.
        heads_source: `heads.source` of the model: with vision, the heads run for every image, tokens or not.
    """

    def __init__(
        self,
        processor: Any,
        tokens: SpecialTokens,
        padding_side: Literal["left", "right"] = "right",
        heads_source: Literal["tokens", "vision"] = "tokens",
    ) -> None:
        self.processor = processor
        self.padding_side = padding_side
        self.heads_source = heads_source
        ids = processor.tokenizer.convert_tokens_to_ids
        self.cls_ids = set(ids(list(tokens.cls)))
        self.mask_ids = set(ids(list(tokens.mask)))

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch of B samples with N images.

        Returns:
            input_ids, attention_mask, mm_token_type_ids: (B, T) int64, 1 = image token in the last.
            labels: (B, T) int64, -100 where unsupervised.
            logits_to_keep: (B, T) bool, True where the next token is supervised, K in all; text_targets: (K,) int64.
            pixel_values: (P, 1176) float32, image_grid_thw: (N, 3) int64, and anything else the image processor
                returns; absent in a batch without images.
            cls_labels: (N,) int64 in {0, 1, -100}.
            mask_targets: N uint8 tensors (h, w) or None; operation_maps: N int16 tensors or None, see `operation_map`.
            mask_sizes_hw: N pairs, the size each mask is compared at.
            content_sizes_hw: N pairs, the part at the upper left of each processed image that is not padding; only
                where `data.image_padding` is on.
            cls_image_index, mask_image_index: which of the N images have tokens of each kind.
            record_ids: B names.
            region_boxes: (B, R, 4) float32 and region_index: (B, T) int64, see `_regions`; absent where no sample has
                regions the model shall look at.
            In a run without text the first three lines are absent. With a feature cache: feature_keys and
            feature_sizes_hw, N names and original (H, W), and cached_maps, per image its maps or None; pixel_values
            then holds the decoded images only (numbers in pixel_index), all of them where the expert reads pixels.
        """
        has_text = any(sample.input_ids for sample in samples)
        batch: dict[str, Any] = self._text(samples) if has_text else {}
        if any(sample.region_boxes for sample in samples):
            batch.update(self._regions(samples, batch["input_ids"].shape[1]))
        batch.update(self._images(samples))
        batch["cls_labels"] = torch.tensor([x for s in samples for x in s.cls_labels], dtype=torch.long)
        batch["mask_targets"] = [None if m is None else torch.from_numpy(m) for s in samples for m in s.masks]
        batch["operation_maps"] = [
            None if m is None else torch.from_numpy(m) for s in samples for m in s.operation_maps
        ]
        batch["mask_sizes_hw"] = [size for s in samples for size in s.mask_sizes_hw]
        batch["cls_image_index"] = self._images_with(samples, self.cls_ids)
        batch["mask_image_index"] = self._images_with(samples, self.mask_ids)
        batch["record_ids"] = [sample.record_id for sample in samples]
        return batch

    def _images(self, samples: Sequence[Sample]) -> dict[str, Any]:
        images = [image for sample in samples for image in sample.images]
        found: dict[str, Any] = {}
        if images:
            found.update(processed_images(images, self.processor.image_processor))
        features = [entry for sample in samples for entry in sample.features]
        image_processor = self.processor.image_processor
        sizes = [size for sample in samples for size in sample.processed_hw]
        if sizes and is_padded(image_processor):
            found["content_sizes_hw"] = sizes
        if features:
            patch = image_processor.patch_size
            given = [padded_size(size, image_processor) for size in sizes]
            found["image_grid_thw"] = torch.tensor([(1, h // patch, w // patch) for h, w in given], dtype=torch.long)
            found["feature_keys"] = [entry.key for entry in features]
            found["cached_maps"] = [entry.maps for entry in features]
            found["feature_sizes_hw"] = [entry.size_hw for entry in features]
            found["pixel_index"] = [i for i, entry in enumerate(features) if entry.is_decoded]
        return found

    def _text(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        length = max(len(sample.input_ids) for sample in samples)
        shape = (len(samples), length)
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            n = len(sample.input_ids)
            place = slice(0, n) if self.padding_side == "right" else slice(length - n, length)
            input_ids[row, place] = torch.tensor(sample.input_ids)
            labels[row, place] = torch.tensor(sample.labels)
            attention_mask[row, place] = 1
        supervised = torch.zeros(shape, dtype=torch.bool)
        supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).long(),
            "labels": labels,
            "logits_to_keep": supervised,
            "text_targets": labels[:, 1:][supervised[:, :-1]],
        }

    def _regions(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """Boxes of each sample, padded with zeros, and which tokens name them: 0 none, k the sample's box k - 1."""
        boxes = torch.zeros(len(samples), max(len(sample.region_boxes) for sample in samples), 4)
        index = torch.zeros(len(samples), length, dtype=torch.long)
        for row, sample in enumerate(samples):
            first = 0 if self.padding_side == "right" else length - len(sample.input_ids)
            for number, (box, places) in enumerate(zip(sample.region_boxes, sample.region_tokens, strict=True)):
                boxes[row, number] = torch.tensor(box)
                index[row, [first + place for place in places]] = number + 1
        return {"region_boxes": boxes, "region_index": index}

    def _images_with(self, samples: Sequence[Sample], ids: set[int]) -> Tensor:
        index: list[int] = []
        first = 0
        for sample in samples:
            count = len(sample.features) or len(sample.images)  # cached ones are not opened
            if self.heads_source == "vision" or not ids.isdisjoint(sample.input_ids):
                index += range(first, first + count)
            first += count
        return torch.tensor(index, dtype=torch.long)
