"""Images copied or encoded anew: what is in them, and masks and polygons that stay in their frame."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.images import load_image
from finetune.data.masks import load_mask, rasterize_polygons
from finetune.data.storage import EncodedRecord, ImageOptions, iter_stored, open_writer, prepare_payload
from finetune.data.storage.encoding import Blob, fitted_size, shrink_mask
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record


def picture(folder: Path, size_hw: tuple[int, int], orientation: int = 1, name: str = "a.jpg") -> Path:
    """A gradient with EXIF orientation; `size_hw` as stored."""
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    pixels = np.stack([rows * 255 // size_hw[0], columns * 255 // size_hw[1], rows * 0 + 90], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Camera"
    Image.fromarray(pixels).save(folder / name, exif=exif, quality=95)
    return folder / name


def tampered(folder: Path, size_hw: tuple[int, int], orientation: int = 1) -> Record:
    """A tampered image with mask file and polygon of the same rectangle, in the upright frame."""
    image_path = picture(folder, size_hw, orientation)
    height, width = size_hw if orientation < 5 else size_hw[::-1]
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 8 : width // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    left, right, top, bottom = width // 8, width // 2, height // 4, height // 2
    polygon = ((left, top), (right, top), (right, bottom), (left, bottom))
    target = ImageTarget(label=1, mask_path=str(folder / "mask.png"), polygons=(polygon,))
    return Record("r", (ImageInput(path=str(image_path)),), (target,), source="train.jsonl:3")


def opened(blob: Blob | None) -> Image.Image:
    assert blob is not None
    return Image.open(io.BytesIO(blob.data))


def test_files_are_copied_byte_for_byte_with_their_metadata(tmp_path: Path) -> None:
    record = tampered(tmp_path, (64, 96), orientation=6)
    payload = prepare_payload(record, ImageOptions())
    assert payload.images == (Blob((tmp_path / "a.jpg").read_bytes(), ".jpg"),)
    assert payload.masks == (Blob((tmp_path / "mask.png").read_bytes(), ".png"),)
    assert payload.targets == record.targets


def test_a_wrong_suffix_is_put_right(tmp_path: Path) -> None:
    path = picture(tmp_path, (32, 32)).rename(tmp_path / "a.png")
    record = Record("r", (ImageInput(path=str(path)),), (ImageTarget(),))
    assert prepare_payload(record, ImageOptions()).images[0].suffix == ".jpg"  # type: ignore[union-attr]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_reencoding_turns_upright_once_and_drops_metadata(tmp_path: Path, orientation: int, format: Any) -> None:
    record = tampered(tmp_path, (64, 96), orientation)
    payload = prepare_payload(record, ImageOptions("reencode", format, quality=95))
    image = opened(payload.images[0])
    assert (image.format, image.mode) == (format.upper(), "RGB")
    assert not image.getexif()
    upright = np.asarray(load_image(record.images[0]), int)
    assert np.abs(np.asarray(image, int) - upright).mean() < (0.01 if format == "png" else 4)
    assert payload.targets == record.targets


@pytest.mark.parametrize("orientation", [1, 6])
def test_mask_and_polygons_are_resized_with_their_image(tmp_path: Path, orientation: int) -> None:
    record = tampered(tmp_path, (256, 128), orientation)
    payload = prepare_payload(record, ImageOptions("reencode", max_size_hw=(64, 96)))
    height, width = (64, 32) if orientation == 1 else (48, 96)
    assert opened(payload.images[0]).size == (width, height)
    mask = np.asarray(opened(payload.masks[0])) // 255
    assert mask.shape == (height, width)
    (target,) = payload.targets
    assert target.polygons is not None
    assert np.array_equal(rasterize_polygons(target.polygons, (height, width)), mask)
    assert abs(mask.mean() - load_mask(record.targets[0], (256, 128)[:: 1 if orientation == 1 else -1]).mean()) < 0.01  # type: ignore[union-attr]


def test_a_resized_size_follows_its_image(tmp_path: Path) -> None:
    record = Record(
        "r", (ImageInput(path=str(picture(tmp_path, (100, 50)))),), (ImageTarget(0, mask_size_hw=(100, 50)),)
    )
    (target,) = prepare_payload(record, ImageOptions("reencode", max_size_hw=(50, 50))).targets
    assert target.mask_size_hw == (50, 25)


def test_a_stored_resized_set_trains_as_it_stands(tmp_path: Path) -> None:
    """Every image, mask and polygon of it fits, by the rules that training holds them to."""
    record = tampered(tmp_path, (256, 130))
    only_polygons = replace(record, id="p", targets=(replace(record.targets[0], mask_path=None),))
    for storage in ("jsonl", "parquet"):
        out = tmp_path / storage
        with open_writer(out, "train", storage, ImageOptions("reencode", max_size_hw=(60, 60))) as writer:  # type: ignore[arg-type]
            for one in (record, only_polygons):
                writer.write(one)
        for _, _, stored in iter_stored(out):
            assert isinstance(stored, Record)
            image = load_image(stored.images[0])
            assert (image.height, image.width) == (60, 30)
            mask = load_mask(stored.targets[0], (60, 30), stored.id)
            assert mask is not None
            assert mask.any()


@pytest.mark.parametrize(
    ("size_hw", "max_hw", "expected"),
    [((100, 50), (200, 200), (100, 50)), ((100, 50), (50, 50), (50, 25)), ((30, 3000), (64, 300), (3, 300)),
     ((40, 8000), (28, 28), (1, 28)), ((100, 50), None, (100, 50))],
)  # fmt: skip
def test_images_are_made_to_fit_and_never_grow(size_hw: Any, max_hw: Any, expected: Any) -> None:
    assert fitted_size(size_hw, max_hw) == expected


def test_a_small_mark_survives_shrinking() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[70, 31] = 1
    small = shrink_mask(mask, (10, 10))
    assert small.sum() == 1
    assert small[7, 3] == 1


def test_payloads_are_picklable_and_functions_of_their_record_alone(tmp_path: Path) -> None:
    record, options = tampered(tmp_path, (64, 96)), ImageOptions("reencode", max_size_hw=(40, 40))
    payload = prepare_payload(*pickle.loads(pickle.dumps((record, options))))
    assert isinstance(payload, EncodedRecord)
    assert pickle.loads(pickle.dumps(payload)) == prepare_payload(record, options)


@pytest.mark.parametrize("mode", ["keep", "reencode", "reference"])
def test_what_training_would_refuse_is_refused_now(tmp_path: Path, mode: Any) -> None:
    record = tampered(tmp_path, (64, 96))
    image_path, mask_path = tmp_path / "a.jpg", tmp_path / "mask.png"
    data, mask = image_path.read_bytes(), mask_path.read_bytes()
    options, other = ImageOptions(mode), io.BytesIO()
    Image.new("L", (20, 10), 255).save(other, "PNG")
    cases = [
        (image_path, data[: len(data) // 2], "truncated or damaged"),
        (image_path, b"", r"empty \(0 bytes\)"),
        (image_path, b"text", "not an image"),
        (mask_path, b"", r"mask file is empty"),
        (mask_path, other.getvalue(), "mask is 10x20 but the image is 64x96"),
    ]
    for path, content, message in cases:
        image_path.write_bytes(data)
        mask_path.write_bytes(mask)
        path.write_bytes(content)
        with pytest.raises(DataFormatError, match=rf"record 'r' \(train\.jsonl:3\): .*{message}"):
            prepare_payload(record, options)
    image_path.write_bytes(data)
    mask_path.unlink()
    with pytest.raises(DataFormatError, match=r"record 'r' \(train\.jsonl:3\): mask file not found"):
        prepare_payload(record, options)


def test_unchecked_copies_still_need_their_files(tmp_path: Path) -> None:
    record = tampered(tmp_path, (64, 96))
    (tmp_path / "mask.png").unlink()
    with pytest.raises(DataFormatError, match=r"record 'r' \(train\.jsonl:3\): file cannot be read .*field 'masks'"):
        prepare_payload(record, ImageOptions(is_checked=False))
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataFormatError, match="not an image"):
        prepare_payload(record, ImageOptions(is_checked=False))


def test_an_image_too_long_for_its_format_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (17000, 4)).save(tmp_path / "long.png")
    record = Record("r", (ImageInput(path=str(tmp_path / "long.png")),), (ImageTarget(),))
    with pytest.raises(DataFormatError, match=r"cannot be written as webp.*17000x4.*images.format: png"):
        prepare_payload(record, ImageOptions("reencode", "webp"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "copy"}, "images.mode is 'copy'"),
        ({"format": "gif"}, "images.format is 'gif'"),
        ({"quality": 0}, "images.quality is 0"),
        ({"max_size_hw": (64, 64)}, "mode 'reencode'"),
        ({"mode": "reencode", "max_size_hw": (64, 2)}, "at least 28 px"),
    ],
)
def test_unusable_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageOptions(**options)


@pytest.mark.real_data
@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
@pytest.mark.parametrize("max_hw", [None, (200, 200)])
def test_photographs_of_cracks_and_their_masks_come_back(
    tmp_path: Path, shared_data: Path, storage: Any, max_hw: Any
) -> None:
    """The same bytes when kept; resized, the mask covers the share of the image it covered before."""
    images = sorted((shared_data / "deepcrack" / "images").iterdir())[:6]
    records = [
        Record(
            path.stem,
            (ImageInput(path=str(path)),),
            (ImageTarget(label=1, mask_path=str(path.parents[1] / "masks" / path.name)),),
        )
        for path in images
    ]
    options = ImageOptions("keep" if max_hw is None else "reencode", "png", max_size_hw=max_hw)
    with open_writer(tmp_path / "set", "train", storage, options) as writer:
        for record in records:
            writer.write(record)
    stored = [value for _, _, value in iter_stored(tmp_path / "set")]
    assert len(stored) == 6
    for record, again in zip(records, stored, strict=True):
        assert isinstance(again, Record)
        before, after = load_image(record.images[0]), load_image(again.images[0])
        masks = [load_mask(r.targets[0], p.size[::-1]) for r, p in ((record, before), (again, after))]
        assert masks[0] is not None
        assert masks[1] is not None
        if max_hw is None:
            assert np.array_equal(before, after)
            assert np.array_equal(*masks)
        else:
            assert max(after.size) == 200
            assert masks[1].mean() == pytest.approx(masks[0].mean(), rel=0.25)
