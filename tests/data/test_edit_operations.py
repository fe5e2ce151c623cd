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
        ("splice", 1),
        ("retouch", 3),
        (["splice"], -100),
    ],
)
def test_label_of_a_tampered_image(operation: Any, expected: int) -> None:
    assert operation_labels(record(operation, 1), NAMES) == [expected]


def test_images_without_an_operation_of_their_own() -> None:
    splice = {"name": "splice"}
    assert operation_labels(record(None, 0), NAMES) == [0]
    assert operation_labels(record(splice, None), NAMES) == [-100]
    assert operation_labels(record(splice, 0, 1, None), NAMES) == [0, 1, -100]
    assert operation_labels(record(splice, 1, 1, 0), NAMES) == [1, 1, 0]
    assert operation_labels(Record("text", (), ()), NAMES) == []


def test_images_with_a_provenance_each() -> None:
    """As `forensics synth` writes conversations about several images."""
    mixed = record(None, 0, 1, 1)
    own = [{"operation": None}, {"operation": {"name": "retouch", "kind": "tone"}}, {"operation": {"name": "splice"}}]
    mixed.provenance["images"] = own
    assert operation_labels(mixed, NAMES) == [0, 3, 1]
    assert [operation_name(mixed, index) for index in range(3)] == ["", "retouch", "splice"]
    own[2]["further_operations"] = [{"name": "splice"}]
    assert operation_labels(mixed, NAMES) == [0, 3, -100]


def test_of_several_edits_no_place_is_known() -> None:
    several = record({"name": "splice"}, 1)
    several.provenance["further_operations"] = [{"name": "splice"}]
    assert operation_labels(several, NAMES) == [-100]
    found = unused_operations([several, several], NAMES)
    assert found is not None
    assert "says: several edits (2). Write the names" in found


def test_the_name_alone() -> None:
    assert operation_name(record({"name": "retouch", "kind": "grain"}, 1)) == "retouch"
    assert [operation_name(record(other, 1)) for other in (None, "splice", {"name": None})] == ["", "splice", ""]


def test_names_that_label_nothing_are_said_with_what_the_records_say() -> None:
    grain = record({"name": "retouch", "kind": "grain"}, 1)
    records = [grain, grain, record("remove", 1, 0), record(None, 1), record({"name": "erase"}, 0)]
    found = unused_operations(records, ["splice", "retouch.grain", "retouch"])
    assert found is not None
    assert found.startswith("heads.operations names splice, retouch, which no tampered training image has")
    assert "says: retouch.grain (2), remove (1), nothing (1). Write the names as the records do, or remove" in found
    assert unused_operations(records, ["retouch"]) is None
    assert unused_operations([], []) is None
