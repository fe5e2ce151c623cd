"""Splits: a group stays whole and keeps its split when data are added; the hold-out list and the report are honest."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from finetune.data.splits import GroupBy, HoldOut, Splitter, assign_split, check_ratios, rules_of
from finetune.errors import ConfigError
from finetune.schema import ImageInput, ImageTarget, Record

RATIOS = {"train": 0.8, "val": 0.1, "test": 0.1}


def record(name: str, path: str | None = None, label: int | None = 0, group: str = "", **provenance: object) -> Record:
    images = (ImageInput(path=path or f"/data/{name}.jpg"),)
    return Record(name, images, (ImageTarget(label),), group=group, provenance=provenance)


def test_ratios_are_met_by_many_groups() -> None:
    names = [assign_split(f"photo_{k}", RATIOS, seed=3) for k in range(20_000)]
    for name, share in RATIOS.items():
        assert names.count(name) / len(names) == pytest.approx(share, abs=0.01)


def test_a_group_keeps_its_split_whatever_is_added_and_in_any_order() -> None:
    few = [record(f"r{k}", group=f"g{k % 40}") for k in range(200)]
    many = few + [record(f"new{k}", group=f"h{k % 70}") for k in range(500)]
    random.Random(0).shuffle(many)
    before = {r.id: Splitter(RATIOS, 5).split_of(r) for r in few}
    splitter = Splitter(dict(reversed(RATIOS.items())), 5)
    after = {r.id: splitter.split_of(r) for r in many}
    assert all(after[name] == split for name, split in before.items())
    by_group: dict[str, set[str]] = {}
    for r in many:
        by_group.setdefault(r.group, set()).add(after[r.id])
    assert all(len(splits) == 1 for splits in by_group.values())


def test_the_assignment_is_pinned() -> None:
    """Changing it would move test images of existing sets into training."""
    assert [assign_split(f"g{k}", {"a": 0.5, "b": 0.5}, 0) for k in range(8)] == list("bbaaabba")


def test_another_seed_is_another_division() -> None:
    keys = [f"g{k}" for k in range(100)]
    assert [assign_split(k, RATIOS, 0) for k in keys] != [assign_split(k, RATIOS, 1) for k in keys]


@pytest.mark.parametrize("ratios", [{}, {"train": 0.8}, {"train": 1.2, "val": -0.2}])
def test_bad_ratios_are_refused(ratios: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        check_ratios(ratios)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("group", "g"),
        ("parent", "set/scene_07"),
        ("path:(scene_[0-9]+)", "scene_07"),
        ("path:scene_.", "scene_0"),
        ("path:nothing", ""),
        ("provenance.source.photo", "p1"),
        ("provenance.source.none", ""),
        ("provenance.number", "0"),
    ],
)
def test_where_groups_come_from(rule: str, expected: str) -> None:
    one = record("a", "/data/set/scene_07/a.jpg", group="g", source={"photo": "p1"}, number=0)
    assert GroupBy(rule, root="/data").named(one) == expected


@pytest.mark.parametrize("rule", ["folder", "path:(", "provenance", "provenance.", ""])
def test_an_unknown_rule_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="group_by"):
        GroupBy(rule)


def test_records_without_a_group_go_by_their_image_not_by_their_place_in_the_file() -> None:
    group_by = GroupBy(root="/data")
    assert group_by.key(record("t:1", "/data/a.jpg")) == group_by.key(record("t:9", "/data/a.jpg")) == "image:a.jpg"
    embedded = Record("x", (ImageInput(data=b"abc"),), (ImageTarget(),))
    assert group_by.key(embedded).startswith("sha256:ba7816bf")
    container = record("named", "/data/train-00000.parquet#3/images/0")
    assert group_by.key(container) == "record:named"
    splitter = Splitter(RATIOS, 0)
    for k in range(4):
        splitter.split_of(record(f"r{k}"))
    assert splitter.report().ungrouped == 4
    assert any("4 of 4 records have no group" in line for line in splitter.report().warnings)


def test_groups_do_not_depend_on_how_a_data_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute, through a link, moved: one key for one picture, and one for its folder."""
    for place in ("set/scene_1", "moved/set/scene_1"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    roots = ["set", "./set/", str(tmp_path / "set"), "link", "moved/set", "scene/../set"]
    keys = {
        rule: {GroupBy(rule, root).key(record("r", f"{root}/scene_1/a.jpg")) for root in roots}
        for rule in ("group", "parent")
    }
    assert keys == {"group": {"image:scene_1/a.jpg"}, "parent": {"scene_1"}}
    typed = record("r", str(tmp_path / "set" / "scene_1" / "a.jpg"))  # absolute in the file, read through the link
    assert GroupBy("group", "link").key(typed) == "image:scene_1/a.jpg"
    assert GroupBy("parent", "set/scene_1").key(typed) == "."  # all of it is one folder
    assert GroupBy("group", "moved").key(typed) == f"image:{typed.images[0].path}"  # lies elsewhere


def test_folders_of_several_roots_are_told_apart_and_pictures_are_kept_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
    sources = [(name, str(tmp_path / place)) for name, place in (("one", "a"), ("two", "b"), ("again", "a"))]
    records = [record("r", f"{root}/images/7.jpg") for _, root in sources]
    for rule, expected in (
        ("group", ["image:images/7.jpg"] * 3),
        ("parent", ["one/images", "two/images", "one/images"]),
        ("path:(images)", ["images"] * 3),
    ):
        assert [each.key(r) for each, r in zip(rules_of(rule, sources), records, strict=True)] == expected
    assert rules_of("parent", sources[:1])[0].key(records[0]) == "images"


def test_one_group_for_everything_is_an_error() -> None:
    splitter = Splitter(RATIOS, 0, GroupBy("parent"))
    for k in range(5):
        splitter.split_of(record(f"r{k}"))
    with pytest.raises(ConfigError, match="all 5 records into one group"):
        splitter.report()


def test_a_held_out_line_takes_the_whole_group_and_a_useless_one_is_reported(tmp_path: Path) -> None:
    listed = tmp_path / "hold.txt"
    listed.write_text("\ufeff# comment\n\ng3\nimages/r8.jpg\nscans/*.png\nnot there\ng3\n", encoding="utf-8")
    group_by = GroupBy(root="/data/images")  # a line may also name a path from above the root
    hold_out = HoldOut.read(listed, group_by)
    records = [record(f"r{k}", f"/data/images/r{k}.jpg", group=f"g{k % 7}") for k in range(30)]
    records.append(record("scan", "/data/scans/deep/x.png", group="other"))
    splitter = Splitter({"train": 1.0, "test": 0.0}, 0, group_by, hold_out)
    splitter.scan(records)
    held = {r.group for r in records if splitter.split_of(r) == "test"}
    assert held == {"g3", "g1", "other"}  # g1 by its image r8
    assert [line for line in splitter.report().warnings if "hold-out" in line] == [
        "hold-out line 'not there' matches no group and no image"
    ]


def test_hold_out_needs_a_scan_and_a_known_split(tmp_path: Path) -> None:
    group_by = GroupBy()
    with pytest.raises(ConfigError, match="hold-out split is 'blind'"):
        Splitter(RATIOS, 0, group_by, HoldOut(["g"], group_by), "blind")
    with pytest.raises(ValueError, match="scan"):
        Splitter(RATIOS, 0, group_by, HoldOut(["g"], group_by)).split_of(record("r"))
    with pytest.raises(ConfigError, match="cannot be read"):
        HoldOut.read(tmp_path / "none.txt", group_by)


def test_the_report_counts_and_warns() -> None:
    ratios = {"train": 0.5, "val": 0.5, "test": 0.0}
    in_train = [name for name in map(str, range(100)) if assign_split(name, ratios, 0) == "train"]
    in_val = next(name for name in map(str, range(100)) if assign_split(name, ratios, 0) == "val")
    splitter = Splitter(ratios, 0)
    for k in range(9):
        splitter.split_of(record(f"r{k}", group=in_train[k], label=k % 2))
    for k in range(9, 12):
        splitter.split_of(record(f"r{k}", group=in_val, label=k % 2))
    splitter.split_of(record("u", group=in_train[0], label=None))
    report = splitter.report()
    train = report.counts["train"]
    assert (train.records, train.groups, train.images) == (10, 9, 10)
    assert train.labels == {0: 5, 1: 4, None: 1}
    counted = "10 images: 5 real, 4 tampered, 1 without label"
    assert report.lines()[0] == f"train: 10 records (76.9%) in 9 groups, {counted}"
    assert any("'train' got 76.9% of the records to be divided" in line for line in report.warnings)
    lonely = Splitter({"train": 0.5, "val": 0.5}, 0)
    lonely.split_of(record("a", group=in_train[0], label=0))
    lonely.split_of(record("b", group=in_train[1], label=1))
    assert "split 'val' is empty; it was to have 50% (few groups, or large ones)" in lonely.report().warnings
    lonely.split_of(record("c", group=in_val, label=1))
    assert "split 'val' has no real image" in lonely.report().warnings


def test_records_with_a_split_of_their_own_are_not_held_against_the_ratios() -> None:
    splitter = Splitter({"train": 1.0, "test": 0.0}, 0)
    for k in range(4):
        splitter.split_of(record(f"r{k}", group=f"g{k}", label=k % 2))
        splitter.split_of(record(f"t{k}", group=f"h{k}", label=k % 2), forced="test")
    assert splitter.report().warnings == ()
