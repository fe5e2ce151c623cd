"""Folders: every public layout is read as it ships, groups join what shares a source, nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.masks import load_mask
from finetune.data.readers import READERS, read_records, scan_records
from finetune.data.readers.folder_layout import LAYOUTS
from finetune.errors import DataFormatError


def tree(root: Path, names: str) -> Path:
    """Empty files; each line is `folder: name name ...`."""
    for line in names.strip().splitlines():
        folder, _, files = line.strip().partition(": ")
        for name in files.split():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def table(root: Path, **options: Any) -> dict[str, tuple[int | None, str | None, str]]:
    """Image path below the root -> label, mask path, group."""
    found = {}
    for record in read_records(root, options=options):
        target, path = record.targets[0], record.images[0].path
        mask = None if target.mask_path is None else str(Path(target.mask_path).relative_to(root))
        assert path == str(root / record.id)
        found[record.id] = (target.label, mask, record.group)
    return found


def errors_of(root: Path, **options: Any) -> list[str]:
    errors = [str(error) for error in scan_records(root, options=options)[1]]
    assert not any("\n" in error for error in errors)
    return errors


def test_three_folders(tmp_path: Path) -> None:
    tree(tmp_path, "authentic: a.jpg sub/b.PNG notes.txt .hidden.jpg\ntampered: a.jpg c.tif\nmasks: a.png c.png")
    assert table(tmp_path) == {
        "authentic/a.jpg": (0, None, "a"),
        "authentic/sub/b.PNG": (0, None, "b"),
        "tampered/a.jpg": (1, "masks/a.png", "a"),
        "tampered/c.tif": (1, "masks/c.png", "c"),
    }


def test_own_names_and_patterns(tmp_path: Path) -> None:
    tree(tmp_path, "real: p1_r.jpg\nfake/x: p1-f2.jpg\ngt: p1_f2_mask.png\nother: z.jpg")
    options = {
        "authentic": "real",
        "tampered": ["fake"],
        "masks": "gt",
        "authentic_name": "(?P<photo>p[0-9]+)_r",
        "tampered_name": "(?P<photo>p[0-9]+)-(?P<kind>.+)",
        "mask_name": "{photo}_{kind}_mask",
        "group": "{photo}",
        "mask_convention": "source_and_target",
    }
    assert table(tmp_path, **options) == {
        "real/p1_r.jpg": (0, None, "p1"),
        "fake/x/p1-f2.jpg": (1, "gt/p1_f2_mask.png", "p1"),
    }
    tampered = read_records(tmp_path, options=options)[1]
    assert tampered.provenance == {"mask_convention": "source_and_target"}
    assert table(tmp_path, tampered="fake") == {"fake/x/p1-f2.jpg": (1, None, "p1-f2")}  # labels without masks


CASIA2 = """
Au: Au_ani_00001.jpg Au_sec_00096.jpg Au_nat_20001.bmp
Tp: Tp_D_CND_M_N_ani00001_sec00096_00138.tif Tp_S_NRN_S_O_sec00036_sec00036_00764.jpg
CASIA 2 Groundtruth: Tp_D_CND_M_N_ani00001_sec00096_00138_gt.png Tp_S_NRN_S_O_sec00036_sec00036_00764_gt.png
"""


def test_casia2_joins_both_sources_of_a_splice(tmp_path: Path) -> None:
    found = table(tree(tmp_path, CASIA2))
    assert found == {
        "Au/Au_ani_00001.jpg": (0, None, "casia2/ani00001"),
        "Au/Au_nat_20001.bmp": (0, None, "casia2/nat20001"),
        "Au/Au_sec_00096.jpg": (0, None, "casia2/ani00001"),
        "Tp/Tp_D_CND_M_N_ani00001_sec00096_00138.tif": (
            1,
            "CASIA 2 Groundtruth/Tp_D_CND_M_N_ani00001_sec00096_00138_gt.png",
            "casia2/ani00001",
        ),
        "Tp/Tp_S_NRN_S_O_sec00036_sec00036_00764.jpg": (
            1,
            "CASIA 2 Groundtruth/Tp_S_NRN_S_O_sec00036_sec00036_00764_gt.png",
            "casia2/sec00036",
        ),
    }
    assert {r.provenance.get("mask_convention") for r in read_records(tmp_path) if r.label} == {"target"}


def test_casia1_in_both_unpackings(tmp_path: Path) -> None:
    mask = "CASIA 1.0 groundtruth/CM: Sp_S_NND_A_nat0054_nat0054_0189_gt.png"
    name = "Sp_S_NND_A_nat0054_nat0054_0189.jpg"
    for folder, prefix in (("a", "CASIA 1.0 dataset/Modified Tp/Tp/"), ("b", "Tp/")):
        root = tree(tmp_path / folder, f"{prefix}CM: {name}\n{mask}")
        tree(root, f"{prefix.split('Modified')[0] if 'dataset' in prefix else ''}Au: Au_nat_0054.jpg")
        found = table(root, preset="casia1")
        assert [(label, group) for label, _, group in found.values()] == [(0, "casia1/nat0054"), (1, "casia1/nat0054")]
        assert found[f"{prefix}CM/{name}"][1] == "CASIA 1.0 groundtruth/CM/Sp_S_NND_A_nat0054_nat0054_0189_gt.png"
        tree(root, f"{prefix}Sp: Sp_D_NRN_A_cha0011_sec0011_0542.jpg")  # the known one without a mask
        (error,) = errors_of(root, preset="casia1")
        assert "tampered image without a mask" in error
        assert "'Sp_D_NRN_A_cha0011_sec0011_0542_gt' ({stem}_gt)" in error


def test_coverage(tmp_path: Path) -> None:
    tree(tmp_path, "image: 1.tif 1t.tif\nmask: 1copy.tif 1forged.tif 1paste.tif\nlabel: 1.mat")
    assert table(tmp_path) == {
        "image/1.tif": (0, None, "coverage/1"),
        "image/1t.tif": (1, "mask/1forged.tif", "coverage/1"),
    }


def test_comofod_with_post_processed_variants(tmp_path: Path) -> None:
    tree(tmp_path, ".: 001_O.png 001_F.png 001_B.png 001_M.png 001_F_JC1.jpg 001_O_NA3.png 002_F.png 002_B.png")
    found = table(tmp_path, preset="comofod")
    assert found == {
        "001_O.png": (0, None, "comofod/001"),
        "001_O_NA3.png": (0, None, "comofod/001"),
        "001_F.png": (1, "001_B.png", "comofod/001"),
        "001_F_JC1.jpg": (1, "001_B.png", "comofod/001"),
        "002_F.png": (1, "002_B.png", "comofod/002"),
    }
    forged = next(r for r in read_records(tmp_path, options={"preset": "comofod"}) if r.label)
    assert forged.provenance["mask_convention"] == "source_and_target"


def test_imd2020(tmp_path: Path) -> None:
    tree(tmp_path, "1a07yi: 1a07yi_orig.jpg c8swtoq_0.jpg c8swtoq_0_mask.png d_0.png d_0_mask.png\nzz: zz_orig.jpg")
    assert table(tmp_path, preset="imd2020") == {
        "1a07yi/1a07yi_orig.jpg": (0, None, "imd2020/1a07yi"),
        "1a07yi/c8swtoq_0.jpg": (1, "1a07yi/c8swtoq_0_mask.png", "imd2020/1a07yi"),
        "1a07yi/d_0.png": (1, "1a07yi/d_0_mask.png", "imd2020/1a07yi"),
        "zz/zz_orig.jpg": (0, None, "imd2020/zz"),
    }


def test_columbia_masks_are_read_by_their_colour(tmp_path: Path) -> None:
    tree(tmp_path, "4cam_auth: canong3_02_sub_01.tif\n4cam_auth/edgemask: canong3_02_sub_01_edgemask.jpg")
    root = tree(tmp_path, "4cam_splc/edgemask: canong3_canonxt_sub_01_edgemask_3.jpg")
    Image.new("RGB", (32, 16)).save(root / "4cam_splc/canong3_canonxt_sub_01.tif")
    colours = np.zeros((16, 32, 3), np.uint8)
    colours[:, :8], colours[:, 8:16], colours[:, 16:24], colours[:, 24:] = (
        (200, 0, 0),
        (255, 0, 0),
        (0, 255, 0),
        (0, 200, 0),
    )
    Image.fromarray(colours).save(
        root / "4cam_splc/edgemask/canong3_canonxt_sub_01_edgemask.jpg", quality=100, subsampling=0
    )
    real, spliced = read_records(root)
    assert (real.label, spliced.label, real.group, spliced.group) == (0, 1, "columbia", "columbia")
    mask = load_mask(spliced.targets[0], (16, 32))
    assert mask is not None
    assert np.array_equal(mask, colours[..., 1] > 0)


def test_dark_masks_and_masks_of_another_size(tmp_path: Path) -> None:
    for name in ("authentic", "tampered", "masks"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "tampered/a.png")
    values = np.full((4, 6), 255, np.uint8)
    values[1:3, 2:5] = 0
    Image.fromarray(values).save(tmp_path / "masks/a.png")
    (record,) = read_records(tmp_path, options={"mask_pixels": "dark"})
    assert np.array_equal(load_mask(record.targets[0], (4, 6)), values == 0)
    Image.fromarray(values[:, :5]).save(tmp_path / "masks/a.png")
    assert "mask is 4x5 but the image is 4x6" in errors_of(tmp_path, mask_pixels="dark")[0]
    Image.new("L", (6, 4), 255).save(tmp_path / "masks/a.png")
    assert "no pixel of the mask is dark" in errors_of(tmp_path, mask_pixels="dark")[0]


def test_nothing_is_guessed(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "authentic: a.jpg\ntampered: b.jpg c.jpg x/d.jpg y/d.jpg E.jpg\n"
        "masks: c.png c.jpg d.png e.png left.png y/odd.png",
    )
    records, errors = scan_records(root)
    assert [record.id for record in records] == ["authentic/a.jpg"]
    expected = {
        "tampered/E.jpg": "found ['e']",
        "tampered/b.jpg": "tampered image without a mask",
        "tampered/c.jpg": "2 masks for one image",
        "tampered/x/d.jpg": "also for tampered/y/d.jpg",
        "tampered/y/d.jpg": "also for tampered/x/d.jpg",
        "masks/c.jpg": "mask without an image",
        "masks/c.png": "mask without an image",
        "masks/e.png": "mask without an image",
        "masks/left.png": "mask without an image",
        "masks/y/odd.png": "mask without an image",
    }
    assert {error.source for error in errors} == set(expected)
    for error in errors:
        assert expected[error.source or ""] in str(error)
    tree(root, "tampered: strange.jpg")
    assert any("fits no pattern" in error for error in errors_of(root, tampered_name="[a-zE]"))


def test_equal_names_in_sub_folders_keep_to_their_folder(tmp_path: Path) -> None:
    tree(tmp_path, "authentic: a.jpg\ntampered: x/1.jpg y/1.jpg\nmasks: x/1.png y/1.png")
    found = table(tmp_path)
    assert (found["tampered/x/1.jpg"][1], found["tampered/y/1.jpg"][1]) == ("masks/x/1.png", "masks/y/1.png")
    (tmp_path / "masks/x/1.png").unlink()
    assert "tampered image without a mask" in errors_of(tmp_path)[0]  # y's mask is not lent to x


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ("some: a.jpg", {}, "fits no known layout"),
        ("authentic: a.jpg\ntampered: b.jpg\nmasks: b.png\nAu: a.jpg\nTp: b.jpg\nGt: b.png", {}, "several known"),
        ("Au: a.jpg", {"preset": "casia2"}, "0 of the folders 'Tp' exist"),
        ("Au: a\nTp: a\nGt: a\nCASIA 2 Groundtruth: a", {"preset": "casia2"}, "2 of the folders"),
        ("a: a.jpg", {"preset": "casia3"}, "options.preset"),
        ("a: a.jpg", {"authentic": "a", "group": "{nope}"}, "unknown field 'nope'"),
        ("a: a.jpg", {"authentic": "a", "authentic_name": "("}, "a regular expression"),
        ("a: a.jpg", {"authentic": ".."}, "outside"),
        ("a: a.jpg", {"authentic": "a", "mask_pixels": "pink"}, "options.mask_pixels"),
        ("a: a.jpg", {"authentic": "a", "mask_convention": "both"}, "options.mask_convention"),
        ("a: a.txt", {"authentic": "a"}, "empty data set"),
    ],
)
def test_unusable_folders(tmp_path: Path, names: str, options: dict[str, Any], expected: str) -> None:
    assert expected in errors_of(tree(tmp_path, names), **options)[0]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", ".: a.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/authentic").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    assert set(table(tmp_path / "set", authentic="authentic")) == {"authentic/a.jpg"}


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([["a.jpg", "m/a.png"], ["b.jpg", "Negative"], ["c.jpg", "4x6"], ["d.jpg"], ["e", 1]]))
    records, errors = scan_records(path)
    assert [(r.label, r.targets[0].mask_path, r.targets[0].mask_size_hw) for r in records] == [
        (1, str(tmp_path / "m/a.png"), None),
        (0, None, None),
        (0, None, (4, 6)),
    ]
    assert ["p.json[3]" in str(errors[0]), "p.json[4]" in str(errors[1])] == [True, True]
    path.write_text(json.dumps([["a.jpg", "../m.png"]]))
    with pytest.raises(DataFormatError, match="leaves the data folder"):
        read_records(path, "pairs")


def test_every_preset_is_documented() -> None:
    readme = (Path(__file__).parents[3] / "data" / "README.md").read_text(encoding="utf-8")
    for name in LAYOUTS:
        assert readme.count(f"`{name}`") >= 2, f"{name}: in English and in Chinese"
    for name in READERS:
        assert f"`{name}`" in readme
