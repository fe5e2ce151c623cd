"""A picture with its candidate boxes, each drawn by what became of it; told apart by the line, not by colour alone.

Solid: abnormal and found. Dashed: called abnormal and is not. Double: abnormal and missed. Dotted: rightly left alone.
The ids stand beside the boxes. Lines and letters go with the size of the drawing, so that they are as wide on every
picture that is shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw

from finetune.inference.visualization import Color, drawable_text, font_for

Outcome = Literal["tp", "fp", "fn", "tn"]
Line = Literal["solid", "dashed", "double", "dotted"]
Corners = tuple[int, int, int, int]


class Look(NamedTuple):
    """How boxes of one outcome are drawn: colour, line, its width on the page, and what their label adds to the id."""

    color: Color
    line: Line
    width: int
    mark: str


LOOKS: dict[Outcome, Look] = {
    "tp": Look((46, 204, 113), "solid", 2, "TP"),
    "fp": Look((255, 112, 67), "dashed", 2, "FP"),
    "fn": Look((224, 86, 253), "double", 1, "FN"),
    "tn": Look((236, 240, 241), "dotted", 1, ""),
}
_SHADOW: Color = (0, 0, 0)
_INK: Color = (0, 0, 0)
_SHOWN_SIDE = 270
"""Pixels that a picture usually takes on the page; a drawing of this side has lines of `Look.width` and letters of
`_FONT_SIZE` pixels."""
_FONT_SIZE = 12


class DrawnRegion(NamedTuple):
    """One candidate: id, box in pixels of the original image, and what became of it."""

    id: str
    box_xyxy: tuple[float, float, float, float]
    outcome: Outcome


def draw_regions(
    image: Image.Image, regions: Sequence[DrawnRegion], side: int = 540, *, with_marks: bool = True
) -> Image.Image:
    """The picture, its longer side `side` pixels, with all boxes; those that matter most lie on top.

    Args:
        image: RGB, upright. regions: boxes in its own pixels.
        with_marks: TP, FP and FN stand beside the ids; without, for labels that no model was asked about.

    Returns:
        A new RGB image.
    """
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pen = _Pen(ImageDraw.Draw(shown), size, max(1.0, side / _SHOWN_SIDE))
    order: dict[Outcome, int] = {"tn": 0, "tp": 1, "fp": 2, "fn": 3}
    ordered = sorted(regions, key=lambda region: order[region.outcome])
    for region in ordered:
        pen.box(_scaled(region, scale, size), LOOKS[region.outcome])
    for region in ordered:
        pen.label(region, _scaled(region, scale, size), with_mark=with_marks)
    return shown


def _scaled(region: DrawnRegion, scale: float, size: tuple[int, int]) -> Corners:
    """Corners in the drawing, within the picture."""
    x1, y1, x2, y2 = (round(value * scale) for value in region.box_xyxy)
    right, bottom = size[0] - 1, size[1] - 1
    return min(max(x1, 0), right), min(max(y1, 0), bottom), min(max(x2, 0), right), min(max(y2, 0), bottom)


class _Pen(NamedTuple):
    """Draws on a picture of `size` (W, H); `zoom` drawn pixels are one on the page."""

    draw: ImageDraw.ImageDraw
    size: tuple[int, int]
    zoom: float

    def box(self, box: Corners, look: Look) -> None:
        """One box, its line with a dark rim so that it shows on any ground."""
        width = round(look.width * self.zoom)
        if look.line in ("solid", "double"):
            self._frame(box, look.color, width)
            gap = 3 * width + 1
            if look.line == "double" and min(box[2] - box[0], box[3] - box[1]) > 3 * gap:
                self._frame((box[0] + gap, box[1] + gap, box[2] - gap, box[3] - gap), look.color, width)
            return
        pattern = (
            (round(9 * self.zoom), round(6 * self.zoom)) if look.line == "dashed" else (width, round(4 * self.zoom))
        )
        x1, y1, x2, y2 = box
        corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1))
        for begin, end in itertools.pairwise(corners):
            self._broken_line(begin, end, pattern, look.color, width)

    def _frame(self, box: Corners, color: Color, width: int) -> None:
        self.draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=_SHADOW, width=width + 2)
        self.draw.rectangle(box, outline=color, width=width)

    def _broken_line(
        self, begin: tuple[int, int], end: tuple[int, int], pattern: tuple[int, int], color: Color, width: int
    ) -> None:
        """Pieces along a horizontal or vertical side."""
        total = abs(end[0] - begin[0]) + abs(end[1] - begin[1])
        if not total:
            return
        step = ((end[0] - begin[0]) / total, (end[1] - begin[1]) / total)
        half = width / 2
        for start in range(0, total, sum(pattern)):
            stop = min(start + pattern[0], total)
            xs = sorted((begin[0] + step[0] * start, begin[0] + step[0] * stop))
            ys = sorted((begin[1] + step[1] * start, begin[1] + step[1] * stop))
            if step[0]:
                ys = [ys[0] - half, ys[1] + half]
            else:
                xs = [xs[0] - half, xs[1] + half]
            self.draw.rectangle((xs[0] - 1, ys[0] - 1, xs[1] + 1, ys[1] + 1), fill=_SHADOW)
            self.draw.rectangle((xs[0], ys[0], xs[1], ys[1]), fill=color)

    def label(self, region: DrawnRegion, box: Corners, *, with_mark: bool) -> None:
        """The id above the box, or inside it where there is no room above."""
        look = LOOKS[region.outcome]
        text = drawable_text(f"{region.id} {look.mark if with_mark else ''}".strip())
        if not text:
            return
        font = font_for(text, round(_FONT_SIZE * self.zoom))
        left, top, right, bottom = self.draw.textbbox((0, 0), text, font=font)
        rim = round(2 * self.zoom)
        width, height = right - left + 2 * rim, bottom - top + 2 * rim
        x = max(0, min(box[0], self.size[0] - width))
        y = box[1] - height - 1 if box[1] - height - 1 >= 0 else min(box[1] + rim, max(0, self.size[1] - height))
        self.draw.rectangle((x, y, x + width, y + height), fill=look.color)
        self.draw.text((x + rim - left, y + rim - top), text, fill=_INK, font=font)
