"""A progress bar on a terminal; in a log, a pipe or a service a line every half minute instead of nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal; a shorter job prints none."""


class _Lines(tqdm):
    """tqdm that puts each report on a line of its own, so that a log file can be read; `close` ends the last one."""

    _has_written = False

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the state as one line."""
        self.fp.write("\n" * self._has_written + (str(self) if msg is None else msg))
        self.fp.flush()
        self._has_written = True
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing to wipe: what was written stays."""


def progress_bar(
    iterable: Iterable[Any] | None = None, *, total: int, unit: str, file: TextIO | None = None, **options: Any
) -> tqdm:
    """`tqdm(iterable, total=..., unit=...)`, for a terminal or for a log.

    Args:
        file: where it goes, standard error by default; whether that is a terminal decides.
        options: others of tqdm, such as `desc` or `initial`.
    """
    stream = sys.stderr if file is None else file
    if not stream.isatty():
        options.pop("leave", None)  # what is in a log stays there
        return _Lines(
            iterable, total=total, unit=unit, file=stream, ncols=80, delay=LINE_SECONDS, mininterval=LINE_SECONDS,
            maxinterval=2 * LINE_SECONDS, miniters=1, **options,
        )  # fmt: skip
    return tqdm(iterable, total=total, unit=unit, file=stream, ncols=_columns(stream), **options)


def _columns(stream: TextIO) -> int | None:
    """80 where the terminal says it has none (as under `script`), else None: tqdm finds out itself."""
    try:
        return None if os.get_terminal_size(stream.fileno()).columns else 80
    except OSError:
        return None
