"""How an image was tampered, as far as its record knows: `provenance.operation` of generated sets, or of one's own.

{"provenance": {"operation": {"name": "retouch", "kind": "grain"}}}      written "retouch.grain" in heads.operations
{"provenance": {"operation": "splice"}}                                  the same as {"name": "splice"}
{"provenance": {"images": [{"operation": null}, {"operation": {...}}]}}  of each image of a record, its own
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.schema import Record
from finetune.special_tokens import IGNORE_INDEX

AUTHENTIC = 0
"""Label of an image without an operation; the k-th name of `heads.operations` has k, counted from 1."""

FURTHER = "further_operations"
"""Key of a provenance with the edits after `operation`, where a picture has several."""


def operation_name(record: Record, image: int = 0) -> str:
    """Name of the operation of an image of a record, without its kind, such as retouch; "" where it is not known."""
    return _name_and_kind(_provenance(record, image))[0]


def operation_labels(record: Record, names: Sequence[str]) -> list[int]:
    """One label per image of a record, for `heads.operations`.

    Args:
        names: as configured; `retouch.grain` means that kind of retouch, `retouch` every kind that has no name of its
            own among them.

    Returns:
        0 for an image labelled real; for a tampered one the place of its operation in `names`, from 1 on; -100 for an
        image without a label, an operation that is not among the names, and one of several on the same image
        (`provenance.further_operations`). What a record says applies to all its tampered images, unless
        `provenance.images` says it of each.
    """
    labels = []
    for index, target in enumerate(record.targets):
        if target.label == 1:
            labels.append(_place(_provenance(record, index), names))
        else:
            labels.append(AUTHENTIC if target.label == 0 else IGNORE_INDEX)
    return labels


def unused_operations(records: Sequence[Record], names: Sequence[str]) -> str | None:
    """A warning about names that label no image of these records, with what the records say instead; None if all do."""
    used = {label for record in records for label in operation_labels(record, names)}
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


def _place(provenance: Mapping[str, Any], names: Sequence[str]) -> int:
    name, kind = _name_and_kind(provenance)
    if not provenance.get(FURTHER):
        for wanted in (f"{name}.{kind}", name):
            if name and wanted in names:
                return 1 + list(names).index(wanted)
    return IGNORE_INDEX
