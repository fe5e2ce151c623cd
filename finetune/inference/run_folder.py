"""One output folder belongs to one run: what made it stands in its `run.json`, and another run does not write into it.

The same run may go on where it stopped; another one of its kind needs `--overwrite`, which removes what the earlier run
wrote and leaves every other file alone. What no such run wrote is never removed. Nothing is loaded here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.storage.atomic import file_sha256, write_atomically
from finetune.errors import ConfigError, shorten

RUN_FILE = "run.json"
KINDS = INFERENCE, EVALUATION, REGIONS = (
    "vision inference", "vision evaluation", "evaluation of candidate regions",
)  # fmt: skip
"""What a `run.json` may be of."""
OUTPUT_PICTURES = ("masks", "overlays", "heatmaps", "worst", "curves")
"""Folders of pictures that runs write."""
LOCK_FILE = ".lock"
"""Of the process that writes to the folder (`finetune.data.locking`), where it takes one; it belongs to no run."""


def open_run(
    folder: Path, kind: str, identity: Mapping[str, Any], *, own: Sequence[str], overwrite: bool, can_continue: bool
) -> bool:
    """Take a folder for a run; True where this very run was begun in it before and goes on.

    Args:
        kind: what the run is, in words.
        identity: everything that its results depend on, as JSON; the first difference is named.
        own: names in the folder that such a run writes; those of an earlier run are removed with `overwrite`.
        can_continue: whether a run of the same identity may go on; otherwise it is refused like another one.

    Raises:
        ConfigError: the folder is another run's, or holds files of no run, and `overwrite` is not given; or, whatever
            is given, the folder is of another kind of run or something in it would be replaced that no run wrote.
    """
    new = json.loads(json.dumps({"kind": kind, **identity}, ensure_ascii=False))  # as it will be read back
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the output")
    file = folder / RUN_FILE
    if file.is_file():
        old = _read(file)
        if old.get("kind") != new["kind"]:
            raise ConfigError(f"{folder} {_difference(old, new)}, which is never replaced; give another folder")
        if not overwrite:
            if old == new and can_continue:
                return True
            raise ConfigError(f"{folder} {_difference(old, new)}; add --overwrite, or give another folder")
    elif folder.is_dir() and (found := {path.name for path in folder.iterdir()} - {LOCK_FILE}) and not overwrite:
        raise ConfigError(
            f"{folder} holds files that are of no {kind}, e.g. {min(found)}; give another folder, or add --overwrite "
            "to write beside them"
        )
    elif in_the_way := [name for name in own if (folder / name).exists()]:
        raise ConfigError(
            f"{folder / in_the_way[0]} is of no {kind}, and this run would replace it; give another folder, or move it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        remove(folder, [*own, RUN_FILE])
    write_atomically(file, [json.dumps(new, indent=1, ensure_ascii=False).encode()])
    return False


def holds_output_pictures(folder: Path) -> bool:
    """Whether a folder is one of `OUTPUT_PICTURES` of a run: beside predictions, or beside a `run.json` of ours."""
    if folder.name not in OUTPUT_PICTURES:
        return False
    if (folder.parent / "predictions.jsonl").is_file():
        return True
    try:
        return _read(folder.parent / RUN_FILE).get("kind") in KINDS
    except ConfigError:
        return False


def remove(folder: Path, names: Sequence[str]) -> None:
    """Remove files and folders of these names from a folder, where they are."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def folder_identity(folder: str | Path | None) -> dict[str, Any] | None:
    """What tells one folder of weights from another, wherever it lies: hashes of its files.

    Of a large file, such as a 3B model's weights, a sample is hashed: reading all of it would take a minute.
    None for no folder; a name that is no folder (of a hub) is its own identity.
    """
    if folder is None or not str(folder):
        return None
    path = Path(folder)
    if not path.exists():
        return {"name": str(folder)}
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json"))
    return {file.name: _hash(file) for file in files}


_WHOLE_BYTES, _SAMPLES, _SAMPLE_BYTES = 64 << 20, 64, 64 << 10


def _hash(file: Path) -> str:
    """SHA-256 of a file; above `_WHOLE_BYTES` of its size and of `_SAMPLES` pieces at even distances."""
    size = file.stat().st_size
    if size <= _WHOLE_BYTES:
        return file_sha256(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for k in range(_SAMPLES):
            stream.seek(k * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return f"sample:{digest.hexdigest()}"


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read; give another folder, or remove this one") from error
    return value if isinstance(value, dict) else {}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How two runs differ, in words: the first key whose values are not the same."""
    if old == new:
        return f"already holds this {new['kind']}"
    if old.get("kind") != new["kind"]:
        return f"holds the output of another kind of run ({old.get('kind', 'unknown')})"
    before, after = _flat(old), _flat(new)
    key = next(key for key in [*after, *before] if before.get(key) != after.get(key))
    return f"holds the output of another run: {key} was {shorten(before.get(key))}, now it is {shorten(after.get(key))}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
