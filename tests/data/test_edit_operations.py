"""What was done where in an image, as its record and its mask file tell the operation head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.edit_operations import operation_map, operation_name, unused_operations
from finetune.data.masks import load_mask
from finetune.data.synthesis.image_files import encode_numbers
from finetune.schema import ImageTarget, Record

NAMES = ["splice", "retouch.grain", "retouch"]


def record(operation: Any, *labels: int | None) -> Record:
    targets = tuple(ImageTarget(label=label) for label in labels)
    return Record("r", tuple(f"{i}.png" for i in range(len(labels))), targets, provenance={"operation": operation})


MASK = np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8)


def operations(record: Record, mask: np.ndarray | None = MASK) -> list[int | None]:
    """Of each image the operation that its map says of the mask, None without a map; it is 0 elsewhere."""
    found: list[int | None] = []
    for image in range(len(record.images)):
        places = operation_map(record, image, NAMES, mask)
        if places is None:
            found.append(None)
        else:
            assert places.dtype == np.int16
            (place,) = set(places[MASK > 0].tolist())
            assert (places == np.where(MASK > 0, place, 0)).all()
            found.append(place)
    return found


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ({"name": "splice"}, 1),
        ({"name": "splice", "kind": "face"}, 1),
        ({"name": "retouch", "kind": "grain"}, 2),
        ({"name": "retouch", "kind": "tone"}, 3),
        ({"name": "retouch"}, 3),
        ({"name": "remove"}, None),
        ({"kind": "grain"}, None),
        ({}, None),
        (None, None),
        ("splice", 1),
        ("retouch", 3),
        (["splice"], None),
    ],
)
def test_operation_of_a_tampered_image(operation: Any, expected: int | None) -> None:
    assert operations(record(operation, 1)) == [expected]
    assert operations(record(operation, 1), None) == [None]


def test_images_without_an_operation_of_their_own() -> None:
    splice = {"name": "splice"}
    assert operations(record(None, 0)) == [0]
    assert operations(record(splice, None)) == [None]
    assert operations(record(splice, 0, 1, None)) == [0, 1, None]
    assert operations(record(splice, 1, 1, 0)) == [1, 1, 0]


def test_images_with_a_provenance_each() -> None:
    """As `forensics synth` writes conversations about several images."""
    mixed = record(None, 0, 1, 1)
    own = [{"operation": None}, {"operation": {"name": "retouch", "kind": "tone"}}, {"operation": {"name": "splice"}}]
    mixed.provenance["images"] = own
    assert operations(mixed) == [0, 3, 1]
    assert [operation_name(mixed, index) for index in range(3)] == ["", "retouch", "splice"]
    own[2]["further_operations"] = [{"name": "splice"}]
    assert operations(mixed) == [0, 3, None]
    own[2]["further_operations"] = []
    assert operations(mixed) == [0, 3, 1]


def several_edits(mask_path: Path | None, *further: Any) -> Record:
    """A splice and further edits, with the mask file that is there."""
    found = record({"name": "splice"}, 1)
    found.provenance["further_operations"] = list(further)
    return replace(found, targets=(ImageTarget(label=1, mask_path=str(mask_path) if mask_path else None),))


def test_several_edits_are_told_apart_by_the_numbers_of_the_mask(tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 1], [3, 2, 4]], dtype=np.uint8)
    path = tmp_path / "mask.png"
    path.write_bytes(encode_numbers(numbers))
    assert (np.asarray(Image.open(path)) == numbers).all()
    several = several_edits(path, {"name": "remove"}, {"name": "retouch", "kind": "grain"})
    found = operation_map(several, 0, NAMES, (numbers > 0).astype(np.uint8))
    assert found is not None
    assert found.tolist() == [[0, 1, 1], [2, -100, -100]]  # neither a name nor an edit: unknown
    shown = np.array([[0, 0, 1], [0, 0, 0]], dtype=np.uint8)  # the rest is hidden
    found = operation_map(several, 0, NAMES, shown)
    assert found is not None
    assert found.tolist() == [[0, 0, 1], [0, 0, 0]]
    larger = operation_map(several, 0, NAMES, np.ones((4, 6), dtype=np.uint8))
    assert larger is not None
    assert larger[2:].tolist() == [[2, 2, -100, -100, -100, -100]] * 2
    assert larger[0].tolist() == [-100, -100, 1, 1, 1, 1]  # the mask says tampered, no number what
    half = operation_map(several, 0, NAMES, np.ones((1, 3), dtype=np.uint8))  # smaller: at least half of each pixel
    assert half is not None
    assert half.tolist() == [[2, -100, 1]]
    assert operation_map(several, 0, ["erase"], numbers) is None
    assert unused_operations([several], ["splice", "retouch"]) is None
    Image.fromarray(numbers).save(path)  # small grey levels are numbers too
    found = operation_map(several, 0, NAMES, (numbers > 0).astype(np.uint8))
    assert found is not None
    assert found.tolist() == [[0, 1, 1], [2, -100, -100]]


def test_numbered_masks_read_as_masks(tmp_path: Path) -> None:
    numbers = np.arange(31, dtype=np.uint8)[None]
    path = tmp_path / "mask.png"
    path.write_bytes(encode_numbers(numbers))
    mask = load_mask(ImageTarget(label=1, mask_path=str(path)), (1, 31))
    assert mask is not None
    assert (mask == (numbers > 0)).all()
    assert ((np.asarray(Image.open(path).convert("L")) > 127) == (numbers > 0)).all()
    assert (np.asarray(Image.open(path)) == numbers).all()
    with pytest.raises(ValueError, match="number 31 in a mask, there are colours for 30"):
        encode_numbers(numbers + 1)


def test_of_several_edits_no_place_is_known_without_numbers(tmp_path: Path) -> None:
    white = Image.fromarray(MASK * 255)
    paths = [tmp_path / name for name in ("grey.png", "palette.png", "two.gif", "lossy.jpg")]
    for path, picture in zip(paths, (white, white.convert("P"), white.convert("1"), white), strict=True):
        picture.save(path)
    cases = [several_edits(path, {"name": "splice"}) for path in paths]
    for several in (*cases, several_edits(None, "splice"), several_edits(paths[0], 1, None)):
        assert operations(several) == [None]
        found = unused_operations([several, several], NAMES)
        assert found is not None
        assert "says: several edits (2). Write the names" in found
    damaged = record({"name": "splice"}, 1)
    damaged.provenance["further_operations"] = {"name": "splice"}
    assert operations(damaged) == [None]


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
