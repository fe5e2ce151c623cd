"""Text in a terminal where a Chinese character is two cells wide: width, padding, cutting, tables, streamed wrapping.

Widths follow Unicode's East Asian Width (wide and full-width: 2; combining marks: 0; ambiguous: 1, as terminals outside
legacy CJK locales draw them). No colours, so that output can be piped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

_NO_BREAK_BEFORE = "，。、；：！？）】》」』”’…%,.;:!?)]}"
"""Punctuation that may not begin a line."""


def char_width(char: str) -> int:
    """Cells of one character: 0, 1 or 2."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf", "Cc"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def display_width(text: str) -> int:
    """Cells that a text without line breaks takes."""
    return sum(map(char_width, text))


def fit(text: str, width: int) -> str:
    """`text` on one line, cut with an ellipsis to at most `width` cells."""
    line = " ".join(text.split())
    if display_width(line) <= width:
        return line
    kept, used = "", 0
    for char in line:
        if used + char_width(char) > width - 1:
            break
        kept, used = kept + char, used + char_width(char)
    return kept + "…"


def pad(text: str, width: int, *, is_right: bool = False) -> str:
    """`text` filled with spaces to `width` cells; longer text stays as it is."""
    space = " " * max(0, width - display_width(text))
    return space + text if is_right else text + space


def table(rows: Sequence[Sequence[str]], *, gap: str = "  ") -> str:
    """Rows in aligned columns: the first column to the left, the others to the right."""
    widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        gap.join(pad(cell, width, is_right=i > 0) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


class StreamWrapper:
    """Writes text as it comes, broken into lines of at most `width` cells: between words, or after any wide character.

    Args:
        write: takes each piece of output.
        width: cells of a line, indent included.
        indent: begins every line.
    """

    def __init__(self, write: Callable[[str], object], width: int, indent: str = "") -> None:
        self._write, self._width, self._indent = write, max(width, len(indent) + 8), indent
        self._column = 0
        self._word = ""
        self._has_begun = False

    def feed(self, text: str) -> None:
        """Take the next piece; an unfinished word is held back until it ends, space before the first is dropped."""
        for char in text if self._has_begun else text.lstrip():
            self._has_begun = True
            if char == "\n":
                self._flush_word()
                self._write("\n")
                self._column = 0
            elif char.isspace():
                self._flush_word()
                self._put(" ")
            elif char_width(char) == 2:
                if char not in _NO_BREAK_BEFORE:
                    self._flush_word()
                self._word += char
            else:
                if self._word and char_width(self._word[-1]) == 2 and char not in _NO_BREAK_BEFORE:
                    self._flush_word()
                self._word += char
                if len(self._word) >= self._width - len(self._indent):  # no word: it will not fit into one line
                    self._flush_word()

    def close(self) -> None:
        """Write what is held back, and end the line."""
        self._flush_word()
        if self._column:
            self._write("\n")
        self._column = 0

    def _flush_word(self) -> None:
        word, self._word = self._word, ""
        if self._column > len(self._indent) and self._column + display_width(word) > self._width:
            self._write("\n")
            self._column = 0
        for char in word:
            self._put(char)

    def _put(self, char: str) -> None:
        if self._column + char_width(char) > self._width:
            self._write("\n")
            self._column = 0
            if char == " ":
                return
        if self._column == 0:
            self._write(self._indent)
            self._column = len(self._indent)
        self._write(char)
        self._column += char_width(char)
