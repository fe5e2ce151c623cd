"""A previewed record as lines for a terminal: supervised text on green, a small picture with the mask's outline.

Pure strings; without colour the same content in marks that survive a pipe. Widths follow East Asian Wide; control
characters of the data are shown escaped, so that a data file cannot steer the terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from finetune.data.preview import ImageView, Piece, RecordView

Depth = Literal["none", "256", "truecolor"]
OUTLINE = (255, 64, 48)
_LOOKS = {
    "supervised": "30;48;5;157",
    "forensic": "30;48;5;219",
    "forensic, unsupervised": "4;35",
    "image": "1;36",
    "context": "",
    "error": "1;31",
    "warning": "1;33",
}
_DASH = {False: "─", True: "-"}
_WORDS = {0: "real", 1: "tampered", None: "unknown"}
_MAX_COLUMNS, _MAX_ROWS = 60, 22


@dataclass(frozen=True)
class Style:
    """What the terminal can do.

    Args:
        width: columns.
        depth: colours; `none` for marks in their place.
        marks: stand around supervised text where there is no colour.
    """

    width: int = 80
    depth: Depth = "none"
    marks: tuple[str, str] = ("⟦", "⟧")

    @property
    def is_ascii(self) -> bool:
        """Whether line drawing must do without Unicode, as the marks do."""
        return self.marks[0].isascii()


def legend(style: Style) -> str:
    """One line that says what the colours or marks mean."""
    if style.depth == "none":
        return f"{style.marks[0]}supervised{style.marks[1]}: text the model is taught; all else is context"
    names = ("supervised", "forensic", "image", "context")
    return "  ".join(_paint(f" {name} ", name, style) for name in names)


def record_text(view: RecordView, style: Style, title: str = "") -> str:
    """Header, images with their masks, the conversation and the problems of one record."""
    record = view.record
    lines = [_rule(f"{title}{record.id}", style)]
    details = [record.source] if record.source else []
    details += [f"group {record.group}"] if record.group else []
    details += [f"{key} {value}" for key, value in record.provenance.items() if isinstance(value, (str, int, float))]
    if details:
        lines.append(_clip(" · ".join(details) if not style.is_ascii else "; ".join(details), style))
    if view.pieces:
        lines += wrap([(token_line(view), "context")], style)
    for number, image in enumerate(view.images, 1):
        lines += wrap([(image_line(image, number), "context")], style)
        lines += _picture(image, style)
    lines += _conversation(view.pieces, style)
    for problem in view.problems:
        text = f"{problem.severity}: {problem.message}"
        lines += wrap([(text, problem.severity)], style)
    return "\n".join(lines)


def token_line(view: RecordView) -> str:
    """`412 of 4096 tokens: 91 supervised, 252 image`."""
    if not view.has_ids:
        return f"{view.num_image_tokens} image tokens; give --config or --model to count the others"
    return (
        f"{view.num_tokens} of {view.max_length} tokens: {view.num_supervised} supervised, "
        f"{view.num_image_tokens} image"
    )


def image_line(image: ImageView, number: int) -> str:
    """Sizes (height x width), label and mask of one image."""
    own = image.frame.original_hw
    share = image.tampered_share
    mask = "no mask" if share is None or image.mask is None else (
        f"mask {100 * share:.2f} % of {image.mask.shape[0]}x{image.mask.shape[1]}"
    )  # fmt: skip
    label = _WORDS[image.label] if image.label is None else f"{image.label} {_WORDS[image.label]}"
    return f"image {number}: {own[0]}x{own[1]}, seen at {image.seen}; label {label}; {mask}"


def wrap(runs: Iterable[tuple[str, str]], style: Style) -> list[str]:
    """Runs of (text, look) as lines of at most `style.width` columns; a line break in the text begins a new line."""
    lines: list[str] = []
    line, part, used = "", "", 0
    for text, look in runs:
        for char in text:
            shown = "" if char == "\n" else _visible(char)
            columns = sum(map(char_width, shown))
            if char == "\n" or used + columns > style.width:
                lines.append(line + _paint(part, look, style))
                line, part, used = "", "", 0
            part += shown
            used += columns
        line, part = line + _paint(part, look, style), ""
    return [*lines, line] if line else lines


def char_width(char: str) -> int:
    """Terminal columns of a character: 2 for wide and full-width ones, 0 for combining marks."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def half_blocks(rgb: np.ndarray, depth: Depth) -> list[str]:
    """(2n, w, 3) uint8 as n lines of `▀`, whose colour is the upper pixel and whose background the lower one."""
    lines = []
    for upper, lower in zip(rgb[::2], rgb[1::2], strict=True):
        cells = [
            f"\x1b[38;{_color(top, depth)};48;{_color(bottom, depth)}m▀"
            for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def thumbnail(image: ImageView, columns: int, rows: int) -> np.ndarray:
    """The image with the outline of its mask, one pixel wide: (h, w, 3) uint8, h even, w <= columns, h <= 2 * rows."""
    width, height = image.image.size
    scale = min(columns / width, 2 * rows / height)
    size_wh = max(1, round(width * scale)), max(2, 2 * round(height * scale / 2))
    small = np.asarray(image.image.resize(size_wh, Image.Resampling.BOX)).copy()  # (h, w, 3)
    if image.mask is not None:
        marked = _marked(image.mask, size_wh)
        inner = cv2.erode(marked, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
        small[(marked > inner)] = OUTLINE
    return small


def _marked(mask: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """(h, w) uint8: 1 where half of the area is tampered, or any of it where that would leave nothing."""
    interpolation = cv2.INTER_AREA if size_wh[0] < mask.shape[1] else cv2.INTER_NEAREST
    area = cv2.resize(mask.astype(np.float32), size_wh, interpolation=interpolation)
    return ((area >= 0.5) if (area >= 0.5).any() else (area > 0)).astype(np.uint8)


def _picture(image: ImageView, style: Style) -> list[str]:
    columns = min(style.width, _MAX_COLUMNS)
    if style.depth != "none":
        return half_blocks(thumbnail(image, columns, _MAX_ROWS), style.depth)
    if image.mask is None or not image.mask.any():
        return []
    height, width = image.mask.shape
    scale = min(columns / width, 2 * _MAX_ROWS / height)
    marked = _marked(image.mask, (max(1, round(width * scale)), max(1, round(height * scale / 2))))
    return ["".join("#" if value else "." for value in row) for row in marked.tolist()]


def _conversation(pieces: Sequence[Piece], style: Style) -> list[str]:
    runs: list[tuple[str, str]] = []
    was_supervised = False
    for piece in pieces:
        if style.depth == "none" and piece.is_supervised != was_supervised:
            runs.append((style.marks[0] if piece.is_supervised else style.marks[1], "context"))
        was_supervised = piece.is_supervised
        text = piece.text.replace("\n", "⏎\n") if piece.is_supervised and style.depth != "none" else piece.text
        runs.append((text, _look(piece)))
    if style.depth == "none" and was_supervised:
        runs.append((style.marks[1], "context"))
    return wrap(_joined(runs), style)


def _look(piece: Piece) -> str:
    if piece.kind == "forensic":
        return "forensic" if piece.is_supervised else "forensic, unsupervised"
    if piece.is_supervised:
        return "supervised"
    return "image" if piece.kind == "image" else "context"


def _joined(runs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    joined: list[tuple[str, str]] = []
    for text, look in runs:
        if joined and joined[-1][1] == look:
            joined[-1] = (joined[-1][0] + text, look)
        else:
            joined.append((text, look))
    return joined


def _paint(text: str, look: str, style: Style) -> str:
    code = _LOOKS[look]
    return f"\x1b[{code}m{text}\x1b[0m" if text and code and style.depth != "none" else text


def _rule(text: str, style: Style) -> str:
    title = f"{_DASH[style.is_ascii] * 2} {_clip(text, replace(style, width=style.width - 4))} "
    return title + _DASH[style.is_ascii] * max(style.width - sum(map(char_width, title)), 0)


def _clip(text: str, style: Style) -> str:
    """The first line of a text, with dots where it goes on."""
    lines = wrap([(_line(text), "context")], replace(style, width=max(style.width - 3, 1), depth="none"))
    return lines[0] + ("..." if len(lines) > 1 else "") if lines else ""


def _line(text: str) -> str:
    return "".join(map(_visible, " ".join(text.split())))


def _visible(char: str) -> str:
    """A character that prints itself; controls, bidirectional marks and the like as an escape."""
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return char.encode("unicode_escape").decode("ascii")
    return char


def _color(rgb: Sequence[int], depth: Depth) -> str:
    if depth == "truecolor":
        return f"2;{rgb[0]};{rgb[1]};{rgb[2]}"
    red, green, blue = (round(value / 255 * 5) for value in rgb)
    return f"5;{16 + 36 * red + 6 * green + blue}"
