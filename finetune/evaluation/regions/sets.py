"""Files of candidate regions that an evaluation reads: their labels, which split they may be, and what two files share.

A record that cannot be used is kept as an error; a file that must not be used at all is refused. No model here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.fingerprints import file_sha256
from finetune.data.readers import iter_records
from finetune.data.regions.text import POSITIVE_IDS, REGIONS, record_regions
from finetune.data.sources import spread
from finetune.data.storage import is_stored
from finetune.errors import ConfigError, DataFormatError, shorten
from finetune.inference.regions.predictor import region_ids
from finetune.schema import Record

UNNAMED = "abnormal"
"""Type of an abnormal region whose label names none."""


@dataclass(frozen=True)
class RegionSet:
    """One file as read.

    Args:
        path: as it was given.
        records: those with candidates and labels.
        rejected: why each of the others cannot be used.
    """

    path: str
    records: list[Record]
    rejected: list[DataFormatError]


def check_there(path: str, option: str) -> None:
    """Refuse a file that is not there, without reading it.

    Raises:
        DataFormatError: nothing of this name.
    """
    if not Path(path).exists() and not is_stored(path):
        raise DataFormatError(f"{option}: file not found", found=path, fix="check the path")


def read_region_set(path: str, max_samples: int | None = None) -> RegionSet:
    """Records of a file with their labels checked; nothing is decoded.

    Args:
        max_samples: take that many, evenly spread; None takes all.

    Raises:
        DataFormatError: the file as a whole, or none of its records can be used.
    """
    records: list[Record] = []
    rejected: list[DataFormatError] = []
    for number, entry in enumerate(iter_records(path)):
        if isinstance(entry, DataFormatError):
            if number == 0 and entry.record is None and entry.source == Path(path).name:
                raise entry  # the file as a whole, not one of its lines
            rejected.append(entry)
            continue
        try:
            region_labels(entry)
        except DataFormatError as error:
            rejected.append(error)
        else:
            records.append(entry)
    if not records:
        raise rejected[0]
    return RegionSet(path, records if max_samples is None else spread(records, max_samples), rejected)


def region_labels(record: Record) -> dict[str, str | None]:
    """id -> type of each candidate with a defect, None of each without one; in order.

    Raises:
        DataFormatError: damaged candidates, no labels, or labels that contradict each other.
    """
    names = region_ids(record)
    positive = record.provenance.get(POSITIVE_IDS)

    def problem(text: str, found: object, expected: str) -> DataFormatError:
        where = f"provenance.{POSITIVE_IDS}"
        return DataFormatError(
            text, record=record.id, source=record.source, field=where, found=found, expected=expected
        )

    if not isinstance(positive, list) or not all(isinstance(name, str) for name in positive):
        raise problem("no labels of its regions", positive, 'a list of ids, e.g. ["R1"], empty where none is abnormal')
    if unknown := set(positive) - set(names):
        raise problem("an id that is none of its regions", min(unknown), f"ids of {shorten(names)}")
    types: dict[str, str | None] = {}
    for entry in record.provenance[REGIONS]:
        name, kind = entry["id"], entry.get("type")
        if kind is not None and name not in positive:
            raise problem(f"region {name} has a type and is not in the list", positive, f"{name} in it, or type null")
        types[name] = (str(kind) if kind is not None else UNNAMED) if name in positive else None
    return types


def region_boxes(record: Record) -> dict[str, tuple[float, float, float, float]]:
    """id -> box in pixels of the original image."""
    return dict(record_regions(record) or ())


def refuse_split(records: Iterable[Record], forbidden: Collection[str], option: str, fix: str) -> None:
    """Refuse a file that holds a record of another split than it is given for.

    Raises:
        ConfigError: names the first such record.
    """
    for record in records:
        split = record.provenance.get("split")
        if split in forbidden:
            raise ConfigError(f"{option}: record '{record.id}' ({record.source}) says provenance.split: {split}; {fix}")


@dataclass(frozen=True)
class Seen:
    """What a threshold was chosen on, to be told from what it is tested on.

    Args:
        images: SHA-256 in hexadecimal of every image file, or its path where it cannot be read.
        groups: names of the records' groups.
    """

    images: frozenset[str]
    groups: frozenset[str]


def seen(records: Sequence[Record]) -> Seen:
    """Images and groups of records."""
    groups = frozenset(record.group for record in records if record.group)
    return Seen(frozenset(key for record in records for key in _image_keys(record)), groups)


def refuse_overlap(records: Sequence[Record], chosen_on: Seen, option: str) -> None:
    """Refuse records of which the threshold's choice has seen an image or another image of the group.

    Raises:
        ConfigError: names the first one, and the image or group.
    """
    for record in records:
        where = f"{option}: record '{record.id}' ({record.source})"
        fix = "the threshold was chosen on it; divide the files by group, as forensics regions prepare does"
        if not chosen_on.images.isdisjoint(_image_keys(record)):
            name = next((image.path for image in record.images if image.path), "embedded in the record")
            raise ConfigError(f"{where} has an image that is in the validation file too ({name}): {fix}")
        if record.group in chosen_on.groups:
            raise ConfigError(f"{where} is of group '{record.group}', as records of the validation file are: {fix}")


def _image_keys(record: Record) -> list[str]:
    """Of each image the hash of its file; its path where it cannot be read, which is named when the model is asked."""
    keys = []
    for image in record.images:
        try:
            keys.append(file_sha256(image).hex())
        except (OSError, DataFormatError):
            keys.append(str(Path(image.path or "").resolve()))
    return keys
