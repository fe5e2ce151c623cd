"""Readers: every documented example loads, every slip is one line with record, place and fix, noise never crashes."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from finetune.data.readers import READERS, read_records, scan_records
from finetune.data.readers.coco import is_coco
from finetune.data.readers.labelme import is_labelme
from finetune.errors import DataFormatError
from finetune.schema import Record

README = Path(__file__).parents[2] / "data" / "README.md"
BLOCKS = re.findall(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
OBJECT_BLOCKS = [block for block in BLOCKS if not is_coco(json.loads(block)) and not is_labelme(json.loads(block))]
SPEC_CONVERSATIONS = (
    '{"conversations": [{"role": "user", "content": "<image> 这张证件照是否存在PS痕迹？"},'
    '{"role": "assistant", "content": "伪造区域: <mask_1> - <mask_32>；取证判断依据: 发际线羽化异常；取证难易判断: 易；'
    '真实性结论：<cls_1> - <cls_32>"}]}'
)


def write(folder: Path, content: Any, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def read_one(folder: Path, fields: dict[str, Any], **options: Any) -> Record:
    (record,) = read_records(write(folder, [fields]), **options)
    return record


def error_of(folder: Path, content: Any, name: str = "train.json", **options: Any) -> str:
    with pytest.raises(DataFormatError) as caught:
        read_records(write(folder, content, name), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("block", BLOCKS)
def test_every_example_of_the_data_readme_loads(tmp_path: Path, block: str) -> None:
    assert read_records(write(tmp_path, block))


@pytest.mark.parametrize("block", OBJECT_BLOCKS)
def test_every_example_of_one_record_per_object_loads_line_by_line(tmp_path: Path, block: str) -> None:
    value = json.loads(block)
    lines = "\n".join(json.dumps(entry) for entry in (value if isinstance(value, list) else [value]))
    as_lines = read_records(write(tmp_path, lines, "train.jsonl"))
    assert [r.images for r in as_lines] == [r.images for r in read_records(write(tmp_path, block))]


def test_the_table_and_the_folder_of_the_data_readme_load(tmp_path: Path) -> None:
    (block,) = re.findall(r"```csv\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert [record.label for record in read_records(write(tmp_path, block, "t.csv"))] == [1, 0]
    (block,) = re.findall(r"```\n(set/.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for name in block.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [record.label for record in read_records(tmp_path / "set")] == [0, 1]


def test_the_conversations_example_of_the_spec_loads_without_images(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path, SPEC_CONVERSATIONS, "a.jsonl"))
    assert (record.id, record.source, record.images) == ("a:1", "a.jsonl:1", ())
    assert [turn.role for turn in record.turns] == ["user", "assistant"]
    assert record.turns[1].content.endswith("真实性结论：<cls_1> - <cls_32>")


def test_native_record_keeps_every_field(tmp_path: Path) -> None:
    record = read_one(
        tmp_path,
        {
            "id": 7,
            "group": "g",
            "images": ["a.jpg", "/abs/b.png"],
            "labels": [0, 1],
            "masks": ["4x6", "m/b.png"],
            "polygons": [None, [[[1, 5, 5], [1, 1, 5]], [[0, 0], [2, 0], [2, 2], [0, 0]]]],
            "evidence": [None, "why"],
            "provenance": {"operation": "splice"},
        },
    )
    assert (record.id, record.group, record.turns, record.label) == ("7", "g", (), 1)
    assert [image.path for image in record.images] == [str(tmp_path / "a.jpg"), "/abs/b.png"]
    assert record.targets[0].mask_size_hw == (4, 6)
    assert record.targets[0].polygons is None
    assert record.targets[1].mask_path == str(tmp_path / "m/b.png")
    assert record.targets[1].polygons == (
        ((1.0, 1.0), (5.0, 1.0), (5.0, 5.0)),
        ((0.0, 0.0), (2.0, 0.0), (2.0, 2.0)),
    )
    assert record.targets[1].evidence == "why"
    assert record.provenance == {"operation": "splice"}


@pytest.mark.parametrize(
    "polygons",
    [
        [[[1, 5, 5], [1, 1, 5]]],  # list of regions, or one image in the answer text's flat form
        [[1, 5, 5], [1, 1, 5]],
        [[1, 1], [5, 1], [5, 5]],
        [[[1, 1], [5, 1], [5, 5]]],
        [[[[1, 5, 5], [1, 1, 5]]]],
        [[[[1, 1], [5, 1], [5, 5], [1, 1]]]],
    ],
)
def test_one_region_has_one_meaning_in_every_form(tmp_path: Path, polygons: list[Any]) -> None:
    record = read_one(tmp_path, {"images": ["a.jpg"], "polygons": polygons})
    assert record.targets[0].polygons == (((1.0, 1.0), (5.0, 1.0), (5.0, 5.0)),)


def test_flat_answer_form_holds_several_regions(tmp_path: Path) -> None:
    flat = [[1, 5, 5], [1, 1, 5], [7, 9, 9, 7], [7, 7, 9, 9]]
    for polygons in (flat, [flat], [[flat[:2], flat[2:]]], [flat[:2], flat[2:]]):
        target = read_one(tmp_path, {"image": "a.jpg", "polygons": polygons}).targets[0]
        assert target.polygons is not None
        assert [len(region) for region in target.polygons] == [3, 4]
    assert read_one(tmp_path, {"image": "a.jpg", "polygons": []}).targets[0].polygons == ()


@pytest.mark.parametrize(
    "polygons",
    [[[[1, 2], [3, 4]]], [[1, 2, 3], [1, 2]], [[[1, 2, 3]]], "x", 3, [1, 2], [[["a", 1], [2, 3], [4, 5]]], [[[[[1]]]]]],
)
def test_malformed_polygons_are_named(tmp_path: Path, polygons: Any) -> None:
    message = error_of(tmp_path, [{"id": "r", "image": "a.jpg", "polygons": polygons}])
    assert "record 'r' (train.json[0])" in message
    assert "polygons" in message


def test_sharegpt_parts_and_system(tmp_path: Path) -> None:
    record = read_one(
        tmp_path,
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "real?"}]},
                {"from": "gpt", "value": "yes"},
            ],
        },
    )
    assert [(turn.role, turn.content) for turn in record.turns] == [
        ("system", "s"),
        ("user", "<image>real?"),
        ("assistant", "yes"),
    ]
    assert record.images[0].path == str(tmp_path / "a.jpg")


@pytest.mark.parametrize("wrap", ["{}", "data:image/png;base64,{}"])
def test_instruction_holds_an_embedded_image(tmp_path: Path, wrap: str) -> None:
    text = base64.b64encode(b"\x89PNG bytes").decode()
    record = read_one(tmp_path, {"instruction": "看图", "input": wrap.format(text), "output": "1. a\n2. b"})
    assert record.images[0].data == b"\x89PNG bytes"
    assert record.turns[0].content == "<image>看图"
    assert record.turns[1].content == "1. a\n2. b"


def test_instruction_without_an_image_or_with_a_path(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"instruction": "q", "input": "", "output": "a"}).images == ()
    record = read_one(tmp_path, {"instruction": "q", "input": "i/a.jpg", "output": "a"})
    assert record.images[0].path == str(tmp_path / "i/a.jpg")
    record = read_one(tmp_path, {"instruction": "q", "input": "more", "output": "a", "images": ["a.jpg"]})
    assert record.turns[0].content == "<image>q\nmore"
    assert "not base64" in error_of(tmp_path, [{"instruction": "q", "input": "more text!", "output": "a"}])


def test_annotation_paths_are_relative_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    record = read_one(tmp_path, {"image_path": "i/a.jpg", "mask_path": "1080x1920", "label": 0}, root=tmp_path / "root")
    assert record.images[0].path == str(tmp_path / "root/i/a.jpg")
    assert (record.targets[0].mask_size_hw, record.label) == ((1080, 1920), 0)
    assert "not a folder" in error_of(tmp_path, [{"image_path": "a"}], root=tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["../a.jpg", "i/../../a.jpg", "", "http://host/a.jpg", "a\0.jpg"])
def test_unusable_paths_are_refused(tmp_path: Path, path: str) -> None:
    assert "record 'train:0'" in error_of(tmp_path, [{"image_path": path}])


@pytest.mark.parametrize("label", ["1", True, 2, -1, 1.0, "fake", [1], {}])
def test_a_label_is_the_number_0_or_1(tmp_path: Path, label: Any) -> None:
    message = error_of(tmp_path, json.dumps({"id": "x", "images": ["a.jpg"], "labels": [label]}), "t.jsonl")
    assert message.startswith("record 'x' (t.jsonl:1): label is neither 0 nor 1; field 'labels[0]'; found ")
    assert repr(label) in message
    assert "fix: write " in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"images": ["a", "b"], "labels": [1]}, "1 values for 2 images"),
        ({"images": ["a", "b"], "label": 1}, "one value for 2 images"),
        ({"images": ["a"], "label": 1, "labels": [1]}, "given twice"),
        ({"images": ["a"], "image": "a"}, "images given twice"),
        ({"images": ["a"], "lables": [1]}, "rename it to 'labels'"),
        ({"image": "a", "lable": 1}, "rename it to 'label'"),
        ({"images": ["a"], "masks": ["0x10"]}, "impossible mask size"),
        ({"images": ["a"], "provenance": "p"}, "provenance is not an object"),
        ({"images": []}, "neither an image nor a conversation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "without a known role"),
        ({"messages": [{"role": "user"}]}, "without a known role"),
        ({"messages": "hello"}, "not a list"),
        ({"messages": [], "conversations": []}, "keep one of them"),
        ({"instructions": "q", "output": "a"}, "nearest one, 'instruction'"),
        ({"picture_path": "a.jpg"}, "nearest one, 'annotation'"),
        ({"id": True, "images": ["a"]}, "text expected"),
    ],
)
def test_slips_are_named_with_what_to_do(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    assert expected in error_of(tmp_path, [fields])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ""),
        ("a.json", " \n"),
        ("a.json", "[]"),
        ("a.json", '{"data": []}'),
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
    ],
)
def test_an_empty_data_set_is_an_error(tmp_path: Path, content: str, name: str) -> None:
    assert "empty data set" in error_of(tmp_path, content, name)


def test_damaged_json_names_line_and_column_and_reading_goes_on(tmp_path: Path) -> None:
    lines = [
        '{"images": ["a.jpg"]}',
        '{"images": ["a.jpg"',
        "",
        '{"images": ["b.jpg"], "label": 3}',
        '{"images": ["c"]}',
    ]
    records, errors = scan_records(write(tmp_path, "\n".join(lines), "t.jsonl"))
    assert [record.id for record in records] == ["t:1", "t:5"]
    assert str(errors[0]).startswith("(t.jsonl:2): damaged JSON at column 20")
    assert "(t.jsonl:4): label is neither" in str(errors[1])
    message = error_of(tmp_path, '[{"images": ["a.jpg"]},\n {"images": }]')
    assert "damaged JSON at line 2, column 13" in message
    assert "name the file .jsonl" in error_of(tmp_path, '{"images": ["a"]}\n{"images": ["b"]}')


def test_encodings(tmp_path: Path) -> None:
    content = json.dumps([{"image_path": "图片/证件照.jpg"}], ensure_ascii=False)
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("utf-8-sig"))
    assert read_records(path)[0].images[0].path == str(tmp_path / "图片/证件照.jpg")
    path.write_bytes(content.encode("gbk"))
    with pytest.raises(DataFormatError, match=r"not UTF-8 at byte .*GBK"):
        read_records(path)
    path.write_bytes(content.encode("utf-16"))
    with pytest.raises(DataFormatError, match="UTF-16"):
        read_records(path)


def test_files_and_containers(tmp_path: Path) -> None:
    assert len(read_records(write(tmp_path, {"info": 1, "data": [{"image_path": "a"}, {"image_path": "b"}]}))) == 2
    assert len(read_records(write(tmp_path, {"image_path": "a", "polygons": []}))) == 1
    assert "several lists" in error_of(tmp_path, {"a": [{"image_path": "a"}], "b": [{"image_path": "b"}]})
    assert "id used twice" in error_of(tmp_path, [{"id": "a", "image": "a"}, {"id": "a", "image": "b"}])
    assert "unknown format" in error_of(tmp_path, [{"image": "a"}], format="coca")
    assert "format 'annotation' needs 'image_path'" in error_of(tmp_path, [{"image": "a"}], format="annotation")
    assert "unknown kind" in error_of(tmp_path, "", "a.txt")
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataFormatError):
            read_records(missing)


def test_records_in_any_format_or_noise_give_records_or_a_data_format_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    blocks = OBJECT_BLOCKS
    values: list[Any] = [
        None,
        True,
        0,
        1,
        -1,
        2.5,
        1e400,
        float("nan"),
        10**30,
        "",
        "a",
        "\ud800",
        "1x1",
        "data:",
        [],
        {},
    ]
    values += [[[1, 2], [3]], {"role": "user"}, ["a"], [None], "<image>", "..", "\0", [[[[]]]], [[], []]]

    def mutate(value: Any) -> Any:
        if rng.random() < 0.04:
            return rng.choice(values)
        if isinstance(value, dict):
            pairs = [(key if rng.random() < 0.95 else rng.choice([*keys, "x"]), mutate(v)) for key, v in value.items()]
            return dict(pair for pair in pairs if rng.random() < 0.95)
        if isinstance(value, list):
            return [mutate(entry) for entry in value for _ in range(rng.choice([0] + [1] * 18 + [2]))]
        return value

    keys = [
        "images",
        "labels",
        "masks",
        "polygons",
        "evidence",
        "messages",
        "conversations",
        "input",
        "output",
        "id",
        "img",
    ]
    path = tmp_path / "f.jsonl"
    num_records = num_errors = 0
    for round_ in range(800):
        value = mutate(json.loads(rng.choice(blocks)))
        data = json.dumps(value).encode()
        if round_ % 4 == 0:
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            data = bytes(damaged)
        path = tmp_path / rng.choice(["f.jsonl", "f.json"])
        path.write_bytes(data)
        records, errors = scan_records(path, rng.choice(["auto", "auto", *READERS]))
        assert records or errors
        for error in errors:
            str(error).encode("utf-8")
        num_records, num_errors = num_records + len(records), num_errors + len(errors)
    assert min(num_records, num_errors) > 100


def test_deep_nesting_and_endless_numbers(tmp_path: Path) -> None:
    assert error_of(tmp_path, "[" * 100_000)
    assert error_of(tmp_path, '[{"image_path": "a", "label": ' + "9" * 10_000 + "}]")
    assert error_of(tmp_path, [{"image_path": "a", "polygons": [[[1, 2, 10**400], [1, 2, 3]]]}])


def test_half_a_character_in_an_option_can_be_printed() -> None:
    message = str(DataFormatError("unknown key 'a\ud800'", found="\ud800"))
    assert message.encode("utf-8").count(b"\\ud800") == 2
