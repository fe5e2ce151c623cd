"""The facts of a whole data set in columns: numbers in arrays, repeated texts once. About 1 kB an image."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from finetune.data.audit.facts import RecordFacts
from finetune.data.audit.features import FEATURES
from finetune.data.duplicates import ImageIndex


class Strings:
    """Texts as numbers, each kept once; "" is number 0."""

    def __init__(self) -> None:
        self.texts: list[str] = [""]
        self._numbers = {"": 0}
        self.codes = array("q")

    def append(self, text: str) -> None:
        """One more value."""
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        self.codes.append(number)

    def array(self) -> np.ndarray:
        """(N,) int64, places in `texts`."""
        return np.array(self.codes, dtype=np.int64)


@dataclass
class Table:
    """Columns per image (N) and per record (R).

    labels: -1 where unknown. records: number of each image's record. positions: its place in the record.
    """

    index: ImageIndex = field(default_factory=ImageIndex)
    labels: array = field(default_factory=lambda: array("b"))
    records: array = field(default_factory=lambda: array("q"))
    positions: array = field(default_factory=lambda: array("q"))
    mask_shares: array = field(default_factory=lambda: array("d"))
    wrong_extensions: list[int] = field(default_factory=list)
    fold_keys: Strings = field(default_factory=Strings)
    numbers: dict[str, array] = field(
        default_factory=lambda: {name: array("d") for name, (_, kind) in FEATURES.items() if kind == "number"}
    )
    categories: dict[str, Strings] = field(
        default_factory=lambda: {name: Strings() for name, (_, kind) in FEATURES.items() if kind == "category"}
    )
    record_ids: list[str] = field(default_factory=list)
    record_splits: Strings = field(default_factory=Strings)
    record_groups: Strings = field(default_factory=Strings)
    questions: Strings = field(default_factory=Strings)
    stated: array = field(default_factory=lambda: array("b"))
    record_labels: array = field(default_factory=lambda: array("b"))
    late_tokens: list[int] = field(default_factory=list)
    named_files: list[tuple[int, str]] = field(default_factory=list)
    faults: list[tuple[int, str, str]] = field(default_factory=list)
    label_counts: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    num_with_turns: int = 0

    @property
    def num_images(self) -> int:
        """Readable images, N."""
        return len(self.index)

    @property
    def num_records(self) -> int:
        """Records, R."""
        return len(self.record_ids)

    def add(self, facts: RecordFacts) -> None:
        """One record with its readable images."""
        number = self.num_records
        self.record_ids.append(facts.id)
        self.record_splits.append(facts.split)
        self.record_groups.append(facts.group)
        self.questions.append(facts.question)
        self.stated.append(-1 if facts.stated is None else facts.stated)
        known = [label for label in facts.labels if label is not None]
        self.record_labels.append(max(known) if known else -1)
        self.label_counts.update((facts.split, label) for label in facts.labels)
        self.num_with_turns += facts.has_turns
        if facts.has_late_tokens:
            self.late_tokens.append(number)
        if facts.named_file:
            self.named_files.append((number, facts.named_file))
        self.faults += [(number, fault.check, fault.message) for fault in facts.faults]
        for image in facts.images:
            if image.has_wrong_extension:
                self.wrong_extensions.append(self.num_images)
            self.index.add(facts.id, facts.split, facts.group, image.fingerprint)
            self.labels.append(-1 if image.label is None else image.label)
            self.records.append(number)
            self.positions.append(image.index)
            self.mask_shares.append(math.nan if image.mask_share is None else image.mask_share)
            self.fold_keys.append(facts.fold_key)
            for name, column in self.numbers.items():
                column.append(float(image.features.get(name, math.nan)))
            for name, strings in self.categories.items():
                strings.append(str(image.features.get(name, "")))
