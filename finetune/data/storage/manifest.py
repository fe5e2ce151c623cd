"""What a stored set says of itself: `manifest.json`, and `README.md` as the card that `datasets.load_dataset` reads.

The card is needed because load_dataset(FOLDER) would otherwise take a folder of many image files for an image folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import finetune
from finetune.data.storage.atomic import write_atomically
from finetune.data.storage.serialization import COLUMNS
from finetune.errors import DataFormatError
from finetune.schema import Record

MANIFEST_NAME = "manifest.json"
CARD_NAME = "README.md"
FORMAT = "qwen-forensics stored set"
FORMAT_VERSION = 1

_CARD_MARK = "<!-- written with every split; remove this line to keep a text of your own -->"
_IMAGE_TYPES = {"parquet": "list of {bytes, path}", "jsonl": "list of paths"}
_TYPES = {
    "id": "text",
    "group": "text",
    "labels": "list of 0 (real), 1 (tampered), null (unknown)",
    "polygons": "list of regions or null, per image; region: list of points [x, y] in pixels of the upright image",
    "evidence": "list of text or null",
    "messages": "list of {role, content}",
    "provenance": "JSON object",
}


@dataclass(frozen=True)
class SetInfo:
    """What the maker of a set tells about it.

    Args:
        seed: of splits and synthesis.
        config_hash: of the configuration it was made with; a run is only continued with the same one.
        sources: one object per source, e.g. its name and hash; no absolute paths, so that sets can be compared.
    """

    seed: int | None = None
    config_hash: str | None = None
    sources: tuple[dict[str, Any], ...] = ()


@dataclass
class Counts:
    """How many records and images a split or shard holds; images are counted by their label."""

    records: int = 0
    images: int = 0
    authentic: int = 0
    tampered: int = 0
    unlabelled: int = 0

    def add(self, record: Record) -> None:
        """Count one record."""
        self.records += 1
        for target in record.targets:
            self.images += 1
            name = {0: "authentic", 1: "tampered", None: "unlabelled"}[target.label]
            setattr(self, name, getattr(self, name) + 1)


@dataclass
class Shard:
    """One finished file, and the source records it and the files before it account for."""

    file: str
    rows: int
    bytes: int
    sha256: str
    source_end: int
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Shard:
        """The inverse of `asdict`."""
        return cls(**{**value, "counts": Counts(**value["counts"])})


def total(shards: Iterable[Shard]) -> Counts:
    """The counts of several shards together."""
    result = Counts()
    for shard in shards:
        for name, number in asdict(shard.counts).items():
            setattr(result, name, getattr(result, name) + number)
    return result


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stored set; None where the folder has none of this project's.

    Raises:
        DataFormatError: a damaged one, or one of a later version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataFormatError(
            "manifest cannot be read", source=path.name, found=str(path), fix="make the set again"
        ) from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    is_whole = isinstance(value.get("splits"), dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("shards"), list) for entry in value["splits"].values()
    )
    if value.get("format_version") != FORMAT_VERSION or not is_whole:
        raise DataFormatError(
            "manifest of another version" if is_whole else "manifest lacks its splits",
            source=path.name,
            found=value.get("format_version"),
            expected=f"format_version {FORMAT_VERSION}",
            fix="make the set again with this version",
        )
    return value


def add_split(
    folder: Path, split: str, storage: str, shards: list[Shard], info: SetInfo, settings: dict[str, Any]
) -> None:
    """Enter a finished split into the folder's manifest and card.

    Raises:
        OSError: the files cannot be written.
    """
    manifest = read_manifest(folder) or {"splits": {}}
    counts = total(shards)
    image_type = _IMAGE_TYPES[storage]
    types = {**_TYPES, "images": image_type, "masks": f"{image_type}, HxW for all-zero masks, or null"}
    entry = {
        **asdict(counts),
        "source_records": shards[-1].source_end if shards else 0,
        "shards": [asdict(shard) for shard in shards],
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "storage": storage,
        "schema": {name: types[name] for name in COLUMNS},
        "splits": {**manifest["splits"], split: entry},
        "seed": info.seed,
        "config_hash": info.config_hash,
        "sources": list(info.sources),
        "settings": settings,
        "versions": _versions(),
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
    write_atomically(folder / MANIFEST_NAME, [text.encode()])
    card = folder / CARD_NAME
    has_records = any(entry["shards"] for entry in manifest["splits"].values())
    if not has_records:
        return
    if not card.exists() or _CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
        write_atomically(card, [_card(manifest).encode()])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "qwen-forensics": finetune.__version__}
    return {**versions, **{name: importlib.metadata.version(name) for name in ("pillow", "numpy", "pyarrow")}}


def _card(manifest: dict[str, Any]) -> str:
    """The card: YAML with the split's files and the column types, then a few words."""
    is_parquet = manifest["storage"] == "parquet"
    splits = {name: entry for name, entry in manifest["splits"].items() if entry["shards"]}
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for name in splits:
        lines += [f"  - split: {name}", f"    path: {name}-*.parquet" if is_parquet else f"    path: {name}.jsonl"]
    lines += ["dataset_info:", "  features:"]
    image = "image" if is_parquet else "string"
    for name, kind in (("id", "dtype: string"), ("group", "dtype: string"), ("images", f"list: {image}")):
        lines += [f"  - name: {name}", f"    {kind}"]
    lines += ["  - name: labels", "    list: int64", "  - name: masks", f"    list: {image}"]
    lines += ["  - name: polygons", "    list:", "      list:", "        list:", "          list: float64"]
    lines += ["  - name: evidence", "    list: string", "  - name: messages", "    list:"]
    lines += ["    - name: role", "      dtype: string", "    - name: content", "      dtype: string"]
    lines += ["  - name: provenance", "    dtype: json", "---", "", _CARD_MARK, "", "# Stored data set", ""]
    lines += ["| split | records | images | authentic | tampered |", "|---|---|---|---|---|"]
    for name, entry in splits.items():
        cells = [name, *(str(entry[key]) for key in ("records", "images", "authentic", "tampered"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
