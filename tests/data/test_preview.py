"""The preview cannot lie: what it shows as supervised is what has a label, by ids, in colour and without."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConfig
from finetune.data.answer_polygons import PolygonFrame
from finetune.data.dataset import ForensicDataset
from finetune.data.preview import ImageView, Piece, RecordView, choose, view_record, without_tokenizer
from finetune.data.preview_text import (
    OUTLINE,
    Style,
    char_width,
    half_blocks,
    image_line,
    legend,
    record_text,
    thumbnail,
    wrap,
)
from finetune.data.readers import read_records
from finetune.errors import ConfigError, DataFormatError
from finetune.models.loading import add_forensic_tokens, load_processor
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import IGNORE_INDEX, SpecialTokens

TOKENS = SpecialTokens()
COLOR = re.compile(r"\x1b\[([0-9;]*)m")
TALKS: dict[str, tuple[Turn, ...]] = {
    "shorthand": (
        Turn("user", "<image> 这张证件照是否存在PS痕迹？"),
        Turn("assistant", "伪造区域: <mask_1> - <mask_32>；依据: 发际线羽化异常 \U0001f469‍\U0001f52c；结论：<cls>"),
    ),
    "several": (
        Turn("system", "检查图像。\n简短。"),
        Turn("user", "<image>a?"),
        Turn("assistant", "line\nbreak\n\nend "),
        Turn("user", "⟦b⟧ \x1b[31mred\x07?"),
        Turn("assistant", "\ufffd\ufffd 𠮷野家 ｆｕｌｌ"),
    ),
    "image in the answer": (Turn("assistant", "<image>是伪造图像"),),
}


@pytest.fixture(scope="module")
def records(photo_records: Path) -> list[Record]:
    """Rendered records, a pair, text only, and conversations of the user's own."""
    read = read_records(photo_records)
    return [*read, *(dataclasses.replace(read[0], id=name, turns=turns) for name, turns in TALKS.items())]


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=pytest.mark.real_data)])
def processor(request: pytest.FixtureRequest, tiny_dir: Path) -> Any:
    folder = tiny_dir
    if request.param == "real":
        folder = request.getfixturevalue("shared_data") / "qwen2_5_vl_processor"
    loaded = load_processor(folder)
    add_forensic_tokens(loaded.tokenizer, TOKENS)
    return loaded


def colored(text: str, looks: tuple[str, ...]) -> str:
    """The characters a terminal shows in one of these looks."""
    found, look = [], ""
    for index, part in enumerate(COLOR.split(text)):
        if index % 2:
            look = part
        elif look in looks:
            found.append(part)
    return "".join(found)


# ---- pieces ----


@pytest.mark.parametrize("layout", ["tokens_first", "text_first"])
def test_pieces_are_the_ids_and_labels_of_training(processor: Any, records: list[Record], layout: Any) -> None:
    dataset = ForensicDataset(records, processor, TOKENS, DataConfig(layout=layout, polygon_coordinates="relative"))
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for index, record in enumerate(records):
        view, sample = view_record(dataset, index), dataset[index]
        assert [i for piece in view.pieces for i in piece.ids] == sample.input_ids, record.id
        flags = [piece.is_supervised for piece in view.pieces for _ in piece.ids]
        assert flags == [label != IGNORE_INDEX for label in sample.labels], record.id
        assert view.num_supervised == sum(flags)
        assert view.num_tokens == len(sample.input_ids) == dataset.num_tokens(index)
        assert view.num_image_tokens == sample.input_ids.count(pad)
        for piece in view.pieces:
            expected = processor.tokenizer.decode(list(piece.ids), clean_up_tokenization_spaces=False)
            assert piece.kind == "image" or piece.text == expected
            is_forensic = len(piece.ids) == 1 and piece.text in TOKENS.all
            assert (piece.kind == "forensic") == is_forensic
        texts = [piece.text for piece in view.pieces if piece.kind != "image"]
        whole = processor.tokenizer.decode(
            [i for i in sample.input_ids if i != pad], clean_up_tokenization_spaces=False
        )
        assert "".join(texts) == whole  # no character is cut between two pieces
        assert [image.mask is None for image in view.images] == [mask is None for mask in sample.masks]


def test_image_tokens_are_one_piece_with_rows_and_columns(processor: Any, records: list[Record]) -> None:
    dataset = ForensicDataset(records, processor, TOKENS, DataConfig())
    names = {record.id: index for index, record in enumerate(records)}
    (piece,) = (p for p in view_record(dataset, names["tampered_224x196"]).pieces if p.kind == "image")
    assert piece.text == "<image 8x7=56 tokens>"
    assert len(piece.ids) == 56
    assert not piece.is_supervised
    pair = [p.text for p in view_record(dataset, names["pair"]).pieces if p.kind == "image"]
    assert pair == ["<image 3x5=15 tokens>", "<image 5x8=40 tokens>"]


def test_padding_counts_among_the_tokens_and_is_said(records: list[Record]) -> None:
    config = DataConfig(image_padding="square")
    dataset = ForensicDataset(records, without_tokenizer(config), TOKENS, config)
    names = {record.id: index for index, record in enumerate(records)}
    view = view_record(dataset, names["tampered_224x196"])
    assert view.num_image_tokens == 64
    assert [piece.text for piece in view.pieces if piece.kind == "image"] == ["<image 8x8=64 tokens>"]
    assert image_line(view.images[0], 1).startswith("image 1: 224x196, seen at 224x196 / 224x224; label 1")


def test_without_tokenizer_the_same_text_is_supervised(processor: Any, records: list[Record]) -> None:
    config = DataConfig()
    bare = ForensicDataset(records, without_tokenizer(config), TOKENS, config)
    full = ForensicDataset(records, processor, TOKENS, config)
    for index in range(len(records)):
        ours, theirs = view_record(bare, index), view_record(full, index)
        assert ours.supervised_text == theirs.supervised_text
        assert "".join(p.text for p in ours.pieces) == "".join(p.text for p in theirs.pieces)
        assert [p.text for p in ours.pieces if p.kind == "forensic"] == [
            p.text for p in theirs.pieces if p.kind == "forensic"
        ]
        assert (ours.num_image_tokens, ours.num_tokens) == (theirs.num_image_tokens, 0)
    with pytest.raises(ConfigError, match="max_polygon_tokens counts tokens of a model"):
        without_tokenizer(DataConfig(max_polygon_tokens=100))


# ---- terminal ----


@pytest.mark.parametrize("width", [33, 80, 200])
def test_what_is_coloured_is_what_has_a_label(processor: Any, records: list[Record], width: int) -> None:
    dataset = ForensicDataset(records, processor, TOKENS, DataConfig())
    looks = ("30;48;5;157", "30;48;5;219")
    for index, record in enumerate(records):
        view = view_record(dataset, index)
        taught = processor.tokenizer.decode(
            [label for label in dataset[index].labels if label != IGNORE_INDEX], clean_up_tokenization_spaces=False
        )
        shown = record_text(view, Style(width, "truecolor"))
        expected = taught.replace("\n", "⏎").replace("‍", "\\u200d")
        assert colored(shown, looks) == expected, record.id
        assert colored(shown, looks[1:]) == "".join(match.group() for match in TOKENS.find(taught))
        plain = record_text(view, Style(10**6, "none", ("⟪", "⟫")))
        assert "".join(re.findall(r"⟪(.*?)⟫", plain, re.DOTALL)) == taught.replace("‍", "\\u200d")
        for line in COLOR.sub("", shown).split("\n"):
            assert sum(map(char_width, line)) <= width
            assert "\x1b" not in line


def test_plain_text_has_no_escape_and_a_map_of_the_mask(processor: Any, records: list[Record]) -> None:
    dataset = ForensicDataset(records, processor, TOKENS, DataConfig())
    text = record_text(view_record(dataset, 0), Style(80))
    assert "\x1b" not in text
    assert "label 1 tampered; mask 12.7" in text
    rows = [line for line in text.splitlines() if line and set(line) <= set("#.")]
    marked = np.array([[char == "#" for char in row] for row in rows])
    assert marked.mean() == pytest.approx(70 * 80 / (224 * 196), abs=0.03)  # drawn at x 30..100, y 40..120
    assert not marked[:, -10:].any()
    assert "⟦supervised⟧" in legend(Style(80))
    assert "\x1b" in legend(Style(80, "256"))


def test_data_cannot_steer_the_terminal(records: list[Record]) -> None:
    config = DataConfig()
    record = next(record for record in records if record.id == "several")
    record = dataclasses.replace(record, id="a\x1b[2Jb", group="g\r\n‮h", source="s\x07")
    text = record_text(view_record(ForensicDataset([record], without_tokenizer(config), TOKENS, config), 0), Style(90))
    assert "\\x1b[31mred\\x07?" in text
    assert "a\\x1b[2Jb" in text
    assert not {"\x1b", "\x07", "\r", "‮"} & set(text)


def test_lines_break_at_the_width_with_chinese_counted_double() -> None:
    assert wrap([("中文字ab", "context")], Style(5)) == ["中文", "字ab"]
    assert wrap([("e\u0301" * 3, "context")], Style(3)) == ["e\u0301" * 3]
    assert wrap([("ab\n\ncd", "context")], Style(9)) == ["ab", "", "cd"]
    lines = wrap([("中文", "supervised"), ("字", "context")], Style(4, "256"))
    assert lines == ["\x1b[30;48;5;157m中文\x1b[0m", "字"]
    assert wrap([], Style(4)) == []


def test_half_blocks_by_hand() -> None:
    rgb = np.array([[[255, 0, 0], [0, 0, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    assert half_blocks(rgb, "truecolor") == [
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[38;2;0;0;0;48;2;255;255;255m▀\x1b[0m"
    ]
    assert half_blocks(rgb, "256") == ["\x1b[38;5;196;48;5;21m▀\x1b[38;5;16;48;5;231m▀\x1b[0m"]


@pytest.mark.parametrize("size_hw", [(400, 600), (7, 5), (30, 900), (900, 30)])
def test_thumbnail_keeps_the_shape_and_outlines_even_a_speck(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    mask = np.zeros(size_hw, np.uint8)
    mask[height // 2, width // 2] = 1
    picture = Image.new("RGB", (width, height), (10, 20, 30))
    view = ImageView(picture, PolygonFrame("absolute", size_hw, size_hw), size_hw, 1, 1, mask)
    small = thumbnail(view, 60, 22)
    assert small.shape[0] % 2 == 0
    assert small.shape[0] <= 44
    assert small.shape[1] <= 60
    assert (small == OUTLINE).all(axis=2).any()
    assert not (thumbnail(dataclasses.replace(view, mask=None), 60, 22) == OUTLINE).all(axis=2).any()


# ---- what is wrong with a record ----


def test_problems_stand_with_their_record(processor: Any, records: list[Record], tmp_path: Path) -> None:
    by_id = {record.id: record for record in records}
    gone = Record("gone", (ImageInput(path=str(tmp_path / "no.png")),), (ImageTarget(label=0),))
    leak = dataclasses.replace(by_id["shorthand"], id="leak")
    chosen = [by_id["tampered_224x196"], gone, leak, by_id["image in the answer"], by_id["text"]]
    dataset = ForensicDataset(chosen, processor, TOKENS, DataConfig(max_length=120))
    fine, missing, leaking, placeless, text = (view_record(dataset, index) for index in range(5))
    assert [problem.message for problem in fine.problems] == [
        f"record 'tampered_224x196': {fine.num_tokens} tokens, above data.max_length = 120"
    ]
    assert fine.has_errors
    assert fine.pieces
    assert "image file not found" in missing.problems[0].message
    assert len(missing.problems) == 1
    assert missing.pieces == missing.images == ()
    assert "record 'gone': image file not found" in record_text(missing, Style(200))
    assert any("gives its target away" in problem.message for problem in leaking.problems)
    assert any("no forensic token, so the heads learn nothing" in problem.message for problem in placeless.problems)
    assert text.problems == ()
    relaxed = ForensicDataset(chosen[:1], processor, TOKENS, DataConfig())
    assert view_record(relaxed, 0).problems == ()


# ---- which records ----


def named(*names: str) -> list[Record]:
    return [Record(name, (), ()) for name in names]


def test_drawn_at_random_the_same_for_the_same_seed_in_file_order() -> None:
    many = named(*(f"{i:03}" for i in range(200)))
    first, errors, num_errors = choose(iter(many), 5, seed=3)
    assert first == choose(iter(many), 5, seed=3)[0] != choose(iter(many), 5, seed=4)[0]
    assert [record.id for record in first] == sorted(record.id for record in first)
    assert len({record.id for record in first}) == 5
    assert (errors, num_errors) == ([], 0)
    drawn = [record.id for seed in range(400) for record in choose(iter(many), 5, seed=seed)[0]]
    assert 0.35 < np.mean([int(name) < 100 for name in drawn]) < 0.65
    assert len(choose(iter(named("a", "b")), 5)[0]) == 2


def test_named_records_come_in_the_order_asked_and_reading_stops_there() -> None:
    seen = []

    def rows() -> Any:
        for record in named("a", "b", "c", "d"):
            seen.append(record.id)
            yield record

    assert [record.id for record in choose(rows(), 1, ["c", "a"])[0]] == ["c", "a"]
    assert seen == ["a", "b", "c"]
    with pytest.raises(DataFormatError, match=r"no record with this id.*found 'z'"):
        choose(rows(), 1, ["a", "z"])


def test_rows_that_cannot_be_read_are_counted() -> None:
    rows = [*named("a"), *(DataFormatError(f"bad {i}") for i in range(30)), *named("b")]
    records, errors, num_errors = choose(rows, 5)
    assert [record.id for record in records] == ["a", "b"]
    assert (len(errors), num_errors) == (20, 30)


def test_counts_without_a_label() -> None:
    """A view by hand: sums over its pieces."""
    pieces = (
        Piece("a", "text", False, (1,)),
        Piece("中", "text", True, (2, 3)),
        Piece("<cls>", "forensic", True, (4,)),
    )
    view = RecordView(named("x")[0], pieces, (), (), True, 10)
    assert (view.num_tokens, view.num_supervised, view.supervised_text) == (4, 3, "中<cls>")
    assert "4 of 10 tokens: 3 supervised, 0 image" in record_text(view, Style(60))
