"""Format `pairs`: [["img.jpg", "mask.png"], ["b.jpg", "Negative"]], as IMDL-BenCo's JSON data sets.

"Negative" (or the size of an all-zero mask, `HxW`) makes the image authentic, a mask makes it tampered.
"""

from __future__ import annotations

from typing import Any

from finetune.data.readers.common import Item, Reader
from finetune.data.readers.targets import read_mask
from finetune.schema import ImageTarget, Record

NEGATIVE = "negative"


def is_pair(value: Any) -> bool:
    """Whether a raw entry is [image, mask]."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(entry, str) for entry in value)


def _read(item: Item) -> Record:
    pair = item.fields["pair"]
    if not is_pair(pair):
        raise item.error("not a pair", field="pair", found=pair, expected='["image.jpg", "mask.png" or "Negative"]')
    image = item.image(pair[0], "pair[0]")
    if pair[1].strip().lower() == NEGATIVE:
        target = ImageTarget(label=0)
    else:
        mask_path, size_hw = read_mask(item, "pair[1]", pair[1])
        target = ImageTarget(label=1 if mask_path else 0, mask_path=mask_path, mask_size_hw=size_hw)
    return Record(item.record_id, (image,), (target,), source=item.source)


PAIRS = Reader(required=("pair",), example='["image.jpg", "mask.png" or "Negative"]', read=_read)
