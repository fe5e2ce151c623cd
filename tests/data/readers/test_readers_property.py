"""Whatever stands in a file or folder, a reader gives records or `DataFormatError`s, never another exception."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.readers import FORMATS, READERS, iter_records
from finetune.errors import DataFormatError
from finetune.schema import Record

FAST = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

TEXT = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            "a.png",
            "m.png",
            "4x6",
            "Negative",
            "data:image/png;base64,iVBO",
            "../x",
            "\\..\\x",
            "\0",
            "\ud800",
            "<image>",
        ]
    ),
)
NUMBER = st.one_of(st.integers(-3, 9), st.integers(), st.floats(), st.just(10**400))
SCALAR = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
ANY = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


def rarely_wrong(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(strategy, strategy, strategy, strategy, ANY)


def near(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of a format: any of its fields may be absent or of any other kind, and others may be there."""
    known = st.fixed_dictionaries({}, optional={name: rarely_wrong(value) for name, value in fields.items()})
    return st.builds(lambda a, b: {**b, **a}, known, st.dictionaries(TEXT, ANY, max_size=1))


POINTS = st.lists(st.lists(st.floats(-2, 9), min_size=2, max_size=2), min_size=1, max_size=5)
PATH = st.sampled_from(["a.png", "m.png", "none.png", "bad.png", "sub"])
LABEL = st.sampled_from([0, 1, None])
ID = st.sampled_from([0, 1, "1", "x"])
TURNS = st.lists(
    near(role=st.sampled_from(["user", "assistant", "system"]), content=TEXT, value=TEXT) | ANY, max_size=2
)
TARGETS = {
    "id": ID,
    "group": TEXT,
    "label": LABEL,
    "labels": st.lists(LABEL, max_size=2),
    "mask": PATH,
    "masks": st.lists(PATH, max_size=2),
    "polygons": st.lists(POINTS, max_size=2),
    "evidence": TEXT,
    "provenance": st.dictionaries(TEXT, ANY, max_size=2),
}
IMAGES = {"images": st.lists(PATH, max_size=2), "image": PATH, "system": TEXT}
OBJECTS: dict[str, st.SearchStrategy[Any]] = {
    "conversations": near(conversations=TURNS, **IMAGES, **TARGETS),
    "messages": near(messages=TURNS, **IMAGES, **TARGETS),
    "instruction": near(instruction=TEXT, input=TEXT, output=TEXT, **IMAGES, **TARGETS),
    "annotation": near(image_path=PATH, mask_path=PATH, **TARGETS),
    "pairs": st.lists(rarely_wrong(PATH), min_size=1, max_size=3),
}
RLE = near(
    size=st.just([4, 6]), counts=st.one_of(st.just([4, 20]), st.just("04T1"), TEXT, st.lists(NUMBER, max_size=4))
)
COCO = st.fixed_dictionaries(
    {
        "images": st.lists(near(id=ID, file_name=PATH, height=st.just(4), width=st.just(6)), max_size=2),
        "annotations": rarely_wrong(
            st.lists(
                near(
                    image_id=ID,
                    category_id=ID,
                    iscrowd=LABEL,
                    bbox=st.lists(NUMBER, max_size=4),
                    segmentation=RLE | st.lists(st.lists(st.integers(-1, 7), min_size=6, max_size=8), max_size=2),
                )
                | ANY,
                max_size=3,
            )
        ),
    },
    optional={"categories": rarely_wrong(st.lists(near(id=ID, name=TEXT), max_size=2))},
)
LABELME = near(
    imagePath=PATH,
    imageHeight=st.just(4),
    imageWidth=st.just(6),
    imageData=st.one_of(st.none(), TEXT),
    shapes=st.lists(
        near(
            label=TEXT,
            points=POINTS,
            shape_type=st.sampled_from(["polygon", "rectangle", "circle", "mask", "line", None]),
            mask=TEXT,
        )
        | ANY,
        max_size=2,
    ),
)
OPTIONS = st.one_of(
    st.just({}),
    st.dictionaries(
        st.sampled_from(
            [
                "mask_convention",
                "mask_pixels",
                "categories",
                "unannotated",
                "crowd",
                "boxes",
                "frame",
                "labels",
                "columns",
                "encoding",
                "delimiter",
                "label_map",
                "preset",
                "authentic",
                "tampered",
                "masks",
                "group",
                "mask_name",
                "tampered_name",
                "ignore",
                "mask_shared",
                "unlabelled_images",
            ]
        ),
        st.one_of(
            ANY,
            st.sampled_from(["target", "dark", "green", "stored", "unknown", ";", "utf-8", "x", "(", "{stem}", "{0}"]),
            st.sampled_from(
                [["x"], ["../x"], {"image_path": "a"}, {"0": 1}, True, "generic", "comofod", "imd2020", "."]
            ),
        ),
        max_size=2,
    ),
)


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path / "a.png")
        Image.fromarray(np.eye(4, 6, dtype=np.uint8) * 255).save(path / "m.png")
        (path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
        (path / "sub").mkdir()
        yield path


def check(path: Path, format: str = "auto", options: Any = None) -> None:
    found = list(iter_records(path, format, options=options))
    assert found
    for entry in found:
        assert isinstance(entry, (Record, DataFormatError))
        if isinstance(entry, DataFormatError):
            assert "\n" not in str(entry)
            str(entry).encode("utf-8")
        else:
            assert entry.id
            assert len(entry.images) == len(entry.targets)


def dump(value: Any) -> str:
    return json.dumps(value)


@FAST
@pytest.mark.parametrize("format", list(READERS))
@given(data=st.data())
def test_objects_near_every_format(folder: Path, format: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(rarely_wrong(OBJECTS[format]), max_size=3))
    chosen, options = data.draw(st.sampled_from(["auto", format])), data.draw(OPTIONS)
    (folder / "f.json").write_text(dump(values))
    check(folder / "f.json", chosen, options)
    (folder / "f.jsonl").write_text("\n".join(map(dump, values)))
    check(folder / "f.jsonl", chosen, options)


@FAST
@pytest.mark.parametrize("format", ["coco", "labelme"])
@given(data=st.data())
def test_files_near_coco_and_labelme(folder: Path, format: str, data: st.DataObject) -> None:
    value = data.draw(rarely_wrong(COCO if format == "coco" else LABELME))
    (folder / "f.json").write_text(dump(value))
    check(folder / "f.json", data.draw(st.sampled_from(["auto", format])), data.draw(OPTIONS))


@FAST
@given(
    rows=st.lists(st.lists(st.one_of(TEXT, PATH, st.sampled_from(["0", "1", "id", "image", "label"])), max_size=4)),
    header=st.sampled_from(["", "image,label\n", "id;image;mask\n", '"image"\tgroup\n', "图像|标签\n", "label\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "gb18030", "utf-16", "latin-1"]),
    options=OPTIONS,
)
def test_tables_of_any_cells(folder: Path, rows: list[list[str]], header: str, encoding: str, options: Any) -> None:
    text = header + "\n".join(",".join(row) for row in rows)
    (folder / "f.csv").write_bytes(text.encode(encoding, "replace"))
    check(folder / "f.csv", "auto", options)


@FAST
@given(
    rows=st.lists(st.lists(st.one_of(TEXT, PATH, st.sampled_from(["轻微", "**风险等级**:", "x"])), max_size=7)),
    encoding=st.sampled_from(["utf-8", "gb18030", "utf-16"]),
    options=st.one_of(
        st.just({}),
        st.dictionaries(st.sampled_from(["fields", "levels", "level_map", "optional", "template", "id_column"]), ANY),
    ),
)
def test_report_tables_of_any_cells(folder: Path, rows: list[list[str]], encoding: str, options: Any) -> None:
    header = "image_id,image_path,data_风险,data_纠正和预防建议,data_风险等级,data_缺陷描述\n"
    text = header + "\n".join(",".join(row) for row in rows)
    (folder / "f.csv").write_bytes(text.encode(encoding, "replace"))
    check(folder / "f.csv", "reports", options)


@FAST
@given(
    data=st.one_of(
        st.binary(max_size=60), st.text("[]{},:\"\\'0123456789.eE-truefalsn \n\t", max_size=60).map(str.encode)
    ),
    name=st.sampled_from(["f.json", "f.jsonl", "f.csv", "f.tsv", "f.parquet", "f.txt"]),
    format=st.sampled_from(["auto", *READERS, *FORMATS, "none"]),
    options=OPTIONS,
)
def test_any_bytes(folder: Path, data: bytes, name: str, format: str, options: Any) -> None:
    (folder / name).write_bytes(data)
    check(folder / name, format, options)


NAMES = st.sampled_from(
    [
        "authentic/a.png",
        "authentic/x/b.png",
        "tampered/a.png",
        "tampered/b.png",
        "masks/a.png",
        "masks/x/b.png",
        "masks/a.jpg",
        "Au/q.png",
        "1_F.png",
        "1_B.png",
        "1_O.png",
        "x/y_orig.jpg",
        "x/y.jpg",
        "x/y_mask.png",
        "image/1t.tif",
        "mask/1forged.tif",
        ".hidden.png",
        "a.json",
        "x/b.json",
        "x/notes.txt",
        "manifest.json",
    ]
)


@FAST
@given(
    names=st.lists(NAMES, max_size=8, unique=True),
    format=st.sampled_from(["auto", "folder", "labelme", "stored", "coco", "table", "messages"]),
    content=st.one_of(st.binary(max_size=10), LABELME.map(lambda value: dump(value).encode())),
    options=OPTIONS,
)
def test_any_folder(names: list[str], format: str, content: bytes, options: Any) -> None:
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(content)
        check(Path(root), format, options)
