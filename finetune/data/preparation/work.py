"""The work on one record that any process can do: check, encode, take the fingerprints of its images.

Imports little, since every worker process starts with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

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
    """An item after the work: what to write, or why not."""

    item: Item
    payload: EncodedRecord | None = None
    prints: tuple[Fingerprint, ...] = ()
    error: DataFormatError | None = None


def work_on(item: Item, options: ImageOptions) -> Outcome:
    """Check and encode one record and take its images' fingerprints; a pure function, for any process."""
    if isinstance(item.record, DataFormatError):
        return Outcome(item, error=item.record)
    prints: list[Fingerprint] = []

    def look(image: ImageInput, picture: Image.Image) -> None:
        prints.append(fingerprint(image, picture))

    try:
        return Outcome(item, prepare_payload(item.record, options, look), tuple(prints))
    except DataFormatError as error:
        return Outcome(item, error=error)
