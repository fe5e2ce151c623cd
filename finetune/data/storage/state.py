"""What an unfinished split remembers in `.writing/`: its settings, its finished shards, how far they reach.

A shard counts as finished once it stands here; whatever else an interrupted run left is removed before it goes on.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.data.storage.atomic import file_sha256, write_atomically
from finetune.data.storage.jsonl import LIST_SUFFIX, wrong_files
from finetune.data.storage.manifest import Shard, read_manifest
from finetune.errors import ConfigError, DataFormatError

logger = logging.getLogger(__name__)

WORK_DIR = ".writing"
MEDIA_DIRS = ("images", "masks")
FILES_PER_FOLDER = 1000


def state_path(out_dir: Path, split: str) -> Path:
    """Where the state of a split is kept while it is written."""
    return out_dir / WORK_DIR / f"{split}.json"


def save_state(out_dir: Path, split: str, shards: list[Shard], settings: dict[str, Any]) -> None:
    """Write the state.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps({"settings": settings, "shards": [asdict(shard) for shard in shards]}, indent=1)
    write_atomically(state_path(out_dir, split), [text.encode()])


def load_state(out_dir: Path, split: str, settings: dict[str, Any], *, use_hashes: bool) -> list[Shard]:
    """The finished shards of an interrupted split, verified up to the first one that is not as it was written.

    Raises:
        DataFormatError: the state cannot be read. ConfigError: it was written with other settings.
    """
    path = state_path(out_dir, split)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found, shards = value["settings"], [Shard.from_json(shard) for shard in value["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataFormatError(
            "state of the interrupted run cannot be read",
            source=path.name,
            found=str(path),
            fix="start again with overwrite",
        ) from error
    check_settings(found, settings, split)
    for index, shard in enumerate(shards):
        if problem := shard_problem(out_dir, shard, use_hashes=use_hashes):
            logger.warning("%s; split '%s' continues before it", problem, split)
            return shards[:index]
    return shards


def check_settings(found: dict[str, Any], expected: dict[str, Any], split: str) -> None:
    """Refuse to continue what was begun in another way.

    Raises:
        ConfigError: names the first setting that differs.
    """
    expected = json.loads(json.dumps(expected))  # tuples are lists in the file
    for name in expected:
        if found.get(name) != expected[name]:
            if name == "config_hash":
                raise ConfigError(
                    f"split '{split}' was begun with another configuration or other records (config_hash "
                    f"{found.get(name)}, now {expected[name]}); go back to them, start again with overwrite "
                    "(--overwrite), or write to another folder"
                )
            raise ConfigError(
                f"split '{split}' was begun with {name} {found.get(name)!r}, not {expected[name]!r}; "
                "use the same settings, start again with overwrite, or write to another folder"
            )


def shard_problem(out_dir: Path, shard: Shard, *, use_hashes: bool) -> str | None:
    """What differs between a shard and its file (and, of a JSONL part, the files its lines name); None if nothing."""
    path = out_dir / shard.file
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return f"{shard.file} is missing or has another size than when it was written"
    if use_hashes and file_sha256(path) != shard.sha256:
        return f"{shard.file} has other bytes than when it was written"
    listed = path.with_suffix(LIST_SUFFIX)
    if path.suffix == ".jsonl":
        if not listed.is_file():  # a finished set of referenced images has none
            return f"{listed.name} is missing" if path.parent.name == WORK_DIR else None
        for name in wrong_files(listed, out_dir, use_hashes=use_hashes):
            return f"{name} is missing or has other bytes than when it was written"
    return None


def remove_leftovers(out_dir: Path, split: str, shards: list[Shard]) -> None:
    """Remove what a run left behind its last finished shard: half files, shards and pictures without an entry."""
    kept = {str(out_dir / shard.file) for shard in shards}
    kept |= {str((out_dir / shard.file).with_suffix(LIST_SUFFIX)) for shard in shards}
    kept.add(str(state_path(out_dir, split)))
    for path in outputs(out_dir, split):
        if str(path) not in kept:
            path.unlink()
    first = sum(shard.rows for shard in shards)
    for kind in MEDIA_DIRS:
        for folder in (out_dir / kind / split).glob("[0-9]*"):
            if int(folder.name) >= first // FILES_PER_FOLDER:
                for file in folder.iterdir():
                    if int(re.split(r"\D", file.name)[0]) >= first:
                        file.unlink()


def outputs(out_dir: Path, split: str) -> list[Path]:
    """Every file, finished or not, that a writer of this split may have made, pictures left out."""
    pattern = re.compile(rf"{re.escape(split)}(-[0-9]+)?\.(jsonl|parquet|sha256|json)(\.tmp)?")
    folders = [(out_dir, {".jsonl", ".parquet", ".sha256", ".tmp"}), (out_dir / WORK_DIR, None)]
    return [
        path
        for folder, suffixes in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if pattern.fullmatch(path.name) and (suffixes is None or path.suffix in suffixes)
    ]


def refuse_strangers(out_dir: Path, split: str) -> None:
    """Refuse a folder that holds files where this split would be written.

    Raises:
        ConfigError: names the first one.
    """
    found = [*outputs(out_dir, split), *(out_dir / kind / split for kind in MEDIA_DIRS)]
    for path in found:
        if path.exists():
            raise ConfigError(
                f"{path} is there already; continue the run with resume, replace it with overwrite, or write to "
                "another folder"
            )


def remove_split(out_dir: Path, split: str) -> None:
    """Remove everything a writer made of this split, for a fresh start; only where a manifest or state says it did.

    Raises:
        ConfigError: files of that name are there, but no writer made them.
    """
    manifest = read_manifest(out_dir)
    if not state_path(out_dir, split).is_file() and (manifest is None or split not in manifest["splits"]):
        refuse_strangers(out_dir, split)
        return
    for kind in MEDIA_DIRS:
        if (out_dir / kind / split).is_dir():
            shutil.rmtree(out_dir / kind / split)
    for path in outputs(out_dir, split):
        path.unlink()
