"""Lists the files of a folder by suffix in one fixed order; nothing is opened.

Symbolic links are followed: a link below the data folder is its owner's doing, and data sets are often linked in. A
link that leads back to a folder above itself is not entered again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.errors import DataFormatError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".avif", ".heic", ".ppm")
"""Of files that are taken for images where a folder is read; whether one can be decoded is found when it is opened."""


def iter_files(folder: Path, suffixes: Sequence[str]) -> Iterator[str]:
    """Paths relative to `folder` with `/`, sorted; names that begin with a dot are left out.

    Raises:
        DataFormatError: a folder cannot be read.
    """
    yield from _walk(str(folder), "", tuple(suffixes), ())


def _walk(folder: str, prefix: str, suffixes: tuple[str, ...], above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DataFormatError(f"folder cannot be read ({error.strerror})", found=folder, fix="check it") from error
    for name, is_dir in found:
        if is_dir:
            yield from _walk(os.path.join(folder, name), f"{prefix}{name}/", suffixes, (*above, real))
        elif name.lower().endswith(suffixes):
            yield prefix + name
