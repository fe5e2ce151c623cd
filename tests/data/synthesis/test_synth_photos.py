"""Photographs: what is found, how it is split, what a bad folder says, and that the virtual camera keeps its word."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.synthesis.camera import develop
from finetune.data.synthesis.photos import find_photos, load_rgb, open_photo
from finetune.data.synthesis.scenes import vary_scene
from finetune.errors import ForensicsError


def save_texture(path: Path, seed: int, size_hw: tuple[int, int] = (160, 200)) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (size_hw[0] // 8, size_hw[1] // 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size_hw[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def test_default_photos_are_all_found_and_disjoint_by_scene() -> None:
    photos = find_photos()
    assert not photos.rejected
    groups = {split: {photo.group for photo in photos.of(split)} for split in ("train", "eval")}
    assert not groups["train"] & groups["eval"]
    assert not {p.sha256 for p in photos.of("train")} & {p.sha256 for p in photos.of("eval")}
    for split in ("train", "eval"):
        assert sum(not photo.is_grey for photo in photos.of(split)) >= 3
        assert any(photo.is_grey for photo in photos.of(split))


def test_user_photos_split_by_content_not_by_name_or_order(tmp_path: Path) -> None:
    for folder, names in (("one", "abcdefgh"), ("two", "hgfedcba")):
        for seed, name in enumerate(names):
            save_texture(tmp_path / folder / "sub" / f"{name}.png", seed)
    held_out = [{p.sha256 for p in find_photos(tmp_path / folder).of("eval")} for folder in ("one", "two")]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 2


def test_the_same_picture_saved_again_stays_on_one_side(tmp_path: Path) -> None:
    """Each is there as a PNG and, smaller, as a JPEG: no held-out one is trained on in its other form."""
    for seed in range(6):
        photo = Image.open(save_texture(tmp_path / f"{seed}.png", seed, (240, 320)))
        photo.resize((photo.width * 9 // 10, photo.height * 9 // 10)).save(tmp_path / f"{seed}_small.jpg", quality=85)
    photos = find_photos(tmp_path, held_out_fraction=0.5)
    assert len(photos.photos) == 12
    assert {photo.group for photo in photos.photos} == {f"{seed}.png" for seed in range(6)}
    sides = {split: {photo.group for photo in photos.of(split)} for split in ("train", "eval")}
    assert not sides["train"] & sides["eval"]
    assert len(photos.of("eval")) == 6
    assert len(find_photos(tmp_path, held_out_fraction=0.01).of("eval")) == 2
    assert len(find_photos(tmp_path, held_out_fraction=0.99).of("eval")) == 10


def test_many_files_of_one_picture_are_one_ticket(tmp_path: Path) -> None:
    """Twenty scenes and twenty copies of one: a tenth of the scenes is held out, not whichever has most files."""
    for seed in range(20):
        save_texture(tmp_path / f"{seed}.png", seed)
    for quality in range(60, 80):
        Image.open(tmp_path / "0.png").save(tmp_path / f"copy{quality}.jpg", quality=quality)
    photos = find_photos(tmp_path, held_out_fraction=0.1)
    assert len(photos.photos) == 40
    assert len({photo.group for photo in photos.of("eval")}) == 2
    assert len({photo.group for photo in photos.of("train")}) == 18


def test_one_picture_saved_twice_is_not_enough(tmp_path: Path) -> None:
    Image.open(save_texture(tmp_path / "a.png", 0)).save(tmp_path / "b.jpg", quality=90)
    with pytest.raises(ForensicsError, match="holds one picture 2 times, need at least 2 that differ"):
        find_photos(tmp_path)


def test_bad_files_are_reported_by_name_and_duplicates_dropped(tmp_path: Path) -> None:
    good = save_texture(tmp_path / "a.png", 0)
    save_texture(tmp_path / "b.jpg", 1)
    (tmp_path / "copy.png").write_bytes(good.read_bytes())
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:400])
    (tmp_path / "empty.png").write_bytes(b"")
    save_texture(tmp_path / "tiny.png", 2, (64, 64))
    Image.new("RGB", (200, 200), (9, 9, 9)).save(tmp_path / "flat.png")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "._a.png").write_bytes(b"what macOS lays beside a.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")  # opened, it would wait for a writer
    photos = find_photos(tmp_path)
    assert {photo.name for photo in photos.photos} == {"a.png", "b.jpg"}
    refused = {"copy.png", "broken.jpg", "empty.png", "tiny.png", "flat.png", "phone.HEIC", "lost.png", "pipe.png"}
    assert {item["name"] for item in photos.rejected} == refused
    assert not any(str(tmp_path) in item["reason"] for item in photos.rejected)


def test_photographs_to_train_on_leave_what_is_held_out_as_it_is(tmp_path: Path) -> None:
    for seed in range(4):
        save_texture(tmp_path / "more" / f"{seed}.png", seed)
    mine = find_photos(train_photos_dir=tmp_path / "more")
    assert mine.of("eval") == find_photos().of("eval")
    assert mine.of("train")[: len(find_photos().of("train"))] == find_photos().of("train")
    added = mine.of("train")[len(find_photos().of("train")) :]
    assert [photo.name for photo in added] == [photo.group for photo in added]
    assert [photo.name for photo in added] == [f"train_photos/{seed}.png" for seed in range(4)]


def test_a_held_out_photograph_is_not_trained_on_whatever_its_file_looks_like(tmp_path: Path) -> None:
    """Sides of two users' folders that share pictures: as they are, recompressed and resized."""
    for seed in range(6):
        save_texture(tmp_path / "mine" / f"{seed}.png", seed)
        same = Image.open(tmp_path / "mine" / f"{seed}.png")
        (tmp_path / "more").mkdir(exist_ok=True)
        same.resize((same.width * 3 // 2, same.height * 3 // 2)).save(
            tmp_path / "more" / f"again{seed}.jpg", quality=80
        )
    save_texture(tmp_path / "more" / "new.png", 99)
    alone = find_photos(tmp_path / "mine")
    both = find_photos(tmp_path / "mine", train_photos_dir=tmp_path / "more")
    assert both.of("eval") == alone.of("eval")
    assert [photo.name for photo in both.photos if photo not in alone.photos] == ["train_photos/new.png"]
    assert {item["name"]: item["reason"] for item in both.rejected} == {
        f"again{seed}.jpg": f"the same picture as {seed}.png" for seed in range(6)
    }
    held_out = alone.of("eval")[0]
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "copy.png").write_bytes(Path(held_out.path).read_bytes())
    with pytest.raises(ForensicsError, match=rf"no photograph to add; refused: copy.png: .*{held_out.name}"):
        find_photos(tmp_path / "mine", train_photos_dir=tmp_path / "copies")
    with pytest.raises(ForensicsError, match=r"does not exist.*--train-photos"):
        find_photos(train_photos_dir=tmp_path / "nowhere")


def test_many_photos_are_checked_by_several_processes_with_the_same_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.data.synthesis.photos.MANY_PHOTOS", 3)
    monkeypatch.setattr("finetune.progress.LINE_SECONDS", 0.0)
    for seed in range(6):
        save_texture(tmp_path / f"{seed}.png", seed)
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    alone, together = (find_photos(tmp_path, workers=workers, progress=True) for workers in (1, 2))
    assert alone == together
    assert [item["name"] for item in together.rejected] == ["broken.jpg"]
    assert "photos: 100%" in capsys.readouterr().err


def test_too_few_photos_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ForensicsError, match="does not exist"):
        find_photos(tmp_path / "nowhere")
    save_texture(tmp_path / "only.png", 0)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ForensicsError, match=r"1 usable photographs, need at least 2 .*broken\.png") as caught:
        find_photos(tmp_path)
    assert "\n" not in str(caught.value)


def test_odd_modes_are_read_as_rgb(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 200 * 160).reshape(160, 200).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    deep = load_rgb(tmp_path / "deep.png")
    assert deep.shape == (160, 200, 3)
    assert 100 < deep.mean() < 155  # not clipped to white
    Image.new("CMYK", (200, 160), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    red = load_rgb(tmp_path / "ink.jpg")[0, 0]
    assert red[0] > 200 > red[1]
    rotated = Image.new("RGB", (200, 160))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "turned.jpg", exif=exif)
    assert load_rgb(tmp_path / "turned.jpg").shape == (200, 160, 3)


def test_develop_is_deterministic_of_the_asked_size_and_leaves_the_photo_alone() -> None:
    for photo in find_photos().photos:
        before = open_photo(photo.path).copy()
        first, camera = develop(photo, (196, 252), np.random.default_rng(5))
        again, _ = develop(photo, (196, 252), np.random.default_rng(5))
        assert first.shape == (196, 252, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, again)
        assert np.array_equal(before, open_photo(photo.path))
        assert camera["photo"] == photo.name


def test_monochrome_pictures_have_equal_channels_like_grey_photos() -> None:
    for photo in find_photos().photos[:3]:
        picture, camera = develop(photo, (224, 224), np.random.default_rng(1), monochrome=True)
        spread = picture.max(axis=2).astype(int) - picture.min(axis=2)
        assert spread.max() <= 2
        assert camera["monochrome"]


def test_the_held_out_packaged_photographs_never_change() -> None:
    """Published figures were measured on pictures of these four; documents help training alone."""
    photos = find_photos()
    assert {photo.group for photo in photos.of("eval")} == {"coffee", "china", "grace_hopper", "gravel"}
    assert {"page", "text", "retina", "moon"} <= {photo.group for photo in photos.of("train")}


def test_a_varied_scene_is_deterministic_and_leaves_the_camera_as_it_was() -> None:
    train = find_photos().of("train")
    plain, camera = develop(train[0], (196, 252), np.random.default_rng(3))
    names: set[str] = set()
    for variation in (0.0, 1.0):
        for seed in range(12):
            pictures = [
                develop(train[0], (84, 112), np.random.default_rng(seed), False, train, variation) for _ in "ab"
            ]
            assert np.array_equal(pictures[0][0], pictures[1][0])
            assert pictures[0][1] == pictures[1][1]
            assert ("scene" in pictures[0][1]) == (variation == 1.0)
            names |= set(pictures[0][1].get("scene", ()))
    assert names == {"mix", "leaves", "cloud", "blur", "light", "colour"}
    varied, same_camera = develop(train[0], (196, 252), np.random.default_rng(3), False, train, 1.0)
    assert {key: value for key, value in same_camera.items() if key != "scene"} == camera
    assert varied.shape == plain.shape
    assert same_camera["scene"]
    assert not np.array_equal(varied, plain)


@pytest.mark.parametrize("size_hw", [(32, 96), (224, 224)])
def test_varied_scenes_stay_finite_and_in_range(size_hw: tuple[int, int]) -> None:
    scene = np.random.default_rng(0).uniform(0, 255, (*size_hw, 3)).astype(np.float32)
    before = scene.copy()
    for seed in range(40):
        varied, _ = vary_scene(scene, np.random.default_rng(seed), lambda rng: np.full_like(scene, rng.uniform(0, 255)))
        assert varied.shape == scene.shape
        assert varied.dtype == np.float32
        assert np.isfinite(varied).all()
        assert varied.min() >= 0
        assert varied.max() <= 255
    assert np.array_equal(scene, before)
