"""What a command refuses to write over: what it reads, and files that it did not write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from finetune.errors import ConfigError

_BEGINNING = 1 << 16


def refuse_inputs(target: str | Path, option: str, inputs: Iterable[str | Path | None]) -> None:
    """Refuse a file to be written that is one of those that are read.

    Raises:
        ConfigError: as said; `option` names where the file came from.
    """
    path = Path(target).resolve()
    if any(given and Path(given).resolve() == path for given in inputs):
        raise ConfigError(f"{option} {target} is read here and would be replaced; give another file")


def refuse_foreign(target: str | Path, option: str, is_own: Callable[[str], bool], what: str) -> None:
    """Refuse a file to be written that is there and was not written by such a command.

    Args:
        is_own: of the beginning of its text, whether it was. what: such files, in words.

    Raises:
        ConfigError: as said.
    """
    path = Path(target)
    if not path.exists():
        return
    if path.is_dir():
        raise ConfigError(f"{option} {target} is a folder; give a file")
    with path.open("rb") as stream:
        beginning = stream.read(_BEGINNING).decode("utf-8", "replace").lstrip("\ufeff")
    if beginning.strip() and not is_own(beginning):
        raise ConfigError(f"{option} {target} exists and is no {what}; give another file, or move it away")


def is_page(beginning: str) -> bool:
    """Whether a file begins as the pages written here do."""
    return beginning.startswith("<!DOCTYPE html>")


def begins_with_key(beginning: str, key: str) -> bool:
    """Whether the first line of JSON lines is an object with this key; a line too long to be read whole is looked at
    as text."""
    line = beginning.split("\n", 1)[0]
    try:
        value = json.loads(line)
    except ValueError:
        return len(line) > _BEGINNING // 2 and f'"{key}": ' in line
    return isinstance(value, dict) and key in value


def refuse_inputs_among(out_dir: Path, folders: Iterable[str], inputs: Iterable[str | Path]) -> None:
    """Refuse an output folder whose folders of pictures, by their names in it, hold what is read.

    Raises:
        ConfigError: as said.
    """
    places = {(out_dir / name).resolve(): out_dir / name for name in folders}
    for given in inputs:
        if (place := places.get(Path(given).resolve().parent)) is not None:
            raise ConfigError(f"{given} is read here, and {place} is written to; give another --out")
