"""What every reader shares: one raw JSON object with its place in the file, and checked access to its common fields.

Paths are resolved here and base64 is decoded here; files are not opened (images.py and masks.py do that).
"""

from __future__ import annotations

import base64
import binascii
import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from finetune.data.readers.file_tree import IMAGE_SUFFIXES
from finetune.data.readers.targets import TARGET_FIELDS, read_targets
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, Record, Role, Turn
from finetune.special_tokens import IMAGE_PLACEHOLDER

IMAGE_FIELDS = ("images", "image", "image_path", "img")
_COMMON_FIELDS = (*IMAGE_FIELDS, *TARGET_FIELDS, "id", "group", "provenance", "system")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class Item:
    """One JSON object of a data set.

    Args:
        fields: the object as parsed.
        record_id: its `id`, or `<file stem>:<line or index>`.
        source: `file.jsonl:line` or `file.json[index]`.
        root: folder that relative paths start from.
    """

    fields: dict[str, Any]
    record_id: str
    source: str
    root: str

    def error(self, problem: str, **details: Any) -> DataFormatError:
        """A `DataFormatError` that names this record and its place."""
        return DataFormatError(problem, record=self.record_id, source=self.source, **details)

    def text(self, value: Any, field: str) -> str:
        """`value` if it is text that can be written as UTF-8."""
        if not isinstance(value, str):
            raise self.error("text expected", field=field, found=value, fix='put the value in double quotes, "..."')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                "text holds half a character (a lone surrogate)",
                field=field,
                found=value[max(0, error.start - 20) : error.end + 20],
                fix="write the file again as UTF-8",
            ) from error
        return value

    def path(self, value: Any, field: str) -> str:
        """An openable path: absolute as it is, relative below `root`; a relative one that leaves `root` is refused."""
        text = self.text(value, field).strip()
        if text.startswith("file://"):
            text = text[len("file://") :]
        if not text or "\0" in text:
            raise self.error("empty or unusable path", field=field, found=value, fix="give the file's path")
        if text.lower().startswith(("http://", "https://")):
            raise self.error(
                "images are not downloaded", field=field, found=text, fix="save the file and give its path"
            )
        if os.path.isabs(text):
            return text
        relative = os.path.normpath(text)
        if relative == ".." or relative.startswith(".." + os.sep):
            raise self.error(
                "relative path leaves the data folder",
                field=field,
                found=text,
                expected=f"a path below {self.root}",
                fix="pass the common parent folder as data root, or write an absolute path",
            )
        return os.path.join(self.root, relative)

    def image(self, value: Any, field: str, *, prefer_base64: bool = False) -> ImageInput:
        """An image from a path, a `data:` URL or, with `prefer_base64`, bare base64 unless it ends like a file name."""
        text = self.text(value, field)
        if text[:5].lower() == "data:":
            header, comma, payload = text.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise self.error(
                    "data URL without base64", field=field, found=text, expected="data:image/png;base64,..."
                )
            return ImageInput(data=self._base64(payload, field))
        if prefer_base64 and not text.strip().lower().endswith(IMAGE_SUFFIXES):
            return ImageInput(data=self._base64(text, field))
        return ImageInput(path=self.path(text, field))

    def _base64(self, text: str, field: str) -> bytes:
        compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
        try:
            data = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise self.error(
                f"not base64 ({error})",
                field=field,
                found=text,
                expected="the base64 text of an image file, a data: URL or a path with an image suffix",
            ) from error
        if not data:
            raise self.error("embedded image has no bytes", field=field, found=text, fix="embed the image file's bytes")
        return data


@dataclass(frozen=True)
class Reader:
    """One accepted format.

    Args:
        required: keys that must all be there for the format to be recognised (`|` separates alternatives).
        example: one line for error messages.
        read: makes the record, or raises `DataFormatError`.
    """

    required: tuple[str, ...]
    example: str
    read: Callable[[Item], Record]

    def missing(self, keys: set[str]) -> list[str]:
        """Required keys that `keys` lacks."""
        return [need for need in self.required if not keys & set(need.split("|"))]


def read_images(item: Item) -> tuple[ImageInput, ...]:
    """The images of a record from whichever of `images`, `image`, `image_path`, `img` it has; () without any."""
    present = [name for name in IMAGE_FIELDS if item.fields.get(name) is not None]
    if len(present) > 1:
        raise item.error("images given twice", found=present, fix=f"keep '{present[0]}' only")
    if not present:
        return ()
    name, value = present[0], item.fields[present[0]]
    if isinstance(value, list):
        return tuple(item.image(entry, f"{name}[{index}]") for index, entry in enumerate(value))
    return (item.image(value, name),)


def read_turns(item: Item, field: str) -> tuple[tuple[Turn, ...], tuple[ImageInput, ...]]:
    """The conversation in `field`, and the images that stand inside list-style contents (usually none).

    A message is {"role", "content"} or ShareGPT's {"from", "value"}; content is text, or a list of parts,
    {"type": "text", "text"} and {"type": "image", "image"}. A `system` text beside the list becomes the first turn.
    """
    messages = item.fields.get(field)
    if messages is None:
        messages = []
    if not isinstance(messages, list):
        raise item.error("conversation is not a list", field=field, found=messages, expected="[{role, content}, ...]")
    turns: list[Turn] = []
    images: list[ImageInput] = []
    if item.fields.get("system"):
        turns.append(Turn("system", item.text(item.fields["system"], "system")))
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise item.error("message is not an object", field=where, found=message, expected="{role, content}")
        content_key = "content" if "content" in message else "value"
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in _ROLES or content_key not in message:
            raise item.error(
                "message without a known role and a content",
                field=where,
                found=message,
                expected='{"role": system|user|assistant, "content": text} or {"from": human|gpt, "value": text}',
            )
        content = _read_content(item, message[content_key], f"{where}.{content_key}", images)
        turns.append(Turn(_ROLES[role], content))
    return tuple(turns), tuple(images)


def _read_content(item: Item, content: Any, field: str, images: list[ImageInput]) -> str:
    if not isinstance(content, list):
        return item.text(content, field)
    pieces: list[str] = []
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            pieces.append(item.text(part.get("text"), f"{where}.text"))
        elif kind == "image":
            pieces.append(IMAGE_PLACEHOLDER)
            if part.get("image") is not None:
                images.append(item.image(part["image"], f"{where}.image"))
        else:
            raise item.error(
                "unknown part of a message", field=where, found=part, expected='{"type": "text"|"image", ...}'
            )
    return "".join(pieces)


def build_record(
    item: Item, images: tuple[ImageInput, ...], turns: tuple[Turn, ...], *, own_fields: tuple[str, ...] = ()
) -> Record:
    """The record from its images, its turns and the fields that every format shares.

    Raises:
        DataFormatError: nothing to read in it, a misspelt field, or targets that do not fit the images.
    """
    _refuse_misspelt_fields(item, own_fields)
    if not images and not turns:
        raise item.error("record has neither an image nor a conversation", found=sorted(item.fields))
    group = item.fields.get("group")
    if isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    provenance = item.fields.get("provenance")
    if provenance is not None and not isinstance(provenance, dict):
        raise item.error("provenance is not an object", field="provenance", found=provenance, expected="{...}")
    return Record(
        id=item.record_id,
        images=images,
        targets=read_targets(item, len(images)),
        turns=turns,
        group="" if group is None else item.text(group, "group"),
        source=item.source,
        provenance=cast("dict[str, Any]", provenance or {}),
    )


def _refuse_misspelt_fields(item: Item, own_fields: tuple[str, ...]) -> None:
    """Other fields are the user's own and ignored, but `lables` would lose the targets in silence."""
    known = (*_COMMON_FIELDS, *own_fields)
    for name in item.fields:
        meant = None if name in known else _nearest(name, known)
        if meant:
            shown = name.encode("utf-8", "backslashreplace").decode()
            raise item.error("unknown field", field=shown, fix=f"rename it to '{meant}' or remove it")


@functools.lru_cache(maxsize=1024)  # the same few names in every record of a file
def _nearest(name: str, known: tuple[str, ...]) -> str | None:
    lower = name.lower()
    exchanged = [each for each in known if sorted(each) == sorted(lower)]  # `lable`: too far for difflib
    return next(iter(exchanged or difflib.get_close_matches(lower, known, n=1, cutoff=0.83)), None)
