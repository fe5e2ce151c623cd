"""Format `messages`, which with its optional fields is also the project's native record (data/README.md).

{"messages": [{role, content}, ...], "images", "id", "group", "labels", "masks", "polygons", "evidence", "provenance"};
without `messages` the answer is rendered from a template later and `turns` stays empty.
"""

from __future__ import annotations

from finetune.data.readers.common import Item, Reader, build_record, read_images, read_turns
from finetune.schema import Record


def _read(item: Item) -> Record:
    turns, inline_images = read_turns(item, "messages")
    listed_images = read_images(item)
    if inline_images and listed_images:
        raise item.error("images given twice", field="images", fix="give them in the list or inside the messages")
    return build_record(item, listed_images or inline_images, turns, own_fields=("messages",))


MESSAGES = Reader(
    required=("messages|images|image|img",),
    example='{"messages": [{"role": "user", "content": "<image>..."}, ...], "images": ["a.jpg"], "labels": [1]}',
    read=_read,
)
