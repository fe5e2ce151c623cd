"""Format `conversations`: {"conversations": [{role, content} | {from, value}, ...], "images": [...]}.

A sample may have `<image>` and no image field (the users' files do); it loads, and validation.py names what is missing.
"""

from __future__ import annotations

from finetune.data.readers.common import Item, Reader, build_record, read_images, read_turns
from finetune.schema import Record


def _read(item: Item) -> Record:
    turns, inline_images = read_turns(item, "conversations")
    listed_images = read_images(item)
    if inline_images and listed_images:
        raise item.error("images given twice", field="images", fix="give them in the list or inside the messages")
    return build_record(item, listed_images or inline_images, turns, own_fields=("conversations",))


CONVERSATIONS = Reader(
    required=("conversations",),
    example='{"conversations": [{"role": "user", "content": "<image>..."}, ...], "images": ["a.jpg"]}',
    read=_read,
)
