"""COCO and LabelMe: every kind of region becomes exactly its pixels; EXIF orientation is applied once for all."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask

from finetune.data.exact_polygons import exact_polygons
from finetune.data.images import load_image
from finetune.data.masks import load_mask, rasterize_polygons
from finetune.data.readers import read_records, scan_records
from finetune.data.readers.coco import decode_rle
from finetune.data.readers.common import Item
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, Record

ITEM = Item({}, "r", "f.json", "/")
MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 1))
)


def coco(*annotations: dict[str, Any], height: int = 6, width: int = 8) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [{"image_id": 1, "category_id": 3, "id": k, **entry} for k, entry in enumerate(annotations)],
        "categories": [{"id": 3, "name": "crack"}, {"id": 4, "name": "stain"}],
    }


def read(folder: Path, value: Any, name: str = "c.json", **options: Any) -> list[Record]:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return read_records(folder / name, options=options)


def error_of(folder: Path, value: Any, **options: Any) -> str:
    with pytest.raises(DataFormatError) as caught:
        read(folder, value, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mask_of(record: Record, height: int = 6, width: int = 8) -> np.ndarray:
    mask = load_mask(record.targets[0], (height, width))
    assert mask is not None
    return mask


def box(top: int, bottom: int, left: int, right: int, height: int = 6, width: int = 8) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


@settings(max_examples=150, deadline=None)
@given(MASKS)
def test_any_mask_becomes_polygons_with_exactly_its_pixels(mask: np.ndarray) -> None:
    assert np.array_equal(rasterize_polygons(exact_polygons(mask), mask.shape), mask)


def test_a_region_with_thousands_of_holes_is_exact_too() -> None:
    mask = (np.random.default_rng(0).random((120, 160)) < 0.7).astype(np.uint8)
    assert np.array_equal(rasterize_polygons(exact_polygons(mask), mask.shape), mask)


@settings(max_examples=150, deadline=None)
@given(MASKS)
def test_rle_is_decoded_as_pycocotools_does(mask: np.ndarray) -> None:
    rle = coco_mask.encode(np.asfortranarray(mask))
    text = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    assert np.array_equal(decode_rle(ITEM, text, "segmentation", mask.shape), mask)
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    runs = [0, *runs] if flat[0] else runs
    assert np.array_equal(decode_rle(ITEM, {"size": list(mask.shape), "counts": runs}, "s", None), mask)


def test_long_runs_of_compressed_rle() -> None:
    mask = np.zeros((900, 1100), np.uint8)
    cv2.circle(mask, (500, 400), 300, 1, -1)
    mask[:, 1000] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    assert np.array_equal(decode_rle(ITEM, {"size": [900, 1100], "counts": rle["counts"].decode()}, "s", None), mask)


def test_coco_unites_parts_and_crops_to_the_image(tmp_path: Path) -> None:
    value = coco(
        {"segmentation": [[1, 1, 3, 1, 3, 3, 1, 3], [2, 2, 5, 2, 5, 4, 2, 4]], "iscrowd": 0},
        {"segmentation": [[6, -2, 12, -2, 12, 2, 6, 2]], "category_id": 4},
        {"segmentation": {"size": [6, 8], "counts": [5, 1, 42]}, "iscrowd": 1},
    )
    (record,) = read(tmp_path, value)
    expected = box(1, 3, 1, 3) | box(2, 4, 2, 5) | box(0, 2, 6, 8) | box(5, 6, 0, 1)
    assert np.array_equal(mask_of(record), expected)
    assert (record.id, record.label, record.source) == ("c:1", 1, "c.json:images[0]")
    assert record.provenance == {"categories": ["crack", "stain"]}
    (record,) = read(tmp_path, value, categories=["stain"], mask_convention="target")
    assert np.array_equal(mask_of(record), box(0, 2, 6, 8))
    assert record.provenance == {"categories": ["stain"], "mask_convention": "target"}
    (record,) = read(tmp_path, value, categories=3, crowd=False)
    assert np.array_equal(mask_of(record), box(1, 3, 1, 3) | box(2, 4, 2, 5))
    assert "options.categories" in error_of(tmp_path, value, categories=["rust"])


def test_coco_images_without_annotations_and_boxes(tmp_path: Path) -> None:
    assert read(tmp_path, coco())[0].label == 0
    assert read(tmp_path, coco(), unannotated="unknown")[0].label is None
    value = coco({"bbox": [2, 1, 3, 2], "segmentation": []})
    assert "options.boxes: true" in error_of(tmp_path, value)
    assert np.array_equal(mask_of(read(tmp_path, value, boxes=True)[0]), box(1, 3, 2, 5))


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ({"segmentation": [[1, 1, 2, 2]]}, "annotations[0].segmentation[0]"),
        ({"segmentation": [[1, 1, 2, 2, 3]]}, "polygon cannot be read"),
        ({"segmentation": [[20, 20, 30, 20, 30, 30]]}, "polygon lies outside the image"),
        ({"segmentation": [[1, 1, 2, "2", 3, 3]]}, "not a pixel position"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, "RLE of another size"),
        ({"segmentation": {"size": [6, 8], "counts": [40, 5]}}, "do not add up"),
        ({"segmentation": {"size": [6, 8], "counts": [50, -2]}}, "do not add up"),
        ({"segmentation": {"size": [6, 8], "counts": "not!"}}, "damaged RLE text"),
        ({"segmentation": {"size": [6, 8], "counts": "oooooooooooo"}}, "damaged RLE text"),
        ({"segmentation": {"counts": [48]}}, "RLE without a size"),
        ({"segmentation": None}, "without a segmentation"),
        ({"segmentation": [[1, 1, 2, 1, 2, 2]], "category_id": 9}, "unknown category"),
        ({"segmentation": [[1, 1, 2, 1, 2, 2]], "image_id": 7}, "unknown image"),
    ],
)
def test_damaged_coco_annotations_are_named(tmp_path: Path, annotation: dict[str, Any], expected: str) -> None:
    assert expected in error_of(tmp_path, coco(annotation))


def labelme(*shapes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "version": "5.4.1",
        "imagePath": "a.png",
        "imageHeight": 6,
        "imageWidth": 8,
        "shapes": list(shapes),
        **fields,
    }


def png(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_labelme_shapes(tmp_path: Path) -> None:
    crop = base64.b64encode(png(np.array([[255, 0], [255, 255]], np.uint8))).decode()
    for shape, expected in (
        ({"points": [[1, 1], [4, 1], [4, 3], [1, 3]], "shape_type": "polygon"}, box(1, 3, 1, 4)),
        ({"points": [[4, 3], [1, 1]], "shape_type": "rectangle"}, box(1, 3, 1, 4)),
        ({"points": [[1, 1], [4, 1], [4, 3], [1, 3]], "shape_type": "rectangle"}, box(1, 3, 1, 4)),
        ({"points": [[3, 1], [4, 2]], "shape_type": "mask", "mask": crop}, box(1, 3, 3, 4) | box(2, 3, 3, 5)),
    ):
        (record,) = read(tmp_path, labelme({"label": "ps", **shape}))
        assert np.array_equal(mask_of(record), expected)
    (record,) = read(
        tmp_path,
        labelme({"label": "o", "points": [[20, 20], [20, 30]], "shape_type": "circle"}, imageHeight=40, imageWidth=40),
    )
    assert abs(int(mask_of(record, 40, 40).sum()) - np.pi * 100) < 4
    assert record.provenance == {"categories": ["o"]}
    (record,) = read(tmp_path, labelme({"label": "o", "points": [[0, 0], [1, 1]], "shape_type": "line"}), labels=["ps"])
    assert record.label == 0
    for shape, message in (
        ({"points": [[0, 0], [1, 1]], "shape_type": "line"}, "without an area"),
        ({"points": 3}, "fewer than 3"),
    ):
        assert message in error_of(tmp_path, labelme(shape))


def test_labelme_images_are_found_or_embedded(tmp_path: Path) -> None:
    data = base64.b64encode(png(np.zeros((6, 8), np.uint8))).decode()
    (record,) = read(tmp_path, labelme(imageData=data))
    assert record.images[0].data is not None
    (tmp_path / "json").mkdir()
    (tmp_path / "img").mkdir()
    Image.new("L", (8, 6)).save(tmp_path / "img/a.png")
    path = tmp_path / "json/a.json"
    path.write_text(json.dumps(labelme(imagePath="..\\img\\a.png")))
    assert "leaves the data folder" in str(scan_records(path)[1][0])
    (record,) = read_records(path, root=tmp_path)
    assert record.images[0].path == str(tmp_path / "img/a.png")


def test_a_folder_of_labelme_files(tmp_path: Path) -> None:
    shape = {"label": "ps", "points": [[1, 1], [4, 1], [4, 3]]}
    for name, shapes in (("a", [shape]), ("b", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(labelme(*shapes, imagePath=f"{name}.png")))
        Image.new("L", (8, 6)).save(tmp_path / f"{name}.png")
    Image.new("L", (8, 6)).save(tmp_path / "c.png")
    records, errors = scan_records(tmp_path)
    assert [(record.id, record.label) for record in records] == [("a", 1), ("b", 0)]
    assert "image without a LabelMe file" in str(errors[0])
    records = read_records(tmp_path, options={"unlabelled_images": "authentic"})
    assert [(record.id, record.label) for record in records] == [("a", 1), ("b", 0), ("c.png", 0)]
    (tmp_path / "d.json").write_text("{}")
    assert "not a LabelMe file" in str(scan_records(tmp_path)[1][0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_one_target_from_mask_files_and_polygons_of_a_turned_photo(
    tmp_path: Path, orientation: int, format: str
) -> None:
    """Stored 16x24; an upright mask, an equally tagged mask and polygons of either frame are one and the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((16, 24), np.uint8)
    stored[2:7, 3:15] = 255
    stored[5:12, 3:6] = 255
    name = f"a.{format.lower()}"
    Image.fromarray(stored).convert("RGB").save(tmp_path / name, format, exif=exif)
    Image.fromarray(stored).save(tmp_path / "tagged.tif", exif=exif)
    upright = np.asarray(load_image(ImageInput(path=str(tmp_path / "tagged.tif"))))[..., 0]
    Image.fromarray(upright).save(tmp_path / "upright.png")
    height, width = upright.shape
    assert (height, width) == ((24, 16) if orientation >= 5 else (16, 24))

    def as_coco(mask: np.ndarray) -> dict[str, Any]:
        flat = [[value for point in polygon for value in point] for polygon in exact_polygons(mask)]
        value = coco({"segmentation": flat}, height=mask.shape[0], width=mask.shape[1])
        value["images"][0]["file_name"] = name
        return value

    rows = [{"image_path": name, "mask_path": mask, "label": 1} for mask in ("upright.png", "tagged.tif")]
    records = [
        *read(tmp_path, rows, "rows.json"),
        *read(tmp_path, as_coco(upright)),
        *read(tmp_path, as_coco(stored), frame="stored"),
    ]
    assert len(records) == 4
    for record in records:
        assert np.array_equal(mask_of(record, height, width), upright // 255)
    if orientation >= 5:
        assert "set options.frame: stored" in error_of(tmp_path, as_coco(stored))
        assert "set options.frame: upright" in error_of(tmp_path, as_coco(upright), frame="stored")
        Image.fromarray(stored).save(tmp_path / "sideways.png")
        sideways = read(tmp_path, [{"image_path": name, "mask_path": "sideways.png"}], "s.json")[0]
        with pytest.raises(DataFormatError, match="turn the mask"):
            load_mask(sideways.targets[0], (height, width))


def test_an_annotation_of_another_image_is_found(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    shape = {"label": "ps", "points": [[1, 1], [4, 1], [4, 3]]}
    for value in (coco(), labelme(shape)):
        assert "annotation of a 6x8 image but the image is 9x9" in error_of(tmp_path, value)
