"""How an image was tampered, as far as its record knows: `provenance.operation` of generated sets, or of one's own.

{"provenance": {"operation": {"name": "retouch", "kind": "grain"}}}      written "retouch.grain" in heads.operations
{"provenance": {"operation": "splice"}}                                  the same as {"name": "splice"}
{"provenance": {"images": [{"operation": null}, {"operation": {...}}]}}  of each image of a record, its own
{"provenance": {"operation": {...}, "further_operations": [{...}]}}      several edits of one image, in their order

Where each of several edits is, a mask file with numbers says (`load_edit_numbers`): 0 where nothing was done, k where
the k-th edit was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.data.masks import load_edit_numbers, resize_mask
from finetune.schema import Record
from finetune.special_tokens import IGNORE_INDEX

FURTHER = "further_operations"
"""Key of a provenance with the edits after `operation`, where a picture has several."""

_MOST_OPENED = 100
"""Masks without numbers that are opened in search of an operation that no image with a single edit has."""


def operation_name(record: Record, image: int = 0) -> str:
    """Name of the operation of an image of a record, without its kind, such as retouch; "" where it is not known."""
    return _name_and_kind(_provenance(record, image))[0]


def operation_map(record: Record, image: int, names: Sequence[str], mask: np.ndarray | None) -> np.ndarray | None:
    """What was done at each pixel of an image of a record, for `heads.operations`.

    What a record says applies to all its tampered images, unless `provenance.images` says it of each.

    Args:
        names: as configured; `retouch.grain` means that kind of retouch, `retouch` every kind that has no name of its
            own among them.
        mask: (H, W), not 0 = tampered, of any size, as it is shown: what of it was hidden counts as authentic.

    Returns:
        (H, W) int16: 0 = authentic, k = the operation with the k-th of the names, counted from 1, -100 = one that is
        not among them. None where nothing is known: no label, no mask, no operation that has a name, or several edits
        and a mask file that does not number them.
    """
    target = record.targets[image]
    if mask is None or target.label is None:
        return None
    if target.label == 0:
        return np.zeros(mask.shape, np.int16)
    places = _places(_provenance(record, image), names)
    if len(places) == 1:
        return None if places[0] == IGNORE_INDEX else (mask != 0).astype(np.int16) * np.int16(places[0])
    numbers = load_edit_numbers(target, len(places), record.id, record.source)
    if numbers is None or set(places) == {IGNORE_INDEX}:
        return None
    found = np.where(mask != 0, IGNORE_INDEX, 0).astype(np.int16)
    for number, place in enumerate(places, start=1):
        found[(resize_mask(numbers == number, mask.shape) & (mask != 0)) != 0] = place
    return found


def unused_operations(records: Sequence[Record], names: Sequence[str]) -> str | None:
    """A warning about names that label no image of these records, with what the records say instead; None if all do."""
    used: set[int] = set()
    several = []
    for record in records:
        for index, target in enumerate(record.targets):
            if target.label == 1:
                places = _places(_provenance(record, index), names)
                if len(places) == 1:
                    used.update(places)
                else:
                    several.append((record, target, places))
    without_numbers = 0
    for record, target, places in several:  # their masks are opened only for names that no other image has
        if without_numbers < _MOST_OPENED and not used.issuperset(places):
            if load_edit_numbers(target, len(places), record.id, record.source) is None:
                without_numbers += 1
            else:
                used.update(places)
    unused = [name for place, name in enumerate(names, start=1) if place not in used]
    if not unused:
        return None
    said: Counter[str] = Counter()
    for record in records:
        for index, target in enumerate(record.targets):
            if target.label == 1:
                provenance = _provenance(record, index)
                name, kind = _name_and_kind(provenance)
                whole = f"{name}.{kind}" if kind else name or "nothing"
                said["several edits" if provenance.get(FURTHER) else whole] += 1
    found = ", ".join(f"{name} ({count})" for name, count in said.most_common(12)) or "nothing: none is tampered"
    return (
        f"heads.operations names {', '.join(unused)}, which no tampered training image has; their provenance.operation "
        f"says: {found}. Write the names as the records do, or remove these from heads.operations"
    )


def _provenance(record: Record, image: int) -> Mapping[str, Any]:
    """What is known of one image of a record."""
    own = record.provenance.get("images")
    if isinstance(own, list) and len(own) == len(record.images) and isinstance(own[image], Mapping):
        return own[image]
    return record.provenance


def _name_and_kind(provenance: Mapping[str, Any]) -> tuple[str, str]:
    operation = provenance.get("operation")
    if isinstance(operation, str):
        return operation, ""
    if not isinstance(operation, Mapping) or not operation.get("name"):
        return "", ""
    return str(operation["name"]), str(operation.get("kind") or "")


def _places(provenance: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """Of each edit the place of its name, from 1 on, or -100."""
    further = provenance.get(FURTHER) or []
    if not isinstance(further, list):
        return [IGNORE_INDEX]
    return [_place(*_name_and_kind(one), names) for one in (provenance, *({"operation": edit} for edit in further))]


def _place(name: str, kind: str, names: Sequence[str]) -> int:
    for wanted in (f"{name}.{kind}", name):
        if name and wanted in names:
            return 1 + list(names).index(wanted)
    return IGNORE_INDEX
