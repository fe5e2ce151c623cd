"""Every feature of a data set judged as a leak: the table of AUROCs, and the findings that follow from a threshold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from finetune.data.audit import leaks
from finetune.data.audit.features import FEATURES
from finetune.data.audit.findings import MAX_EXAMPLES, Example, Finding, Leak, Severity
from finetune.data.audit.table import Table

MIN_IMAGES = 5
"""Of each class; below, nothing is judged."""

_SEVERITY: dict[str, Severity] = {"container": "error", "prompt": "error", "name": "warning", "content": "warning"}


def leak_table(table: Table) -> list[Leak]:
    """The AUROC of each feature, of all container features together and of the question's wording; [] if unlabelled."""
    labels = np.array(table.labels)
    labelled = np.flatnonzero(labels >= 0)
    if min(np.count_nonzero(labels == 0), np.count_nonzero(labels == 1)) < MIN_IMAGES:
        return []
    rows = labelled[leaks.spread_groups(table.fold_keys.array()[labelled])]
    judged = _Rows(table, rows)
    found = [judged.feature(name) for name in FEATURES]
    found.append(judged.combined())
    if table.num_with_turns:
        found.append(judged.prompt())
    return found


def leak_findings(table: Table, found: list[Leak], threshold: float) -> Iterator[Finding]:
    """A finding for each leak whose lower bound is above the threshold, strongest first."""
    judged = [leak for leak in found if leak.low is not None and leak.low > threshold]
    for leak in sorted(judged, key=lambda leak: (_SEVERITY[leak.family] != "error", -(leak.auroc or 0))):
        check = {"combined": "leak_combined", "prompt": "leak_prompt"}.get(leak.feature, f"leak_{leak.family}")
        yield Finding(
            check,
            _SEVERITY[leak.family],
            leak.num_images,
            subject=leak.feature,
            examples=_examples(table, leak.feature),
            details={"auroc": leak.auroc, "low": leak.low, "high": leak.high, "note": leak.note},
        )
    labels = np.array(table.labels)
    if not found:
        yield Finding("leaks_not_judged", "info", int((labels >= 0).sum()), details={"minimum": MIN_IMAGES})
    elif not found[-1].is_grouped:
        yield Finding("groups_of_one_class", "warning", len(set(table.fold_keys.codes)))


class _Rows:
    """Labelled images of a table and their folds."""

    def __init__(self, table: Table, rows: np.ndarray) -> None:
        self.table, self.rows = table, rows
        self.labels = np.array(table.labels)[rows]
        self.groups = table.fold_keys.array()[rows]
        self.folds = leaks.make_folds(self.labels, self.groups)
        self.is_grouped = self.folds is not None
        if self.folds is None:  # every group of one class: unseen groups of both classes do not exist
            self.groups = np.arange(len(rows))
            self.folds = leaks.make_folds(self.labels, self.groups)

    def feature(self, name: str) -> Leak:
        family, kind = FEATURES[name]
        if kind == "number":
            values = np.array(self.table.numbers[name])[self.rows]
            keep = ~np.isnan(values)
        else:
            values = self.table.categories[name].array()[self.rows]
            keep = np.ones(len(values), bool)
            if name.startswith("jpeg_"):  # of JPEG files only: that a file is none is `format`
                keep = values > 0
        labels, groups = self.labels[keep], self.groups[keep]
        if min(np.count_nonzero(labels == 0), np.count_nonzero(labels == 1)) < MIN_IMAGES:
            return Leak(name, family, None, None, None, int(keep.sum()), self.is_grouped)
        folds = leaks.make_folds(labels, groups)
        if folds is None:
            return Leak(name, family, None, None, None, int(keep.sum()), self.is_grouped)
        if len(np.unique(values[keep])) == 1:
            return Leak(name, family, 0.5, 0.5, 0.5, int(keep.sum()), self.is_grouped)
        make = leaks.number_scores if kind == "number" else leaks.category_scores
        note = (
            _number_note(values[keep], labels) if kind == "number" else self._category_note(name, values[keep], labels)
        )
        return self._leak(name, family, make(values[keep], labels, folds), labels, groups, note)

    def combined(self) -> Leak:
        names = [name for name, (family, _) in FEATURES.items() if family == "container"]
        numbers = [np.array(self.table.numbers[name])[self.rows] for name in names if FEATURES[name][1] == "number"]
        categories = [
            self.table.categories[name].array()[self.rows] for name in names if FEATURES[name][1] == "category"
        ]
        assert self.folds is not None
        scores = leaks.combined_scores(np.stack(numbers, 1), np.stack(categories, 1), self.labels, self.folds)
        return self._leak("combined", "container", scores, self.labels, self.groups, "")

    def prompt(self) -> Leak:
        """Of the wording before the first answer, and of an image's place among those of its record."""
        records = np.array(self.table.records)[self.rows]
        places = np.array(self.table.positions)[self.rows]
        pairs, codes = np.unique(
            np.stack([self.table.questions.array()[records], places], axis=1), axis=0, return_inverse=True
        )
        texts = [f"{self.table.questions.texts[question]}\n#{place}" for question, place in pairs.tolist()]
        assert self.folds is not None
        if len(texts) == 1:
            return Leak("prompt", "prompt", 0.5, 0.5, 0.5, len(self.rows), self.is_grouped)
        scores = leaks.text_scores(texts, codes, self.labels, self.folds)
        return self._leak("prompt", "prompt", scores, self.labels, self.groups, _prompt_note(texts, codes, self.labels))

    def _leak(
        self, name: str, family: str, scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, note: str
    ) -> Leak:
        interval = leaks.auroc_interval(scores, labels, groups)
        return Leak(name, family, interval.auroc, interval.low, interval.high, len(labels), self.is_grouped, note)

    def _category_note(self, name: str, codes: np.ndarray, labels: np.ndarray) -> str:
        texts = self.table.categories[name].texts
        return " | ".join(
            f"{word}: " + ", ".join(f"{texts[code] or '–'} {count}" for code, count in common)
            for word, common in (
                (word, Counter(codes[labels == label].tolist()).most_common(3))
                for word, label in (("real", 0), ("tampered", 1))
            )
        )


def format_value(value: float) -> str:
    """`158,200`, `0.2558`: four digits, whole above a thousand."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _number_note(values: np.ndarray, labels: np.ndarray) -> str:
    return " | ".join(
        f"{word}: median {format_value(float(np.median(values[labels == label])))}"
        for word, label in (("real", 0), ("tampered", 1))
    )


def _prompt_note(texts: list[str], codes: np.ndarray, labels: np.ndarray) -> str:
    """The two commonest questions whose images are most one-sided."""
    count, fakes = np.bincount(codes), np.bincount(codes, labels)
    is_common = count >= max(count.max() // 10, 1)
    lean = np.where(is_common, np.abs(fakes / count - labels.mean()), -1)
    told = []
    for code in np.argsort(-lean, kind="stable")[:2]:
        question = " ".join(texts[code].rpartition("\n")[0].split())
        told.append(f"{question[:60]!r}: {fakes[code]:.0f} of {count[code]} tampered")
    return " | ".join(told)


def _oddness(table: Table, feature: str, numbers: np.ndarray) -> np.ndarray:
    """(N,) how far images of one class are from what is usual in it: its median, or its commonest value."""
    if feature in table.numbers:
        values = np.array(table.numbers[feature])[numbers]
        known = values[~np.isnan(values)]
        return np.abs(values - np.median(known)) if len(known) else np.zeros(len(numbers))
    if feature in table.categories:
        codes = table.categories[feature].array()[numbers]
        return -np.bincount(codes)[codes].astype(np.float64)
    return np.zeros(len(numbers))


def _examples(table: Table, feature: str) -> tuple[Example, ...]:
    """Two real and two tampered images with their values, those that are most like their class."""
    labels = np.array(table.labels)
    examples = []
    for label in (0, 1):
        numbers = np.flatnonzero(labels == label)
        order = np.argsort(_oddness(table, feature, numbers), kind="stable")
        for number in numbers[order][: MAX_EXAMPLES // 4].tolist():
            record = table.records[number]
            note = ""
            if feature in table.numbers:
                note = format_value(table.numbers[feature][number])
            elif feature in table.categories:
                strings = table.categories[feature]
                note = strings.texts[strings.codes[number]] or "–"
            elif feature == "prompt":
                note = table.questions.texts[table.questions.codes[record]][:160]
            examples.append(Example(table.record_ids[record], record, table.positions[number], note))
    return tuple(examples)
