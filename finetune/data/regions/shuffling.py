"""Candidates under other ids for training: the boxes of a record change places in its list, and the answer with them.

A few hundred pictures can be learned by heart as "on this wall R2 is abnormal"; once the ids move, a region has to be
looked at. What a draw shows follows from seed and position, so that resumed runs see the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from finetune.data.regions.answers import Findings, Verdicts, edited_answers
from finetune.data.regions.text import POSITIVE_IDS, REGIONS, record_regions
from finetune.schema import Record


def shuffled(record: Record, draw: tuple[int, int]) -> Record:
    """A record whose ids name its candidates in another order, each order equally often.

    The list keeps its ids, R1 first; boxes, types, verdicts and findings go together. Left as it is: a record without
    candidates.

    Args:
        draw: seed and position of the draw.

    Raises:
        DataFormatError: damaged candidates, or an answer that is not the JSON of `forensics regions build`.
    """
    regions = record_regions(record)
    if regions is None:
        return record
    names = [name for name, _ in regions]
    order = np.random.default_rng((*draw, len(names))).permutation(len(names))
    new_id = {names[old]: names[new] for new, old in enumerate(order)}
    entries = [{**record.provenance[REGIONS][old], "id": names[new]} for new, old in enumerate(order)]
    positive = {new_id[name] for name in record.provenance.get(POSITIVE_IDS, ()) if name in new_id}
    provenance: dict[str, Any] = {
        **record.provenance,
        REGIONS: entries,
        POSITIVE_IDS: [name for name in names if name in positive],
    }

    def rename(verdicts: Verdicts, findings: Findings) -> tuple[Verdicts, Findings]:
        words = {new_id[name]: word for name, word in verdicts.items()}
        moved = [{**entry, "id": new_id[entry["id"]]} for entry in findings]
        return (
            {name: words[name] for name in names if name in words},
            sorted(moved, key=lambda entry: names.index(entry["id"])),
        )

    turns = edited_answers(
        record,
        rename,
        problem="an answer whose regions cannot be renamed",
        fix="set data.shuffle_regions: false, or build the record with forensics regions build",
    )
    return replace(record, turns=turns, provenance=provenance)
