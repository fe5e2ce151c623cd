"""How an image was tampered, as far as its record knows: `provenance.operation` of generated sets, or of one's own.

{"provenance": {"operation": {"name": "retouch", "kind": "grain"}}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune.schema import Record
from finetune.special_tokens import IGNORE_INDEX

AUTHENTIC = 0
"""Label of an image without an operation; the k-th name of `heads.operations` has k, counted from 1."""


FURTHER = "further_operations"
"""Key of a provenance with the edits after `operation`, where a picture has several."""


def operation_name(record: Record) -> str:
    """Name of the operation, such as retouch; "" where the record knows none."""
    operation = record.provenance.get("operation")
    return str(operation.get("name") or "") if isinstance(operation, dict) else ""


def operation_labels(record: Record, names: Sequence[str]) -> list[int]:
    """One label per image of a record, for `heads.operations`.

    Args:
        names: as configured; `retouch.grain` means that kind of retouch, `retouch` every kind that has no name of its
            own among them.

    Returns:
        0 for an image labelled real; for a tampered one the place of its operation in `names`, from 1 on; -100 for an
        image without a label, an operation that is not among the names, one of several on the same image
        (`provenance.further_operations`), and where several images of the record are tampered, of which one is meant.
    """
    is_one = sum(target.label == 1 for target in record.targets) == 1 and not record.provenance.get(FURTHER)
    label = _place(record, names) if is_one else IGNORE_INDEX
    return [{0: AUTHENTIC, 1: label}.get(target.label, IGNORE_INDEX) for target in record.targets]  # type: ignore[arg-type]


def unused_operations(records: Sequence[Record], names: Sequence[str]) -> str | None:
    """A warning about names that label no image of these records, with what the records say instead; None if all do."""
    used = {label for record in records for label in operation_labels(record, names)}
    unused = [name for place, name in enumerate(names, start=1) if place not in used]
    if not unused:
        return None
    said = Counter(_full_name(record) for record in records if record.label == 1)
    found = ", ".join(f"{name or 'nothing'} ({count})" for name, count in said.most_common(12)) or "nothing"
    return (
        f"heads.operations names {', '.join(unused)}, which no training record has for its one tampered "
        f"image; provenance.operation of the tampered ones says: {found}"
    )


def _full_name(record: Record) -> str:
    name = operation_name(record)
    kind = record.provenance["operation"].get("kind") if name else None
    return f"{name}.{kind}" if kind else name


def _place(record: Record, names: Sequence[str]) -> int:
    for wanted in (_full_name(record), operation_name(record)):
        if wanted and wanted in names:
            return 1 + list(names).index(wanted)
    return IGNORE_INDEX
