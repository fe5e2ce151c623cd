"""How an image was tampered, as far as its record knows: `provenance.operation` of generated sets, or of one's own.

{"provenance": {"operation": {"name": "retouch", "kind": "grain"}}}
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.schema import Record
from finetune.special_tokens import IGNORE_INDEX

AUTHENTIC = 0
"""Label of an image without an operation; the k-th name of `heads.operations` has k, counted from 1."""


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
        image without a label, an operation that is not among the names, and where several images of the record are
        tampered, of which one may be meant.
    """
    tampered = sum(target.label == 1 for target in record.targets)
    label = _place(record, names) if tampered == 1 else IGNORE_INDEX
    return [{0: AUTHENTIC, 1: label}.get(target.label, IGNORE_INDEX) for target in record.targets]  # type: ignore[arg-type]


def _place(record: Record, names: Sequence[str]) -> int:
    name = operation_name(record)
    kind = record.provenance["operation"].get("kind") if name else None
    for wanted in (f"{name}.{kind}", name):
        if name and wanted in names:
            return 1 + list(names).index(wanted)
    return IGNORE_INDEX
