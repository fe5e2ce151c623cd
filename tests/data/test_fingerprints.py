"""Fingerprints and disjoint splits: copies are found however they were saved, others are not; the search is exact."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from finetune.data.duplicates import ImageIndex, assert_disjoint
from finetune.data.fingerprints import Fingerprint, are_alike, file_sha256, fingerprint, near_pairs
from finetune.errors import DataFormatError
from finetune.schema import ImageInput

RNG = np.random.default_rng(0)


def scene(seed: int, size: tuple[int, int] = (300, 400)) -> Image.Image:
    """A drawn picture with structure at every scale, as photographs have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((*size, 3))
    for side, weight in ((4, 60), (8, 40), (16, 25), (64, 12)):
        noise = Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).resize(size[::-1], Image.BICUBIC)
        total += weight * (np.asarray(noise) / 127.5 - 1)
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


def saved(picture: Image.Image, **options: object) -> tuple[ImageInput, Image.Image]:
    buffer = io.BytesIO()
    picture.save(buffer, **(options or {"format": "PNG"}))
    image = ImageInput(data=buffer.getvalue())
    return image, Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def of(picture: Image.Image, **options: object) -> Fingerprint:
    return fingerprint(*saved(picture, **options))


def distance(a: Fingerprint, b: Fingerprint) -> int:
    assert a.phash is not None
    assert b.phash is not None
    return (a.phash ^ b.phash).bit_count()


COPIES = {
    "jpeg 50": lambda p: p,
    "half": lambda p: p.resize((p.width // 2, p.height // 2), Image.BICUBIC),
    "1.5": lambda p: p.resize((p.width * 3 // 2, p.height * 3 // 2), Image.BICUBIC),
    "other aspect": lambda p: p.resize((256, 256), Image.BICUBIC),
    "blurred": lambda p: p.filter(ImageFilter.GaussianBlur(2)),
    "grey": lambda p: p.convert("L").convert("RGB"),
    "contrast": lambda p: ImageEnhance.Contrast(p).enhance(0.7),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_near(name: str) -> None:
    for seed in range(6):
        original, copy = of(scene(seed)), of(COPIES[name](scene(seed)), format="JPEG", quality=50)
        assert original.sha256 != copy.sha256
        assert distance(original, copy) <= 4
        assert are_alike(*(np.frombuffer(f.thumbnail, np.uint8)[None] for f in (original, copy)))[0]


def test_different_pictures_and_turned_ones_are_far() -> None:
    prints = [of(scene(seed)) for seed in range(12)]
    assert min(distance(a, b) for k, a in enumerate(prints) for b in prints[:k]) > 8
    turned = [of(scene(seed).transpose(how)) for seed in range(3) for how in (Image.ROTATE_90, Image.FLIP_LEFT_RIGHT)]
    assert all(distance(prints[k // 2], copy) > 8 for k, copy in enumerate(turned))


def test_flat_pictures_have_no_hash() -> None:
    ramp = np.linspace(100, 180, 300)[:, None, None] + RNG.normal(0, 2, (300, 400, 3))
    for levels in (np.full((300, 400, 3), 90.0), ramp):
        assert of(Image.fromarray(levels.clip(0, 255).astype(np.uint8))).phash is None


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    scene(1).save(path)
    expected = hashlib.sha256(path.read_bytes()).digest()
    assert file_sha256(ImageInput(path=str(path))) == expected == file_sha256(ImageInput(data=path.read_bytes()))


@pytest.mark.real_data
def test_different_photographs_are_told_apart(shared_data: Path) -> None:
    prints = []
    for path in sorted((shared_data / "photos").glob("*.png"))[:20]:
        picture = Image.open(path).convert("RGB")
        prints.append(fingerprint(ImageInput(path=str(path)), picture))
        assert distance(prints[-1], of(picture.resize((384, 256)), format="JPEG", quality=60)) <= 4
    assert min(distance(a, b) for k, a in enumerate(prints) for b in prints[:k]) >= 12


@pytest.mark.parametrize("max_distance", [0, 1, 4, 7])
@pytest.mark.parametrize("block", [7, 2048])
def test_near_pairs_are_exactly_those_of_brute_force(max_distance: int, block: int) -> None:
    rng = np.random.default_rng(max_distance)
    centres = rng.integers(0, 2**63, 60, dtype=np.uint64)
    hashes = [int(c) for c in centres]
    for c in centres:
        for _ in range(6):
            flips = rng.choice(64, rng.integers(1, 9), replace=False)
            hashes.append(int(c) ^ sum(1 << int(bit) for bit in flips))
    values = np.array(sorted(set(hashes)), dtype=np.uint64)
    found = [tuple(pair) for pairs in near_pairs(values, max_distance, block) for pair in pairs.tolist()]
    expected = {
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (int(values[i]) ^ int(values[j])).bit_count() <= max_distance
    }
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert max_distance < 4 or expected


def test_near_pairs_of_nothing_and_of_many() -> None:
    assert list(near_pairs(np.array([], np.uint64))) == []
    assert list(near_pairs(np.array([5], np.uint64))) == []
    with pytest.raises(ValueError, match=r"0\.\.16"):
        list(near_pairs(np.array([5], np.uint64), 17))


def index(*images: tuple[str, str, str, Fingerprint]) -> ImageIndex:
    made = ImageIndex()
    for image in images:
        made.add(*image)
    return made


def test_twins_in_one_split_are_fine_and_across_splits_are_not() -> None:
    a, copy, b = of(scene(1)), of(scene(1), format="JPEG", quality=60), of(scene(2))
    fine = index(("x", "train", "g", a), ("y", "train", "g", copy), ("z", "test", "h", b))
    assert_disjoint(fine)
    assert [same.tolist() for same in fine.alike()] == [[0, 1]]
    with pytest.raises(DataFormatError, match=r"1 x pictures that look the same.*train: x \| test: y"):
        assert_disjoint(index(("x", "train", "", a), ("y", "test", "", copy), ("z", "test", "", b)))
    with pytest.raises(DataFormatError, match="1 x the same image file"):
        assert_disjoint(index(("x", "train", "", a), ("y", "test", "", a)))
    with pytest.raises(DataFormatError, match=r"1 x records of one group.*train: x \| test: z"):
        assert_disjoint(index(("x", "train", "g", a), ("z", "test", "g", b)))


def test_the_error_counts_names_the_first_few_and_says_the_way_out() -> None:
    rng = np.random.default_rng(0)
    made = ImageIndex()
    for k in range(5):
        for split in ("train", "test"):
            made.add(f"{split}{k}", split, f"scene{k}", Fingerprint(rng.bytes(32), None, rng.bytes(256)))
    with pytest.raises(DataFormatError) as caught:
        assert_disjoint(made)
    message = str(caught.value)
    assert "5 x records of one group ('scene0' train: train0 | test: test0; 'scene1' " in message
    assert "'scene2' train: train2 | test: test2; and 2 more)" in message
    assert "scene3" not in message
    for way_out in ("--overwrite", "splits.group_by", "splits.on_overlap=warn"):
        assert way_out in message
    assert "\n" not in message


def test_each_overlap_is_told_once_and_by_its_strongest_kind() -> None:
    a, copy = of(scene(1)), of(scene(1), format="JPEG", quality=60)
    both = index(("x", "train", "", a), ("y", "test", "", a), ("z", "val", "", copy), ("w", "val", "", of(scene(3))))
    assert [(o.kind, o.numbers.tolist()) for o in both.overlaps()] == [("bytes", [0, 1]), ("picture", [0, 1, 2])]
    only_bytes = index(("x", "train", "", a), ("y", "test", "", a))
    assert [o.kind for o in only_bytes.overlaps()] == ["bytes"]


def test_flat_pictures_collide_by_bytes_only() -> None:
    white, grey = (of(Image.new("RGB", (64, 64), level)) for level in ("white", "grey"))
    skies = index(("x", "train", "", white), ("y", "test", "", grey))
    assert skies.num_flat == 2
    assert skies.overlaps() == []
    assert [o.kind for o in index(("x", "train", "", white), ("y", "test", "", white)).overlaps()] == ["bytes"]


def test_an_equal_hash_alone_is_not_enough() -> None:
    a, b = of(scene(1)), of(scene(2))
    forged = Fingerprint(b.sha256, a.phash, b.thumbnail)
    assert index(("x", "train", "", a), ("y", "test", "", forged)).overlaps() == []


def test_an_index_grows_after_it_was_searched_and_finds_groups_among_many() -> None:
    rng = np.random.default_rng(0)
    prints = [Fingerprint(rng.bytes(32), n << 40, rng.bytes(256)) for n in range(30)]
    made = index(*((f"{n}", "train", f"g{n // 3}", each) for n, each in enumerate(prints)))
    assert made.overlaps(0) == []
    made.add("late", "test", "g4", Fingerprint(rng.bytes(32), prints[7].phash, prints[7].thumbnail))
    found = {overlap.kind: overlap.numbers.tolist() for overlap in made.overlaps(0)}
    assert found == {"group": [12, 13, 14, 30], "picture": [7, 30]}


def test_an_empty_index_is_disjoint() -> None:
    assert_disjoint(ImageIndex())


def test_a_hundred_thousand_hashes_take_seconds_not_hours() -> None:
    rng = np.random.default_rng(1)
    hashes = np.unique(rng.integers(0, 2**64, 100_000, dtype=np.uint64))
    planted = np.unique(np.append(hashes, hashes[:50] ^ np.uint64(0b1011)))
    found = np.concatenate(list(near_pairs(planted)))
    assert len(found) == 50
