"""Which operation an image's record names, as the number the operation head learns."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.edit_operations import operation_labels, operation_name, unused_operations
from finetune.schema import ImageTarget, Record

NAMES = ["splice", "retouch.grain", "retouch"]


def record(operation: Any, *labels: int | None) -> Record:
    targets = tuple(ImageTarget(label=label) for label in labels)
    return Record("r", tuple(f"{i}.png" for i in range(len(labels))), targets, provenance={"operation": operation})


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ({"name": "splice"}, 1),
        ({"name": "splice", "kind": "face"}, 1),
        ({"name": "retouch", "kind": "grain"}, 2),
        ({"name": "retouch", "kind": "tone"}, 3),
        ({"name": "retouch"}, 3),
        ({"name": "remove"}, -100),
        ({"kind": "grain"}, -100),
        ({}, -100),
        (None, -100),
        ("splice", -100),
    ],
)
def test_label_of_a_tampered_image(operation: Any, expected: int) -> None:
    assert operation_labels(record(operation, 1), NAMES) == [expected]


def test_images_without_an_operation_of_their_own() -> None:
    splice = {"name": "splice"}
    assert operation_labels(record(None, 0), NAMES) == [0]
    assert operation_labels(record(splice, None), NAMES) == [-100]
    assert operation_labels(record(splice, 0, 1, None), NAMES) == [0, 1, -100]
    assert operation_labels(record(splice, 1, 1, 0), NAMES) == [-100, -100, 0]  # whose operation it is, is not said
    assert operation_labels(Record("text", (), ()), NAMES) == []


def test_of_several_edits_no_place_is_known() -> None:
    several = record({"name": "splice"}, 1, 0)
    several.provenance["further_operations"] = [{"name": "splice"}]
    assert operation_labels(several, NAMES) == [-100, 0]


def test_the_name_alone() -> None:
    assert operation_name(record({"name": "retouch", "kind": "grain"}, 1)) == "retouch"
    assert [operation_name(record(other, 1)) for other in (None, "splice", {"name": None})] == ["", "", ""]


def test_names_that_label_nothing_are_said_with_what_the_records_say() -> None:
    grain = record({"name": "retouch", "kind": "grain"}, 1)
    records = [grain, grain, record({"name": "splice"}, 1, 1), record(None, 1), record({"name": "remove"}, 0)]
    found = unused_operations(records, ["splice", "retouch.grain", "retouch"])
    assert found is not None
    assert found.startswith("heads.operations names splice, retouch, which no training record has")
    assert found.endswith("says: retouch.grain (2), splice (1), nothing (1)")
    assert unused_operations(records, ["retouch"]) is None
    assert unused_operations([], []) is None
