"""Parses the top-level list of a JSON file entry by entry, so that memory holds one entry and not the file.

Built on the standard library's `JSONDecoder.raw_decode` over a growing buffer. Line and column are those of the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from finetune.errors import DataFormatError, shorten

CHUNK = 1 << 16
_SPACE = re.compile(r"[ \t\n\r]*")
_TAIL = 16  # an entry cut off by the end of the buffer fails this near to it; escapes of two surrogates are the longest


class TextStream:
    """Decoded text of a binary UTF-8 file, with or without BOM, read as it is needed.

    Args:
        stream: opened for reading bytes.
        source: the file's name, for errors.
    """

    def __init__(self, stream: IO[bytes], source: str) -> None:
        self.source = source
        self.text = ""
        self.is_complete = False
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._num_bytes = 0
        self._lines_dropped, self._columns_dropped = 0, 0

    def grow(self) -> None:
        """Read on, at least as much as is already there, so that a long entry is not parsed again and again.

        Raises:
            DataFormatError: UTF-16, or not UTF-8.
        """
        data = self._stream.read(max(CHUNK, len(self.text)))
        if self._num_bytes == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataFormatError("file is UTF-16", source=self.source, fix="save it as UTF-8")
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._num_bytes - pending, self.source) from error
        self._num_bytes += len(data)
        self.is_complete = not data

    def drop(self, end: int) -> None:
        """Forget the text before `end`, keeping count of its lines."""
        lines = self.text.count("\n", 0, end)
        self._columns_dropped = end - self.text.rfind("\n", 0, end) - 1 if lines else self._columns_dropped + end
        self._lines_dropped += lines
        self.text = self.text[end:]

    def skip_space(self) -> str:
        """Forget white space; the next character, "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text)
            self.drop(match.end() if match else 0)
            if self.text or self.is_complete:
                return self.text[:1]
            self.grow()

    def damage(self, message: str, at: int, fix: str | None = None) -> DataFormatError:
        """A syntax error at an index of the buffer."""
        lines = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if lines else self._columns_dropped + at + 1
        return DataFormatError(
            f"damaged JSON at line {self._lines_dropped + lines + 1}, column {column}: {message}",
            source=self.source,
            found=self.text[max(0, at - 30) : at + 30],
            fix=fix or repair(message, self.text, at),
        )

    def value(self) -> Any:
        """Parse and forget one JSON value at the beginning of the buffer.

        Raises:
            DataFormatError: damaged JSON.
        """
        while True:
            try:
                value, end = json.JSONDecoder(object_pairs_hook=once).raw_decode(self.text)
            except RepeatedKeyError as error:
                raise self.damage(str(error), 0, KEEP_ONE) from error
            except json.JSONDecodeError as error:
                # Only these may be the fault of a buffer that ends too early; anything else is damage, wherever it is.
                rest = self.text[error.pos : error.pos + CHUNK].strip()
                is_cut_off = error.msg.startswith("Unterminated string") or len(rest) <= _TAIL
                if self.is_complete or not is_cut_off:
                    raise self.damage(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # thousands of digits, lists nested thousands deep
                message = f"damaged JSON: {str(error)[:100]}"
                raise DataFormatError(message, source=self.source, fix="repair or remove it") from error
            else:
                if end + _TAIL <= len(self.text) or self.is_complete:  # "12" may go on as "123", and "1e+" as "1e+3"
                    self.drop(end)
                    return value
            self.grow()


_FULL_WIDTH = "，：；｛｝［］【】“”‘’＂、"


def repair(message: str, text: str, at: int) -> str:
    """What to type where JSON written by hand breaks off.

    Args:
        message: of `json.JSONDecodeError`, which stands at `text[at]`.
    """
    here = text[at : at + 5]
    if "escape" in message:
        return "write / instead of \\ in paths"
    if here[:1] and here[0] in _FULL_WIDTH:
        return f"type the ASCII character instead of the full-width {here[0]}"
    if here.startswith("'"):
        return "put texts and keys in double quotes"
    if here.startswith(("True", "False", "None")):
        return "write true, false or null"
    if here.startswith(("//", "/*", "#")):
        return "remove the comment, JSON has none"
    if "trailing comma" in message or (here[:1] in ("]", "}") and text[:at].rstrip().endswith(",")):
        return "remove the comma after the last entry"
    return "repair this place"


class RepeatedKeyError(ValueError):
    """A JSON object has one key twice."""


KEEP_ONE = "keep the one that is meant"


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that does not give one key two values: the last one would count, and nobody would know.

    Raises:
        RepeatedKeyError: it does.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise RepeatedKeyError(f"the key {shorten(key)} stands twice in one object, with different values")
    return found


def iter_list(stream: TextStream) -> Iterator[Any]:
    """The entries of the list that begins at the stream's next character `[`.

    Raises:
        DataFormatError: damaged JSON, after the entries before it; text after the list.
    """
    stream.drop(1)
    if stream.skip_space() == "]":
        stream.drop(1)
    else:
        while True:
            stream.skip_space()
            yield stream.value()
            separator = stream.skip_space()
            if separator == "]":
                stream.drop(1)
                break
            if separator != ",":
                raise stream.damage("Expecting ',' delimiter", 0)
            stream.drop(1)
    if stream.skip_space():
        raise stream.damage("Extra data", 0, "name the file .jsonl, if it holds one entry per line")


def not_utf8(error: UnicodeDecodeError, base: int, source: str) -> DataFormatError:
    """`error` in a piece of a file that starts at byte `base`, as one line."""
    return DataFormatError(
        f"not UTF-8 at byte {base + error.start + 1}",
        source=source,
        found=error.object[error.start : error.start + 8],
        fix="save the file as UTF-8 (it may be GBK)",
    )
