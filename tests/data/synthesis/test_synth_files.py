"""Files of generated images: container and metadata are the same for both classes, and nothing private is carried."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational
from sklearn.metrics import roc_auc_score

from finetune.data.synthesis import SynthConfig, synthesize
from finetune.data.synthesis.image_files import IMAGE_FORMATS, encode_image, photo_exif, write_whole

CONFIG = SynthConfig(num_train=40, num_eval=6, num_val=0, seed=5, sizes_hw=((84, 112), (112, 84)), workers=1)
PRIVATE = ("Ada Lovelace", "Photoshop", "secret note")
GPS, THUMBNAIL_TAG, SOFTWARE, ORIENTATION, EXIF = 0x8825, 0x0201, 0x0131, 0x0112, 0x8769


def save_photo(path: Path, seed: int, camera: str | None) -> None:
    """A textured photograph, turned by its EXIF and with everything that must not be carried."""
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    if camera is not None:
        exif[0x010F], exif[0x0110], exif[ORIENTATION], exif[SOFTWARE] = "Maker", camera, 6, PRIVATE[1]
        exif[0x013B] = PRIVATE[0]
        exif[EXIF] = {
            0x829A: IFDRational(1, 200), 0x829D: IFDRational(28, 10), 0x8827: 400, 0x9003: "2020:02:03 04:05:06",
            0x9286: PRIVATE[2].encode(), 0xA002: 4000,
        }  # fmt: skip
        exif[GPS] = {1: "N", 2: (IFDRational(31), IFDRational(13), IFDRational(0))}
    Image.fromarray(coarse).resize((240, 192), Image.Resampling.BICUBIC).save(path, exif=exif, quality=95)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(6):
        save_photo(folder / f"{index}.jpg", index, f"Model {index}" if index < 4 else None)
    return folder


def read(root: Path, name: str = "train.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name).read_text(encoding="utf-8").splitlines()]


def test_summary_and_block_of_a_photograph(photos: Path) -> None:
    block, summary = photo_exif(str(photos / "0.jpg"))
    assert summary == {
        "make": "Maker", "model": "Model 0", "exposure_time": 0.005, "f_number": 2.8, "iso": 400,
        "date_time_original": "2020:02:03 04:05:06",
    }  # fmt: skip
    assert not any(text.encode() in block for text in PRIVATE)
    assert photo_exif(str(photos / "5.jpg")) == (b"", {})


def test_damaged_exif_is_no_reason_to_stop(tmp_path: Path) -> None:
    Image.new("RGB", (200, 200)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert photo_exif(str(tmp_path / "a.jpg")) == (b"", {"damaged": True})


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_carried_exif_is_the_hosts_in_both_classes(image_format: str, photos: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, photos_dir=str(photos), image_format=image_format, metadata="carry")
    synthesize(config, tmp_path / "set", progress=False)
    models: dict[int, set[str | None]] = {0: set(), 1: set()}
    for record in read(tmp_path / "set"):
        path = tmp_path / "set" / record["images"][0]
        with Image.open(path) as image:
            exif = image.getexif()
        camera = record["provenance"].get("exif", {})
        assert exif.get(0x0110) == camera.get("model")
        assert exif.get_ifd(EXIF).get(0x8827) == camera.get("iso")
        assert not exif.get_ifd(GPS)
        assert not {ORIENTATION, SOFTWARE, THUMBNAIL_TAG, 0x013B} & set(exif)
        assert not any(text.encode() in path.read_bytes() for text in PRIVATE)
        models[record["labels"][0]].add(camera.get("model"))
    assert models[0] == models[1]  # pairs share their host


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_stripped_files_hold_no_metadata_but_the_provenance_keeps_the_camera(
    image_format: str, photos: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, photos_dir=str(photos), image_format=image_format)
    synthesize(config, tmp_path / "set", progress=False)
    records = read(tmp_path / "set")
    assert {record["provenance"].get("exif", {}).get("model") for record in records} >= {"Model 0", "Model 1"}
    for record in records:
        with Image.open(tmp_path / "set" / record["images"][0]) as image:
            assert image.format == image_format.upper()
            assert not dict(image.getexif())
            assert not {"exif", "xmp", "icc_profile", "comment"} & set(image.info)


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_parameters_of_the_container_tell_no_label(image_format: str, tmp_path: Path) -> None:
    config = replace(CONFIG, num_train=120, image_format=image_format, image_quality=(85, 95))
    synthesize(config, tmp_path / "set", progress=False)
    records = read(tmp_path / "set")
    labels = [record["labels"][0] for record in records]
    containers = [record["provenance"]["container"] for record in records]
    assert {box["quality"] for box in containers} <= set(range(85, 96))
    sizes = [(tmp_path / "set" / record["images"][0]).stat().st_size for record in records]
    tables = []
    for record in records:
        assert record["images"][0].endswith(IMAGE_FORMATS[image_format])
        with Image.open(tmp_path / "set" / record["images"][0]) as image:
            tables.append(sum(map(sum, getattr(image, "quantization", {0: [0]}).values())))
    features = {
        "quality": [box["quality"] for box in containers],
        "subsampling": [len(box["subsampling"]) + (box["subsampling"] == "4:4:4") for box in containers],
        "bytes": sizes,
        "tables": tables,
    }
    for name, values in features.items():
        assert abs(roc_auc_score(labels, values) - 0.5) < 0.12, name
    by_pair: dict[str, list[Any]] = {}
    for record in records:
        by_pair.setdefault(record["provenance"]["pair"], []).append(record["provenance"]["container"])
    assert all(pair[0] == pair[1] for pair in by_pair.values())


def test_pixels_of_a_png_are_exact_with_and_without_metadata(photos: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for exif in (b"", photo_exif(str(photos / "0.jpg"))[0]):
        write_whole(tmp_path / "a.png", encode_image(image, {"format": "png"}, exif))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
