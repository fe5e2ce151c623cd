"""Applies `mask_convention` and `mask_pixels`, the options every format takes, to a record that was read.

`mask_pixels` other than `bright` opens the mask files: the schema has one meaning of a mask, so such a mask becomes
polygons with exactly its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from finetune.data.exact_polygons import exact_polygons
from finetune.data.images import decode, image_size_hw, to_rgb_image
from finetune.data.masks import binarize_mask
from finetune.data.readers.options import MASK_CONVENTIONS, MASK_PIXELS, Options
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record

_CHANNELS = {"red": 0, "green": 1, "blue": 2}
_MIN_COLOR = 64


@dataclass(frozen=True)
class MaskOptions:
    """What a source says of its masks.

    Args:
        convention: stored in the provenance of every record with tampered pixels; "" says nothing.
        pixels: which pixels of a mask file are tampered; `bright` is `masks.binarize_mask`, `dark` its inverse, a
            colour those in which that channel is the largest and at least 64.
    """

    convention: str = ""
    pixels: str = "bright"

    def apply(self, record: Record) -> Record:
        """The record with both applied.

        Raises:
            DataFormatError: a mask that cannot be read, or a record that names another convention itself.
        """
        if self.pixels != "bright" and any(target.mask_path for target in record.targets):
            pairs = zip(record.images, record.targets, strict=True)
            record = replace(record, targets=tuple(self._traced(image, target, record) for image, target in pairs))
        if not self.convention or not any(target.mask_path or target.polygons for target in record.targets):
            return record
        own = record.provenance.get("mask_convention", self.convention)
        if own != self.convention:
            raise DataFormatError(
                "record and options disagree about the mask",
                record=record.id,
                source=record.source,
                field="provenance.mask_convention",
                found=own,
                expected=self.convention,
                fix="remove one of them",
            )
        return replace(record, provenance={**record.provenance, "mask_convention": self.convention})

    def _traced(self, image: ImageInput, target: ImageTarget, record: Record) -> ImageTarget:
        if not target.mask_path:
            return target
        picture = decode(ImageInput(path=target.mask_path), record.id, record.source, "mask_path")
        size_hw = image_size_hw(image, record.id, record.source)
        problem = None
        if (picture.height, picture.width) != size_hw:
            problem = f"mask is {picture.height}x{picture.width} but the image is {size_hw[0]}x{size_hw[1]}"
        elif self.pixels in _CHANNELS:
            values = np.asarray(to_rgb_image(picture, record.id, record.source)).astype(np.int16)  # (H, W, 3)
            channel = values[..., _CHANNELS[self.pixels]]
            others = np.delete(values, _CHANNELS[self.pixels], axis=2).max(axis=2)  # (H, W)
            mask = (channel > others) & (channel >= _MIN_COLOR)
        else:
            try:
                mask = binarize_mask(picture) == 0
            except ValueError as error:
                problem = f"mask holds neither 0/1 nor 0/255 ({error})"
        if problem is None and target.label == 1 and not mask.any():
            problem = f"no pixel of the mask is {self.pixels}"
        if problem:
            raise DataFormatError(
                problem,
                record=record.id,
                source=record.source,
                field="mask_path",
                found=target.mask_path,
                fix="correct the mask or options.mask_pixels",
            )
        return replace(target, mask_path=None, polygons=exact_polygons(mask))


def read_mask_options(options: Options) -> MaskOptions:
    """From a source's options.

    Raises:
        DataFormatError: another value than the known ones.
    """
    convention = options.choice("mask_convention", (*MASK_CONVENTIONS, ""), "")
    return MaskOptions(convention, options.choice("mask_pixels", MASK_PIXELS, "bright"))
