"""A progress bar on a terminal; in a log, a pipe or a service a line every half minute instead of nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal; a shorter job prints none."""


class _Lines(tqdm):
    """tqdm that writes whole lines, each when it is due and at no other time, so that a log file can be read."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._shown_at, self._has_written = time.monotonic(), False
        self.disable = False  # as tqdm decides
        super().__init__(*arguments, **options)

    def refresh(self, *_: Any, **__: Any) -> None:
        """Write a line if the last one is long enough ago; `tqdm.write` asks for one after every text."""
        if time.monotonic() - self._shown_at >= LINE_SECONDS:
            self.display()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the state as one line."""
        self.fp.write(f"{str(self) if msg is None else msg}\n")
        self.fp.flush()
        self._shown_at, self._has_written = time.monotonic(), True
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing to wipe: what was written stays."""

    def close(self) -> None:
        """End with a line of the final state, where there were lines before."""
        if self.disable:
            return
        if self._has_written:
            self.display()
        self.disable = True
        self._decr_instances(self)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, total: int | None, unit: str, file: TextIO | None = None, **options: Any
) -> tqdm:
    """`tqdm(iterable, total=..., unit=...)`, for a terminal or for a log.

    Args:
        total: how many there will be; None where that is not known.
        file: where it goes, standard error by default; whether that is a terminal decides.
        options: others of tqdm, such as `desc` or `initial`.
    """
    stream = sys.stderr if file is None else file
    if not stream.isatty():
        options.pop("leave", None)  # what is in a log stays there
        return _Lines(
            iterable, total=total, unit=unit, file=stream, ncols=80, mininterval=min(1.0, LINE_SECONDS), miniters=1,
            **options,
        )  # fmt: skip
    return tqdm(iterable, total=total, unit=unit, file=stream, ncols=_columns(stream), **options)


def _columns(stream: TextIO) -> int | None:
    """80 where the terminal says it has none (as under `script`), else None: tqdm finds out itself."""
    try:
        return None if os.get_terminal_size(stream.fileno()).columns else 80
    except OSError:
        return None
