"""Records become samples: decoded images, pixel targets at the size the loss wants, and rendered token ids with labels.

Nothing is truncated and nothing is skipped: a record that does not fit is an error that names it. No batching here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from finetune.config import DataConfig, SourceConfig
from finetune.data.answer_polygons import MIN_POINTS, MIN_TOKENS, PolygonBudget, PolygonFrame
from finetune.data.chat import Segment, conversation, encode, polygon_text, question_turns, segments
from finetune.data.edit_operations import operation_map
from finetune.data.image_cache import ImageCache
from finetune.data.image_frame import padded_size, processed_size
from finetune.data.image_size import too_narrow
from finetune.data.images import image_size_hw
from finetune.data.masks import load_mask, resize_mask
from finetune.data.region_masking import Draw, RegionMasking, mask_regions
from finetune.data.regions.mirroring import mirrored
from finetune.data.regions.places import region_places
from finetune.data.regions.shuffling import shuffled
from finetune.data.regions.text import expand_regions
from finetune.data.sources import read_sources, spread
from finetune.data.splits import GroupBy
from finetune.data.template import Layout, Template, load_template
from finetune.data.token_checks import leaking_tokens
from finetune.data.validation import InvalidDataError, Problem, validate_for_training
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import Polygon, Record, Turn
from finetune.special_tokens import IGNORE_INDEX, SpecialTokens

logger = logging.getLogger(__name__)


class CachedFeatures(NamedTuple):
    """Of one image: its key in the feature cache, its maps (C, h, w), one per tower block, where they are there,
    whether the sample holds the image too, and the image's own (H, W)."""

    key: str
    maps: list[Tensor] | None
    is_decoded: bool
    size_hw: tuple[int, int]


@dataclass
class Sample:
    """One record, ready for the collator.

    images: decoded RGB images, upright; where there is a feature cache, those that its `features` call decoded.
    input_ids, labels: equally long, empty in a run without text. cls_labels: one per image, 0, 1 or -100.
    masks: one per image, (h, w) uint8 0/1 at `mask_sizes_hw`, or None. operation_maps: one per image, likewise, int16,
    see `finetune.data.edit_operations`, or None. processed_hw: sizes after the
    processor's resize, padding left out.
    features: one per image, none without a feature cache.
    region_boxes: x1, y1, x2, y2 in pixels of the processed image; region_tokens: of each box the numbers of the ids
    that name it. Both empty unless the model looks at regions itself.
    """

    record_id: str
    images: list[Image.Image]
    input_ids: list[int]
    labels: list[int]
    cls_labels: list[int] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    operation_maps: list[np.ndarray | None] = field(default_factory=list)
    mask_sizes_hw: list[tuple[int, int]] = field(default_factory=list)
    processed_hw: list[tuple[int, int]] = field(default_factory=list)
    features: list[CachedFeatures] = field(default_factory=list)
    region_boxes: list[tuple[int, ...]] = field(default_factory=list)
    region_tokens: list[list[int]] = field(default_factory=list)


class ForensicDataset(Dataset):
    """A list of records seen through a template, a vocabulary and a processor; map-style.

    Args:
        records: as read.
        processor: the Qwen2.5-VL processor, its pixel bounds already set.
        config: `template`, `layout`, `max_length`, `mask_resolution` and what is said of polygons are read.
        region_features: whether the model is told where the candidate regions of a question are.

    Raises:
        ConfigError: a template that cannot be used, or a budget too small for one box.
    """

    has_text: ClassVar[bool] = True
    heads_read_text = True  # False where the heads see the vision tower alone, so that no answer can leak into them

    def __init__(
        self,
        records: Sequence[Record],
        processor: Any,
        tokens: SpecialTokens,
        config: DataConfig,
        *,
        region_features: bool = False,
    ) -> None:
        self.region_features = region_features
        self.records = list(records)
        self.processor = processor
        self.tokens = tokens
        self.config = config
        self.template = load_template(config.template)
        if config.max_polygon_tokens is not None and config.max_polygon_tokens < MIN_TOKENS:
            raise ConfigError(
                f"data.max_polygon_tokens is {config.max_polygon_tokens}; expected at least {MIN_TOKENS}, which one "
                "box may take, or null to count points"
            )
        self.image_cache = ImageCache(config.image_cache_megabytes)
        self.operations: Sequence[str] = ()  # the heads.operations of the run, in their order
        self.draw_seed = 0  # of what a draw by a numbered sampler changes
        self.region_masking: RegionMasking | None = None  # hides regions of the records a numbered sampler draws

    def __len__(self) -> int:
        return len(self.records)

    @property
    def class_labels(self) -> list[int | None]:
        """Label of each record: 1 if any of its images is tampered, 0 if real, None if unknown."""
        return [record.label for record in self.records]

    @property
    def pairs(self) -> list[str | None]:
        """Of each record what its authentic or tampered twin has too (`provenance.pair` of generated sets), or None."""
        return [pair_of(record) for record in self.records]

    def groups_of_images(self, indices: Sequence[int]) -> list[str]:
        """Of every image of some records, what it shares with others of one origin: the record's group, else its pair,
        else its picture or name."""
        found = []
        for index in indices:
            record = self.records[index]
            found += [record.group or pair_of(record) or GroupBy().key(record)] * len(record.images)
        return found

    def __getitem__(self, index: int) -> Sample:
        """Decode and render one record.

        Raises:
            DataFormatError: unreadable image or mask, or more than `max_length` tokens.
        """
        sample, pieces, processed = self.rendered(index)
        try:
            sample.input_ids, sample.labels = self._render(self.records[index], pieces, processed)
        except DataFormatError:
            if not isinstance(index, Draw):
                raise
            return self[int(index)]  # what is left of a hidden region takes too many points: shown whole instead
        return sample

    def rendered(self, index: int) -> tuple[Sample, list[Segment], list[tuple[int, int]]]:
        """One record just before it becomes ids: the sample without them, the chat text, and each image's processed
        (H, W).

        Raises:
            DataFormatError: unreadable image or mask.
        """
        record, sample, sizes, masks = self._opened(index)
        pieces = segments(self._turns(record, sizes, sample.processed_hw, masks), self.template.system)
        if self.region_features:
            sample.region_boxes, sample.region_tokens = self._places(record, pieces, sizes, sample.processed_hw)
        return sample, pieces, sample.processed_hw

    def _opened(self, index: int) -> tuple[Record, Sample, list[tuple[int, int]], list[np.ndarray | None]]:
        """A record with its images decoded, before any text: record and sample, mirrored and regions hidden where a
        numbered sampler asks for it; each image's (H, W) and its mask at that size."""
        record = self.records[index]
        images = [self.image_cache.load(image, record.id, record.source) for image in record.images]
        if isinstance(index, Draw):
            draw = (self.draw_seed, index.position)
            if self.config.shuffle_regions:
                record = shuffled(record, draw)
            record, images = mirrored(record, images, self.config.mirror_regions, draw)
        sizes = [(image.height, image.width) for image in images]
        processed = self._processed(record, sizes)
        masks = [
            load_mask(target, size, record.id, record.source)
            for target, size in zip(record.targets, sizes, strict=True)
        ]
        if self.region_masking is not None and isinstance(index, Draw):
            record, images, masks = mask_regions(self.region_masking, index, record, images, masks, processed)
        return record, self._sample(record, images, sizes, processed, masks), sizes, masks

    def _sample(
        self,
        record: Record,
        images: list[Image.Image],
        sizes: list[tuple[int, int]],
        processed: list[tuple[int, int]],
        masks: Sequence[np.ndarray | None],
    ) -> Sample:
        """A sample without ids; masks come at the images' own sizes."""
        mask_sizes = processed if self.config.mask_resolution == "processed" else sizes
        masks = [m if m is None else resize_mask(m, s) for m, s in zip(masks, mask_sizes, strict=True)]
        maps: list[np.ndarray | None] = [None] * len(masks)
        if self.operations:
            maps = [operation_map(record, i, self.operations, mask) for i, mask in enumerate(masks)]
        return Sample(
            record_id=record.id,
            images=images,
            input_ids=[],
            labels=[],
            cls_labels=[IGNORE_INDEX if t.label is None else t.label for t in record.targets],
            masks=masks,
            operation_maps=maps,
            mask_sizes_hw=mask_sizes,
            processed_hw=processed,
        )

    @cached_property
    def leaking(self) -> list[str]:
        """Ids of the records in which a forensic token stands after answer text, inserted tokens included, so that
        teacher forcing gives the heads' targets away; [] where the heads see the vision tower alone."""
        if not self.heads_read_text:
            return []
        rendered = next((record for record in self.records if not record.turns), None)  # one template for them all
        others_leak = rendered is not None and leaks(rendered, self.template, self.tokens, self.config.layout)
        return [
            record.id
            for record in self.records
            if (leaks(record, self.template, self.tokens, self.config.layout) if record.turns else others_leak)
        ]

    @property
    def heads_may_read_answers(self) -> bool:
        """Whether any record leaks its answer to the heads."""
        return bool(self.leaking)

    def warn_of_leaks(self) -> None:
        """Log which records leak their answer to the heads; nothing where none does."""
        if self.leaking:
            logger.warning(
                "in record '%s'%s a forensic token stands after text that gives its target away%s: the heads will "
                "learn to read the answer, not the image; %s",
                self.leaking[0],
                f" and {len(self.leaking) - 1} others" if len(self.leaking) > 1 else "",
                " (data.layout: text_first)" if self.config.layout == "text_first" else "",
                "put the tokens first" if self.config.layout == "text_first" else
                "put the tokens first, and ask about every image before the first answer",
            )  # fmt: skip

    def without_answers_at(self, indices: Sequence[int]) -> list[Sample]:
        """Records as a question followed by the forensic tokens only, for scoring heads without a leak."""
        samples = []
        for index in indices:
            sample = self[index]
            turns = question_turns(self.records[index], self.template)
            processed = sample.processed_hw
            sizes = [(image.height, image.width) for image in sample.images]
            turns = expand_regions(self.records[index], turns, sizes, processed)
            run = self.tokens.run * len(sample.images)
            pieces = [*segments(turns, self.template.system, for_generation=True), Segment(run, False)]
            if self.region_features:
                sample.region_boxes, sample.region_tokens = self._places(self.records[index], pieces, sizes, processed)
            sample.input_ids, sample.labels = self._render(self.records[index], pieces, processed)
            samples.append(sample)
        return samples

    def num_tokens(self, index: int) -> int:
        """Length of a record's token sequence; reads image headers, and masks only where polygons must be made of them.

        Raises:
            DataFormatError: unreadable header, or too long.
        """
        record = self.records[index]
        sizes = [image_size_hw(image, record.id, record.source) for image in record.images]
        processed = self._processed(record, sizes)
        masks: list[np.ndarray | None] = [None] * len(sizes)
        if any(self._needs_tracing(record, sizes, processed)):
            masks = [load_mask(t, s, record.id, record.source) for t, s in zip(record.targets, sizes, strict=True)]
        if self.config.shuffle_regions:
            shuffled(record, (0, 0))  # refused before training, not at some draw
        pieces = segments(self._turns(record, sizes, processed, masks), self.template.system)
        if self.region_features:
            self._places(record, pieces, sizes, processed)
        return len(self._render(record, pieces, processed)[0])

    def check_lengths(self) -> list[DataFormatError]:
        """An error for every record that is too long, all at once, without decoding images."""
        errors = []
        for index in range(len(self)):
            try:
                self.num_tokens(index)
            except DataFormatError as error:
                errors.append(error)
        return errors

    def frames(self, sizes: Sequence[tuple[int, int]], processed: Sequence[tuple[int, int]]) -> list[PolygonFrame]:
        """The frame of each image's polygons in an answer, from original and processed sizes (H, W)."""
        coordinates = self.config.polygon_coordinates
        return [PolygonFrame(coordinates, *pair) for pair in zip(sizes, processed, strict=True)]

    def _turns(
        self,
        record: Record,
        sizes: Sequence[tuple[int, int]],
        processed: Sequence[tuple[int, int]],
        masks: Sequence[np.ndarray | None],
    ) -> tuple[Turn, ...]:
        polygons: list[tuple[Polygon, ...]] = []
        if not record.turns:
            budget = self._polygon_budget(record)
            tracing = self._needs_tracing(record, sizes, processed)
            frames = self.frames(sizes, processed)
            for target, frame, mask, is_traced in zip(record.targets, frames, masks, tracing, strict=True):
                found = budget.trace(mask, frame) if is_traced and mask is not None else target.polygons
                polygons.append(frame.write(found or ()))
        turns = conversation(record, self.template, self.tokens, self.config.layout, polygons)
        return expand_regions(record, turns, sizes, processed)

    def _needs_tracing(
        self, record: Record, sizes: Sequence[tuple[int, int]], processed: Sequence[tuple[int, int]]
    ) -> list[bool]:
        """Of each image whether the polygons of its answer are made from its mask: it has none, or too many."""
        if record.turns:
            return [False] * len(record.targets)
        budget = self._polygon_budget(record)
        return [
            target.label == 1 and (target.polygons is None or not budget.admits(target.polygons, frame))
            for target, frame in zip(record.targets, self.frames(sizes, processed), strict=True)
        ]

    def _polygon_budget(self, record: Record) -> PolygonBudget:
        """What one image's polygons may take of the answer: an equal share of the record's budget."""
        num_images = max(len(record.images), 1)
        if self.config.max_polygon_tokens is None:
            return PolygonBudget(max(self.config.max_polygon_points // num_images, MIN_POINTS))
        tokens = max(self.config.max_polygon_tokens // num_images, MIN_TOKENS)
        return PolygonBudget(tokens, self._count_polygon_tokens)

    def _count_polygon_tokens(self, polygons: Sequence[Polygon]) -> int:
        return len(self.processor.tokenizer.encode(polygon_text(polygons), add_special_tokens=False))

    def _processed(self, record: Record, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """`processed_size` of each image.

        Raises:
            DataFormatError: an image too narrow for Qwen2.5-VL.
        """
        return processed_sizes(sizes, self.processor.image_processor, record.id, record.source)

    def _places(
        self,
        record: Record,
        pieces: Sequence[Segment],
        sizes: Sequence[tuple[int, int]],
        processed: Sequence[tuple[int, int]],
    ) -> tuple[list[tuple[int, ...]], list[list[int]]]:
        counts = [num_image_tokens(size, self.processor.image_processor) for size in processed]
        return region_places(record, pieces, self.processor.tokenizer, counts, sizes, processed)

    def _render(
        self, record: Record, pieces: Sequence[Segment], processed: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        image_processor = self.processor.image_processor
        counts = [num_image_tokens(size, image_processor) for size in processed]
        input_ids, labels = encode(pieces, self.processor.tokenizer, counts)
        if len(input_ids) > self.config.max_length:
            raise DataFormatError(
                "too many tokens",
                record=record.id,
                source=record.source,
                found=len(input_ids),
                expected=f"at most data.max_length = {self.config.max_length}",
                fix=f"raise data.max_length, lower data.max_pixels ({sum(counts)} tokens are images), "
                "or shorten the text",
            )
        return input_ids, labels


def processed_sizes(
    sizes: Sequence[tuple[int, int]], image_processor: Any, record_id: str, source: str | None = None
) -> list[tuple[int, int]]:
    """`processed_size` of each image of a record.

    Raises:
        DataFormatError: an image too narrow for Qwen2.5-VL.
    """
    try:
        return [processed_size(size, image_processor) for size in sizes]
    except ValueError as error:  # smart_resize refuses aspect ratios of 200 and more
        raise too_narrow(sizes, record_id, source) from error


def num_image_tokens(processed_hw: tuple[int, int], image_processor: Any) -> int:
    """How many tokens an image of this processed size takes, padding included: one for each merge group of patches."""
    cell = image_processor.patch_size * image_processor.merge_size
    return math.prod(padded_size(processed_hw, image_processor)) // cell**2


def load_dataset(
    sources: Sequence[SourceConfig], what: str, processor: Any, tokens: SpecialTokens, config: DataConfig
) -> ForensicDataset:
    """Read, check and wrap the records of `data.train` or `data.eval`; every problem is found before training starts.

    Raises:
        DataFormatError: lists the problems, one line each.
    """
    return checked_dataset(read_sources(sources, what), what, processor, tokens, config)


def leaks(record: Record, template: Template, tokens: SpecialTokens, layout: Layout) -> bool:
    """Whether a forensic token stands after answer text in the conversation as it is trained on, inserted tokens
    included."""
    return leaking_tokens(replace(record, turns=conversation(record, template, tokens, layout)), tokens)


def pair_of(record: Record) -> str | None:
    """What an authentic picture and its tampered twin have in common (`provenance.pair` of generated sets), or None."""
    pair = record.provenance.get("pair")
    return pair if isinstance(pair, str) else None


def checked_dataset(
    records: Sequence[Record],
    what: str,
    processor: Any,
    tokens: SpecialTokens,
    config: DataConfig,
    kind: type[ForensicDataset] = ForensicDataset,
    *,
    region_features: bool = False,
) -> ForensicDataset:
    """`load_dataset` for records that are read already.

    Args:
        kind: the class that wraps them; its `has_text` decides what is checked.
        region_features: as for `ForensicDataset`.
    """
    if what == "eval" and config.max_eval_samples is not None:
        records = spread(records, config.max_eval_samples)
    dataset = kind(records, processor, tokens, config, region_features=region_features)
    words = dataset.template.result_words
    for warning in validate_for_training(records, tokens, check_pixels=False, has_text=kind.has_text, words=words):
        logger.warning("%s", warning.message)
    errors = dataset.check_lengths()
    if errors:
        problems = [Problem("error", error.record or "", str(error)) for error in errors]
        raise InvalidDataError(f"{len(errors)} of {len(records)} records of data.{what} cannot be used", problems)
    return dataset
