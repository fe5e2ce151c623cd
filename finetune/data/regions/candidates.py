"""Candidate boxes without a defect that geometry cannot tell from the labelled ones.

Every labelled box of a split is a card: its place and size in parts of the image. Boxes without a defect are dealt from
a shuffled deck of these cards, images with defects first, since only there a card can be refused (it must not overlap
what is labelled); refused cards go to normal images. A deck is dealt out before the next one is begun, so that both
kinds come from one distribution; both have whole pixels. No pixels are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.data.regions.labels import Box, LabelledBox
from finetune.data.regions.settings import RegionsConfig
from finetune.data.regions.survey import RegionImage

MAX_OVERLAP = 0.1
"""Most of either box that a candidate without a defect may share with any other box; its IoU is below that."""

Card = tuple[float, float, float, float]
"""x1, y1, x2, y2 in parts of the image's width and height."""


@dataclass(frozen=True)
class Candidate:
    """One region of an image: id `R1`, `R2`, ..., corners, and the type of its defect, None without one."""

    id: str
    box_xyxy: Box
    defect_type: str | None


@dataclass
class Dealt:
    """Candidates of one split.

    Args:
        candidates: per image id, in the order of their ids.
        dropped: labelled boxes left out because of `max_boxes_per_image`.
        missing: boxes without a defect that no card fitted for, by image id.
        unused: normal images left without any candidate.
    """

    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    dropped: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def deal_candidates(
    images: Sequence[RegionImage], config: RegionsConfig, rng: np.random.Generator, spare: Sequence[Card] = ()
) -> Dealt:
    """Candidates of the images of one split.

    Args:
        images: without problems.
        spare: cards for a split that has no labelled box of its own.
    """
    abnormal = [image for image in images if image.is_abnormal]
    kept = {image.id: _kept(image, config, rng) for image in abnormal}
    dealt = Dealt(dropped=sum(len(image.boxes) - len(kept[image.id]) for image in abnormal))
    cards = [card_of(whole(box.box_xyxy), image.size_hw) for image in abnormal for box in kept[image.id]]
    deck = _Deck(cards or spare, rng)
    chosen: dict[str, list[Box]] = {image.id: [] for image in images}
    owed = {image.id: round(config.abnormal_neg_per_pos * len(kept[image.id])) for image in abnormal}
    for image in _largest_first(abnormal, kept):
        found = chosen[image.id]
        taken = [whole(box.box_xyxy) for box in image.boxes] + image.avoid
        _deal(deck, image, min(owed[image.id], config.max_boxes_per_image - len(kept[image.id])), taken, found, config)
        if len(found) < owed[image.id]:
            dealt.missing[image.id] = owed[image.id] - len(found)
    counts = [len(kept[image.id]) + len(chosen[image.id]) for image in abnormal]
    for image in images:
        if not image.is_abnormal:
            wanted = _num_decoys(config, counts, rng)
            _deal(deck, image, wanted, [], chosen[image.id], config)
            if len(chosen[image.id]) < wanted:
                dealt.missing[image.id] = wanted - len(chosen[image.id])
    for image in images:
        regions: list[tuple[Box, str | None]] = [
            (whole(box.box_xyxy), box.defect_type) for box in kept.get(image.id, [])
        ]
        regions += [(box, None) for box in chosen[image.id]]
        if regions:
            dealt.candidates[image.id] = _numbered(regions, rng)
        else:
            dealt.unused.append(image.id)
    return dealt


def card_of(box: Box, size_hw: tuple[int, int]) -> Card:
    """A box in parts of its image."""
    height, width = size_hw
    return (box[0] / width, box[1] / height, box[2] / width, box[3] / height)


def whole(box: Box) -> Box:
    """Corners in whole pixels, halves upwards: a side of at least one pixel stays one.

    Labels may have fractions, boxes laid by a card have none, which a model would see in an enlarged image.
    """
    x1, y1, x2, y2 = (float(math.floor(corner + 0.5)) for corner in box)
    return (x1, y1, x2, y2)


def overlap(a: Box, b: Box) -> float:
    """Common area as a part of the smaller box; never below the IoU."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((each[2] - each[0]) * (each[3] - each[1]) for each in (a, b))


class _Deck:
    """Cards in random order; one that is refused goes back under the ones not looked at yet."""

    def __init__(self, cards: Sequence[Card], rng: np.random.Generator) -> None:
        self._all, self._rng = list(cards), rng
        self._left: list[Card] = []

    def find(self, fits: _Fits) -> Box | None:
        """The box of the first card that fits, taken out; of a second deck where none of this one does."""
        for attempt in range(2):
            if not self._left or attempt:
                self._left += [self._all[i] for i in self._rng.permutation(len(self._all))]
            for place, card in enumerate(self._left):
                if (box := fits(card)) is not None:
                    del self._left[place]
                    return box
            if len(self._left) > len(self._all):  # the second deck held nothing new: keep what was there
                del self._left[-len(self._all) :]
                break
        return None


@dataclass(frozen=True)
class _Fits:
    """Whether a card can be laid on an image: where, or None."""

    image: RegionImage
    taken: Sequence[Box]
    min_size: float

    def __call__(self, card: Card) -> Box | None:
        height, width = self.image.size_hw
        box = x1, y1, x2, y2 = whole((card[0] * width, card[1] * height, card[2] * width, card[3] * height))
        if min(x2 - x1, y2 - y1) < self.min_size:
            return None
        return None if any(overlap(box, other) > MAX_OVERLAP for other in self.taken) else box


def _deal(
    deck: _Deck, image: RegionImage, wanted: int, taken: list[Box], found: list[Box], config: RegionsConfig
) -> None:
    for _ in range(wanted):
        box = deck.find(_Fits(image, [*taken, *found], config.min_box_size))
        if box is None:
            return
        found.append(box)


def _kept(image: RegionImage, config: RegionsConfig, rng: np.random.Generator) -> list[LabelledBox]:
    """The labelled boxes that leave room for as many without a defect as are wanted."""
    limit = max(int(config.max_boxes_per_image / (1 + config.abnormal_neg_per_pos)), 1)
    if len(image.boxes) <= limit:
        return image.boxes
    chosen = sorted(rng.choice(len(image.boxes), limit, replace=False).tolist())
    return [image.boxes[index] for index in chosen]


def _largest_first(images: Iterable[RegionImage], kept: dict[str, list[LabelledBox]]) -> list[RegionImage]:
    """Images with little room left choose first, while there are many cards."""

    def labelled_part(image: RegionImage) -> float:
        cards = [card_of(box.box_xyxy, image.size_hw) for box in kept[image.id]]
        return sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in cards)

    return sorted(images, key=lambda image: (-labelled_part(image), image.id))


def _num_decoys(config: RegionsConfig, counts: Sequence[int], rng: np.random.Generator) -> int:
    """How many candidates a normal image is to have."""
    if config.normal_decoys_per_image == "match":
        return int(rng.choice(counts)) if counts else min(2, config.max_boxes_per_image)
    return min(int(config.normal_decoys_per_image), config.max_boxes_per_image)


def _numbered(regions: list[tuple[Box, str | None]], rng: np.random.Generator) -> list[Candidate]:
    order = rng.permutation(len(regions))
    return [Candidate(f"R{place}", *regions[index]) for place, index in enumerate(order, 1)]
