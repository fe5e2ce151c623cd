"""Records about fewer candidates: nothing is lost in several questions, and shortening a list gives nothing away."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from finetune.data.regions.limit import drawn_ids, keep_regions, limit_regions, regions_in_chunks
from finetune.data.regions.wording import load_region_template, parse_answer
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record, Turn


def make(name: str, positive: int, total: int) -> Record:
    order = sorted(range(1, total + 1), key=lambda i: i * 37 % 101)
    types = {f"R{i}": "crack" if order.index(i) < positive else None for i in range(1, total + 1)}
    template = load_region_template("en")
    regions = [{"id": key, "box_xyxy": [i, 0, i + 9, 9], "type": kind} for i, (key, kind) in enumerate(types.items())]
    ids = [key for key, kind in types.items() if kind]
    turns = (Turn("user", template.question(name)), Turn("assistant", template.answer(types)))
    provenance = {"task": "regions", "split": "train", "regions": regions, "positive_region_ids": ids}
    return Record(name, (ImageInput("a.jpg"),), (ImageTarget(),), turns, provenance=provenance)


def names(record: Record) -> list[str]:
    return [region["id"] for region in record.provenance["regions"]]


def assert_consistent(record: Record) -> None:
    """List, positive ids, verdicts and findings are about the same candidates, in one order."""
    answer = parse_answer(record.turns[1].content, names(record))
    assert answer.is_exact
    positive = [region["id"] for region in record.provenance["regions"] if region["type"] is not None]
    assert record.provenance["positive_region_ids"] == positive
    assert [each.id for each in answer.findings] == positive
    assert [name for name, is_abnormal in answer.verdicts.items() if is_abnormal] == positive


def test_shortened_records_are_consistent_and_the_same_each_time() -> None:
    records = [make(f"r{i}", positive=3, total=11) for i in range(20)]
    limited = limit_regions(records, 4)
    assert (limited.shortened, limited.left_out) == (20, 140)
    for record, original in zip(limited.records, records, strict=True):
        assert len(names(record)) == 4
        assert names(record) == [name for name in names(original) if name in names(record)]
        assert_consistent(record)
        assert record.turns[0] == original.turns[0]
    assert limit_regions(records, 4) == limited
    assert len({tuple(names(record)) for record in limited.records}) > 10  # drawn by id, not the first ones
    assert [names(original) for original in records] == [[f"R{i}" for i in range(1, 12)]] * 20  # untouched


def test_short_records_and_others_stay_the_same_objects() -> None:
    short, other = make("a", 1, 4), Record("b", (), (), (Turn("user", "x"), Turn("assistant", "y")))
    assert limit_regions([short, other], 4).records == [short, other]
    assert limit_regions([make("c", 2, 9)], None) == ([make("c", 2, 9)], 0, 0)
    assert [*regions_in_chunks(other, 1)] == [other]
    assert [*regions_in_chunks(short, 4)] == [short]
    assert [*regions_in_chunks(make("c", 2, 9), None)] == [make("c", 2, 9)]


@pytest.mark.parametrize(("positive", "total"), [(1, 12), (5, 12), (9, 10), (0, 7), (6, 6)])
def test_share_of_abnormal_ones_is_kept_on_average(positive: int, total: int) -> None:
    """Else a shortened list would say how many of it are abnormal."""
    kept = 5
    counts = []
    for i in range(400):
        record = make(f"scene/{i}", positive, total)
        chosen = drawn_ids(record, kept)
        assert len(chosen) == kept
        counts.append(len(set(chosen) & set(record.provenance["positive_region_ids"])))
    share = kept * positive / total
    assert max(counts) - min(counts) <= 1
    assert sum(counts) / len(counts) == pytest.approx(share, abs=0.08)


def test_chunks_hold_every_candidate_once() -> None:
    record = make("a", 4, 11)
    parts = list(regions_in_chunks(record, 4))
    assert [len(names(part)) for part in parts] == [4, 4, 3]
    assert [name for part in parts for name in names(part)] == names(record)
    for part in parts:
        assert part.id == record.id
        assert_consistent(part)
    only_question = replace(record, turns=record.turns[:1])
    assert [part.turns for part in regions_in_chunks(only_question, 4)] == [record.turns[:1]] * 3


@pytest.mark.parametrize(
    ("answer", "question", "provenance", "words"),
    [
        ("R1 is abnormal", None, {}, "an answer that cannot be shortened"),
        (
            json.dumps({"verdicts": {"R1": "normal"}, "abnormal": ["R1"]}),
            None,
            {},
            "an answer that cannot be shortened",
        ),
        (None, "<image>R1: [0, 0, 9, 9] ...", {}, "no <regions> in the question"),
        (None, None, {"positive_region_ids": None}, "no list of ids"),
    ],
)
def test_what_cannot_be_shortened_is_named(
    answer: str | None, question: str | None, provenance: dict, words: str
) -> None:
    record = make("scene/7", 2, 6)
    turns = (Turn("user", question or record.turns[0].content), Turn("assistant", answer or record.turns[1].content))
    record = replace(record, turns=turns, provenance={**record.provenance, **provenance})
    with pytest.raises(DataFormatError, match=words) as caught:
        keep_regions(record, ["R1", "R2"])
    assert "scene/7" in str(caught.value)
    assert "6 candidates" in str(caught.value)


def test_no_candidate_at_all_is_refused() -> None:
    for call in (lambda: limit_regions([make("a", 1, 4)], 0), lambda: [*regions_in_chunks(make("a", 1, 4), 0)]):
        with pytest.raises(ConfigError, match=r"data\.max_regions is 0; expected at least 1"):
            call()
