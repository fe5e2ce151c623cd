"""Format `annotation`: [{"image_path": ..., "mask_path": path or "HxW", "label": 0 | 1}, ...]; no conversation."""

from __future__ import annotations

from finetune.data.readers.common import Item, Reader, build_record, read_images
from finetune.schema import Record


def _read(item: Item) -> Record:
    return build_record(item, read_images(item), ())


ANNOTATION = Reader(
    required=("image_path",),
    example='{"image_path": "image/a.jpg", "mask_path": "mask/a.png" or "1080x1920", "label": 1}',
    read=_read,
)
