"""The findings that need no statistics: files, copies, contradictions, balance, masks, texts. One function a topic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from finetune.data.audit.findings import MAX_EXAMPLES, Example, Finding, Severity
from finetune.data.audit.table import Table
from finetune.data.duplicates import describe

TINY, WHOLE = 0.001, 0.9
"""Shares of an image: a tampered region below is hardly there, one above leaves nothing to localise."""
_RARE_CLASS = 0.2
_RELIABLE = 0.9
_FAULTS: dict[str, Severity] = {"unreadable": "error", "mask_size": "error", "mask": "error", "conversation": "error"}


def fault_findings(table: Table) -> Iterator[Finding]:
    """Files that cannot be used and conversations that training refuses."""
    for check, severity in _FAULTS.items():
        found = [(number, message) for number, kind, message in table.faults if kind == check]
        if found:
            examples = tuple(
                Example(table.record_ids[number], number, note=message) for number, message in found[:MAX_EXAMPLES]
            )
            yield Finding(check, severity, len(found), examples=examples)
    if table.wrong_extensions:
        formats, names = table.categories["format"], table.categories["extension"]
        examples = _images(
            table,
            table.wrong_extensions,
            lambda n: f"{formats.texts[formats.codes[n]]} named {names.texts[names.codes[n]]}",
        )
        yield Finding("wrong_extension", "warning", len(table.wrong_extensions), examples=examples)


def copy_findings(table: Table, max_distance: int) -> Iterator[Finding]:
    """What is in several splits, copies inside a split, and one image with two labels."""
    index = table.index
    overlaps = index.overlaps(max_distance)
    for kind in ("group", "bytes", "picture"):
        found = [overlap for overlap in overlaps if overlap.kind == kind]
        if found:
            shown: list[Example] = []
            for overlap in found[: MAX_EXAMPLES // 2]:
                shown += _one_per_split(table, overlap.numbers, describe(index, overlap))
            yield Finding(f"overlap_{kind}", "error", len(found), examples=tuple(shown[:MAX_EXAMPLES]))
    labels = np.array(table.labels)
    same = index.same_bytes()
    torn = [numbers for numbers in same if {0, 1} <= set(labels[numbers].tolist())]
    if torn:
        pairs = [[int(numbers[labels[numbers] == label][0]) for label in (0, 1)] for numbers in torn[:4]]
        examples = _images(table, [n for pair in pairs for n in pair], lambda n: f"label {table.labels[n]}")
        yield Finding("contradiction", "error", len(torn), examples=examples)
    splits = index.splits
    inside = [numbers for numbers in same if len(np.unique(splits[numbers])) == 1]
    if inside:
        first = [n for numbers in inside[: MAX_EXAMPLES // 2] for n in numbers[:2].tolist()]
        yield Finding("copies_inside", "info", len(inside), examples=_images(table, first))
    if index.num_flat:
        yield Finding("flat_pictures", "info", index.num_flat)


def balance_findings(table: Table) -> Iterator[Finding]:
    """Classes that are missing or rare, overall and in a split."""
    splits = list(dict.fromkeys(split for split, _ in table.label_counts))
    whole = _class_counts(table, splits)
    if not whole[0] and not whole[1]:
        yield Finding("no_labels", "warning", table.num_records)
        return
    if not whole[0] or not whole[1]:
        yield Finding("one_class", "warning", whole[0] + whole[1], details={"label": int(whole[1] > 0)})
        return
    rare = min(whole) / sum(whole)
    if rare < _RARE_CLASS:
        yield Finding(
            "imbalance", "warning", min(whole), details={"label": int(whole[1] < whole[0]), "share": round(rare, 4)}
        )
    for split in splits if len(splits) > 1 else ():
        counts = _class_counts(table, [split])
        for label in (0, 1):
            if not counts[label]:
                yield Finding("split_lacks_class", "warning", sum(counts), subject=split, details={"label": label})


def mask_findings(table: Table) -> Iterator[Finding]:
    """Tampered regions that are nearly nothing or nearly everything, and tampered images without any."""
    labels, shares = np.array(table.labels), np.array(table.mask_shares)
    fakes = labels == 1
    with np.errstate(invalid="ignore"):
        kinds = (("mask_tiny", fakes & (shares < TINY)), ("mask_whole", fakes & (shares > WHOLE)))
    for check, is_found in kinds:
        numbers = np.flatnonzero(is_found).tolist()
        if numbers:
            examples = _images(table, numbers, lambda n: f"{table.mask_shares[n]:.3%}")
            yield Finding(check, "warning", len(numbers), examples=examples)
    faulty = {number for number, check, _ in table.faults if check in ("mask", "mask_size")}  # told already
    without = [n for n in np.flatnonzero(fakes & np.isnan(shares)).tolist() if table.records[n] not in faulty]
    if without:
        yield Finding("mask_missing", "info", len(without), examples=_images(table, without))


def text_findings(table: Table) -> Iterator[Finding]:
    """Questions and answers that tell a model what it should see for itself."""
    if table.late_tokens:
        yield Finding("late_tokens", "warning", len(table.late_tokens), examples=_records(table, table.late_tokens))
    if table.named_files:
        notes = dict(table.named_files)
        examples = _records(table, notes, lambda n: notes[n])
        yield Finding("file_name_in_question", "warning", len(notes), examples=examples)
    stated, labels = np.array(table.stated), np.array(table.record_labels)
    said = (stated >= 0) & (labels >= 0)
    agreeing = np.flatnonzero(said & (stated == labels))
    if len(agreeing) and len(agreeing) >= _RELIABLE * said.sum():
        examples = _records(table, agreeing.tolist(), lambda n: table.questions.texts[table.questions.codes[n]][:160])
        yield Finding("verdict_in_question", "warning", len(agreeing), examples=examples)


def count_table(table: Table) -> dict[str, object]:
    """Counts for audit.json and the page: records, images, labels, groups and mask areas, over all and per split."""
    splits = list(dict.fromkeys(split for split, _ in table.label_counts))
    record_splits = [table.record_splits.texts[code] for code in table.record_splits.codes]
    groups: dict[str, set[int]] = defaultdict(set)
    records: dict[str, int] = defaultdict(int)
    classes: dict[int, set[int]] = defaultdict(set)
    for split, group, label in zip(record_splits, table.record_groups.codes, table.record_labels, strict=True):
        records[split] += 1
        if group:
            groups[split].add(group)
            classes[group].add(label)
    names = list(dict.fromkeys([*records, *splits]))
    shares = np.array(table.mask_shares)[np.array(table.labels) == 1]
    edges = [0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9, 1.0000001]
    counts, _ = np.histogram(shares[~np.isnan(shares)], edges)
    return {
        "records": table.num_records,
        "images": table.num_images,
        "splits": {
            name: {
                "records": records[name],
                "groups": len(groups[name]),
                "real": table.label_counts[name, 0],
                "tampered": table.label_counts[name, 1],
                "unlabelled": table.label_counts[name, None],
            }
            for name in names
        },
        "groups": {
            "all": len(classes),
            "both_classes": sum({0, 1} <= found for found in classes.values()),
            "records_without": sum(not group for group in table.record_groups.codes),
        },
        "mask_area": {"edges": [*edges[:-1], 1.0], "images": counts.tolist()},
    }


def _class_counts(table: Table, splits: Iterable[str]) -> tuple[int, int]:
    names = list(splits)
    return (sum(table.label_counts[s, 0] for s in names), sum(table.label_counts[s, 1] for s in names))


def _images(table: Table, numbers: list[int], note: Callable[[int], str] | None = None) -> tuple[Example, ...]:
    return tuple(
        Example(
            table.record_ids[table.records[n]],
            table.records[n],
            table.positions[n],
            note(n) if note is not None else "",
        )
        for n in numbers[:MAX_EXAMPLES]
    )


def _records(table: Table, numbers: Iterable[int], note: Callable[[int], str] | None = None) -> tuple[Example, ...]:
    return tuple(
        Example(table.record_ids[n], n, note=note(n) if note is not None else "") for n in list(numbers)[:MAX_EXAMPLES]
    )


def _one_per_split(table: Table, numbers: np.ndarray, note: str) -> tuple[Example, ...]:
    """The first image of each split, at most two."""
    first: dict[str, int] = {}
    for number in numbers.tolist():
        first.setdefault(table.index.split_of(number), number)
    return _images(table, list(first.values())[:2], lambda _: note)
