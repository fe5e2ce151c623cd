"""Lines and words of text as regions, by classical means: strokes stand out from their surroundings (morphological
top-hat of either sign, after Wu et al. 2008), letters have like heights and stand in rows. Nothing is read.

Upright text and text turned by a right angle; made to find printed lines and to leave photographs without text alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from finetune.data.synthesis.regions.outlines import draw_share, has_size

LEAST_LETTERS = 5
"""A row of fewer letters is as likely a row of leaves or rivets."""
LEAST_LETTERS_IN_ALL = 10
LEAST_INK_IN_LINES = 0.3
LEAST_CONTRAST = 28
"""Levels by which a stroke stands out."""


@dataclass(frozen=True)
class TextLine:
    """One line of text.

    Args:
        words_xyxy: (N, 4) int boxes from left to right, half-open, in the frame that has the lines horizontal.
        letters: how many components it is made of.
    """

    words_xyxy: np.ndarray
    letters: int

    @property
    def box_xyxy(self) -> np.ndarray:
        """(4,) int bounding box."""
        return np.concatenate([self.words_xyxy[:, :2].min(axis=0), self.words_xyxy[:, 2:].max(axis=0)])


def text_region(
    image: np.ndarray, rng: np.random.Generator, area_range: tuple[float, float], shape: str = "text"
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """A box of some words, a line, or neighbouring lines.

    Args:
        image: (H, W, 3) uint8 RGB.
        rng: the sample's own generator.
        area_range: least and largest share of the image; words are joined until the box has the drawn share.
        shape: not used, as for every found shape.

    Returns:
        (H, W) bool and its parameters, or None where the picture has no text or none of that size.
    """
    del shape
    lines, is_vertical = find_text(image)
    if not lines:
        return None
    height, width = image.shape[1::-1] if is_vertical else image.shape[:2]
    wanted = draw_share(area_range, rng) * height * width
    line = lines[int(rng.integers(len(lines)))]
    first = int(rng.integers(len(line.words_xyxy)))
    # From the drawn word on along its line, then the words before it, then the nearest other lines.
    order = [*line.words_xyxy[first:], *line.words_xyxy[:first][::-1]]
    middle = float(line.box_xyxy[1::2].mean())
    others = [each for each in lines if each is not line]
    others.sort(key=lambda each: abs(float(each.box_xyxy[1::2].mean()) - middle))
    order += [each.box_xyxy for each in others]
    box, joined = _pad(order[0], height, width), 1
    for part in order[1:]:
        if _area(box) >= wanted:
            break
        larger = _pad(np.concatenate([np.minimum(box[:2], part[:2]), np.maximum(box[2:], part[2:])]), height, width, 0)
        if _area(larger) <= area_range[1] * height * width:
            box, joined = larger, joined + 1
    region = np.zeros((height, width), dtype=bool)
    region[box[1] : box[3], box[0] : box[2]] = True
    if is_vertical:
        region = np.ascontiguousarray(region.T)
    return (region, {"text_parts": joined}) if has_size(region, area_range) else None


def _pad(box: np.ndarray, height: int, width: int, margin: int = 2) -> np.ndarray:
    return np.array([*np.maximum(box[:2] - margin, 0), *np.minimum(box[2:] + margin, [width, height])])


def _area(box: np.ndarray) -> int:
    return int((box[2] - box[0]) * (box[3] - box[1]))


def find_text(image: np.ndarray) -> tuple[list[TextLine], bool]:
    """Lines of text in a picture.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        the lines from top to bottom, and whether they run vertically; the boxes are then those of the transposed
        picture. An empty list where there is no text.
    """
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (3, 3), 0)
    best: tuple[list[TextLine], bool] = [], False
    for sign in (cv2.MORPH_BLACKHAT, cv2.MORPH_TOPHAT):
        boxes, areas, total = _letters(grey, sign)
        for is_vertical in (False, True):
            lines = _lines(boxes[:, [1, 0, 3, 2]] if is_vertical else boxes, areas, total)
            if sum(line.letters for line in lines) > sum(line.letters for line in best[0]):
                best = lines, is_vertical
    return best


def _letters(grey: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Components of letter size among the dark (`MORPH_BLACKHAT`) or bright (`MORPH_TOPHAT`) strokes of a picture:
    boxes (N, 4), stroke pixels of each (N,), and the stroke pixels of the whole picture."""
    side = max(9, min(grey.shape) // 16) | 1
    strokes = cv2.morphologyEx(grey, sign, np.ones((side, side), np.uint8))
    threshold, _ = cv2.threshold(strokes, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    binary = (strokes > max(threshold, LEAST_CONTRAST)).astype(np.uint8)
    if not 0.01 < binary.mean() < 0.35:
        return np.zeros((0, 4), dtype=np.int32), np.zeros(0, dtype=np.int32), 0
    _, _, stats, _ = cv2.connectedComponentsWithStats(binary)
    x, y, width, height, area = (stats[1:, i] for i in range(5))
    density = area / (width * height)
    long, short = np.maximum(width, height), np.minimum(width, height)
    is_letter = (long >= 5) & (long <= 2 * side) & (short * 8 >= long) & (area >= 8)
    is_letter &= (density > 0.15) & (density < 0.95)
    return np.stack([x, y, x + width, y + height], axis=1)[is_letter], area[is_letter], int(area.sum())


def _lines(boxes: np.ndarray, areas: np.ndarray, total: int) -> list[TextLine]:
    """Rows of letters of like height with their feet on a line; [] unless they hold a fair part of all the strokes, as
    on a page or a sign, while in grass or cloth a chance row holds little of them."""
    lines: list[TextLine] = []
    inked = 0
    if len(boxes) < LEAST_LETTERS_IN_ALL or areas.sum() < LEAST_INK_IN_LINES * total:
        return lines
    tallest = int((boxes[:, 3] - boxes[:, 1]).max())
    order = np.argsort(boxes[:, 0], kind="stable")
    free = [(*map(int, boxes[i]), int(areas[i])) for i in order]
    while len(free) >= LEAST_LETTERS:
        row, rest = [free[0]], []
        for i, box in enumerate(free[1:], start=1):
            last = row[-1]
            if box[0] - last[2] >= 1.8 * tallest:  # sorted by their left side: no later one is nearer
                rest += free[i:]
                break
            heights = last[3] - last[1], box[3] - box[1]
            overlap = min(last[3], box[3]) - max(last[1], box[1])
            in_row = box[0] - last[2] < 1.8 * max(heights) and overlap > 0.4 * min(heights)
            (row if in_row else rest).append(box)
        free = rest
        letters = np.array(row)
        if _is_line(letters):
            lines.append(TextLine(_words(letters[:, :4]), len(letters)))
            inked += int(letters[:, 4].sum())
    if sum(line.letters for line in lines) < LEAST_LETTERS_IN_ALL or inked < LEAST_INK_IN_LINES * total:
        return []
    return sorted(lines, key=lambda line: int(line.box_xyxy[1]))


def _is_line(letters: np.ndarray) -> bool:
    """Whether (N, 5) letters from left to right have like heights and stand on a line that bends slowly."""
    if len(letters) < LEAST_LETTERS:
        return False
    heights, feet = letters[:, 3] - letters[:, 1], letters[:, 3]
    bend = feet - np.convolve(np.pad(feet, 2, mode="edge"), np.full(5, 0.2), "valid")
    is_long = letters[:, 2].max() - letters[:, 0].min() > 3 * heights.mean()
    return bool(is_long and heights.std() < 0.38 * heights.mean() and np.abs(bend).mean() < 0.22 * heights.mean())


def _words(letters: np.ndarray) -> np.ndarray:
    """(N, 4) boxes of the words of a line: letters are split where the gap exceeds half a letter's height."""
    gaps = letters[1:, 0] - np.maximum.accumulate(letters[:, 2])[:-1]
    breaks = np.flatnonzero(gaps > 0.5 * (letters[:, 3] - letters[:, 1]).mean()) + 1
    groups = np.split(letters, breaks)
    return np.array([[*group[:, :2].min(axis=0), *group[:, 2:].max(axis=0)] for group in groups])
