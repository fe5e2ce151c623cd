"""The work on one record that any process can do: check, encode, take the fingerprints of its images.

Imports little, since every worker process starts with it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from PIL import Image

from finetune.data.containers import backing_file
from finetune.data.fingerprints import Fingerprint, fingerprint
from finetune.data.storage.encoding import EncodedRecord, ImageOptions, prepare_payload
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, Record


@dataclass(frozen=True)
class Item:
    """One entry of the sources.

    Args:
        index: its number over all sources, from 0.
        split: where it goes; "" for an error.
        record: with its final id and group, or what is wrong with it.
    """

    index: int
    split: str
    record: Record | DataFormatError

    @property
    def id(self) -> str:
        """Of the record, "" where even that could not be read."""
        return self.record.id if isinstance(self.record, Record) else self.record.record or ""


@dataclass(frozen=True)
class Outcome:
    """An item after the work: what to write, or why not; `stamp` as of `file_stamp`."""

    item: Item
    payload: EncodedRecord | None = None
    prints: tuple[Fingerprint, ...] = ()
    stamp: int = 0
    error: DataFormatError | None = None


def work_on(item: Item, options: ImageOptions) -> Outcome:
    """Check and encode one record and take its images' fingerprints; a pure function, for any process."""
    if isinstance(item.record, DataFormatError):
        return Outcome(item, error=item.record)
    prints: list[Fingerprint] = []
    stamp = file_stamp(item.record)  # before they are read: a change during the work is noticed too

    def look(image: ImageInput, picture: Image.Image) -> None:
        prints.append(fingerprint(image, picture))

    try:
        return Outcome(item, prepare_payload(item.record, options, look), tuple(prints), stamp)
    except DataFormatError as error:
        return Outcome(item, error=error, stamp=stamp)


def file_stamp(record: Record) -> int:
    """A number in [1, 2**63) that changes with the size and the time of change of any image or mask file of a record.

    Nothing is opened. A missing file has a stamp of its own.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in (*(image.path for image in record.images), *(target.mask_path for target in record.targets)):
        if path is None:
            continue
        try:
            status = os.stat(backing_file(path))
            digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
        except (OSError, ValueError):  # ValueError: a NUL in the name
            digest.update(b"missing\0")
    return int.from_bytes(digest.digest(), "big") % (2**63 - 1) + 1
