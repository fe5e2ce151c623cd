"""Candidates under other ids for training: the boxes of a record change places in its list, and the answer with them.

A few hundred pictures can be learned by heart as "on this wall R2 is abnormal"; once the ids move, a region has to be
looked at. What a draw shows follows from seed and position, so that resumed runs see the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from finetune.data.regions.text import POSITIVE_IDS, REGIONS, record_regions
from finetune.errors import DataFormatError
from finetune.schema import Record, Turn


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
    turns = tuple(
        Turn(turn.role, _renamed(turn.content, new_id, names, record)) if turn.role == "assistant" else turn
        for turn in record.turns
    )
    return replace(record, turns=turns, provenance=provenance)


def _renamed(answer: str, new_id: Mapping[str, str], names: list[str], record: Record) -> str:
    """The answer with every id exchanged, verdicts and findings in the list's order."""
    try:
        tree = json.loads(answer)
        words = {new_id[name]: word for name, word in tree["verdicts"].items()}
        findings = [{**entry, "id": new_id[entry["id"]]} for entry in tree["abnormal"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataFormatError(
            "an answer whose regions cannot be renamed",
            record=record.id,
            source=record.source,
            found=answer[:60],
            expected='{"verdicts": {...}, "abnormal": [{"id": ...}, ...]} about the candidates',
            fix="set data.shuffle_regions: false, or build the record with forensics regions build",
        ) from error
    tree["verdicts"] = {name: words[name] for name in names if name in words}
    tree["abnormal"] = sorted(findings, key=lambda entry: names.index(entry["id"]))
    return json.dumps(tree, ensure_ascii=False)
