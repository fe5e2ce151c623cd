"""Format `instruction`: {"instruction": text, "input": base64 image, "output": text}.

`input` may also be a `data:` URL, a path with an image suffix, empty, or, beside an image field, more text.
"""

from __future__ import annotations

from finetune.data.readers.common import Item, Reader, build_record, read_images
from finetune.schema import Record, Turn
from finetune.special_tokens import IMAGE_PLACEHOLDER


def _read(item: Item) -> Record:
    instruction = item.text(item.fields.get("instruction"), "instruction")
    output = item.text(item.fields.get("output"), "output")
    extra = item.fields.get("input")
    images = read_images(item)
    if isinstance(extra, list) and not images:
        images = tuple(item.image(one, f"input[{k}]", prefer_base64=True) for k, one in enumerate(extra))
    elif extra and not images:
        images = (item.image(extra, "input", prefer_base64=True),)
    elif extra:
        instruction = f"{instruction}\n{item.text(extra, 'input')}"
    if images and IMAGE_PLACEHOLDER not in instruction:
        instruction = IMAGE_PLACEHOLDER * len(images) + instruction
    turns = [Turn("user", instruction), Turn("assistant", output)]
    if item.fields.get("system"):
        turns.insert(0, Turn("system", item.text(item.fields["system"], "system")))
    return build_record(item, images, tuple(turns), own_fields=("instruction", "input", "output"))


INSTRUCTION = Reader(
    required=("instruction", "output"),
    example='{"instruction": "...", "input": "<base64 image>", "output": "..."}',
    read=_read,
)
