"""What is written from the finished images of a set: record files, the annotation list, counts and hashes.

Runs over the journal once, so memory does not grow with the set unless conversations about several images are asked
for.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from finetune.data.synthesis.config import SynthConfig
from finetune.data.synthesis.conversations import conversation_records
from finetune.data.synthesis.partial import Entry, PartialSet
from finetune.data.synthesis.photos import SPLITS

logger = logging.getLogger(__name__)

JsonRecord = dict[str, Any]


def write_record_files(config: SynthConfig, partial: PartialSet) -> tuple[dict[str, Any], dict[str, str]]:
    """Write `{split}.jsonl`, `{split}_instruct.jsonl` and `eval_annotations.json` from the finished images.

    Returns:
        counts of each split; sha256 of every record file and, as `{split}/`, of the list of its images and masks.
    """
    counts: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    annotations: list[JsonRecord] = []
    entries = partial.entries()
    for split, size in zip(SPLITS, (config.num_train, config.num_eval, config.num_val), strict=True):
        tally, kept = _Tally(), []  # type: _Tally, list[JsonRecord]
        records = tally.images(next(entries) for _ in range(size))
        if config.has_conversations:
            records = _keep(records, kept)
        if split == "eval":
            records = _annotate(records, annotations)
        name = f"{split}.jsonl"
        hashes[name] = partial.write_lines(name, tally.records(_share(records, config.record_kinds["single"])))
        hashes[f"{split}/"] = tally.files.hexdigest()
        if config.has_conversations:
            name = f"{split}_instruct.jsonl"
            hashes[name] = partial.write_lines(name, tally.records(conversation_records(config, split, kept)))
            _warn_of_missing(config, split, len(kept), tally)
        counts[split] = tally.counts()
    partial.write_json("eval_annotations.json", annotations)
    return counts, hashes


def _warn_of_missing(config: SynthConfig, split: str, num_images: int, tally: _Tally) -> None:
    for kind, share in config.record_kinds.items():
        found, wanted = tally.kinds[kind], round(share * num_images)
        if kind != "single" and found < wanted:
            reason = "too few photographs have two images; make more images or set mix_photos"
            logger.warning("%s: %d of %d %s records: %s", split, found, wanted, kind, reason)


def _keep(records: Iterable[JsonRecord], kept: list[JsonRecord]) -> Iterator[JsonRecord]:
    for record in records:
        kept.append(record)
        yield record


def _annotate(records: Iterable[JsonRecord], annotations: list[JsonRecord]) -> Iterator[JsonRecord]:
    """Images as the annotation list of vision-evidence pipelines has them."""
    for record in records:
        image, mask, label = record["images"][0], record["masks"][0], record["labels"][0]
        annotations.append({"image_path": image, "mask_path": mask, "label": label})
        yield record


def _share(records: Iterable[JsonRecord], share: float) -> Iterator[JsonRecord]:
    """This share of the records at even distances; all are read."""
    for index, record in enumerate(records):
        if int((index + 1) * share) > int(index * share):
            yield record


class _Tally:
    """Counts of one split while its records pass by."""

    def __init__(self) -> None:
        self.files = hashlib.sha256()
        self._labels: Counter[int] = Counter()
        self._operations: Counter[str] = Counter()
        self._groups: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def images(self, entries: Iterable[Entry]) -> Iterator[JsonRecord]:
        for entry in entries:
            record = entry["record"]
            operation = record["provenance"]["operation"]
            self._labels[record["labels"][0]] += 1
            self._operations[operation["name"] if operation else "authentic"] += 1
            self._groups[record["group"]] += 1
            for name, digest in entry["sha256"].items():
                self.files.update(f"{name} {digest}\n".encode())
            yield record

    def records(self, records: Iterable[JsonRecord]) -> Iterator[JsonRecord]:
        for record in records:
            self.kinds[record["provenance"].get("kind", "single")] += 1
            yield record

    def counts(self) -> dict[str, Any]:
        return {
            "images": self._labels.total(),
            "authentic": self._labels[0],
            "tampered": self._labels[1],
            "operations": dict(sorted(self._operations.items())),
            "groups": dict(sorted(self._groups.items())),
            "records": dict(sorted(self.kinds.items())),
        }
