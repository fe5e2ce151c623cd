"""Validation: each kind of bad input of the data is found, all at once, one line each, before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.images import seems_cut_off
from finetune.data.readers import read_records
from finetune.data.token_checks import leaking_tokens
from finetune.data.validation import (
    InvalidDataError,
    check_file,
    check_records,
    validate_for_training,
)
from finetune.errors import DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import SpecialTokens

TOKENS = SpecialTokens(num_cls=1, num_mask=4)
RUN = "<cls><mask_1><mask_2><mask_3><mask_4>"


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    Image.fromarray(np.eye(40, 60, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    Image.fromarray(np.eye(40, 50, dtype=np.uint8) * 255).save(tmp_path / "small.png")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    return str(tmp_path / "a.jpg")


def record(photo: str, answer: str, question: str = "<image>?", num_images: int = 1, **fields: Any) -> Record:
    return Record(
        id="r",
        images=(ImageInput(path=photo),) * num_images,
        targets=(ImageTarget(**fields),) * num_images,
        turns=(Turn("user", question), Turn("assistant", answer)),
        source="t.jsonl:1",
    )


def messages(records: list[Record], tokens: SpecialTokens = TOKENS, **options: Any) -> list[str]:
    found = [problem.message for problem in check_records(records, tokens, **options)]
    assert all("\n" not in message for message in found)
    return found


@pytest.mark.parametrize(
    "answer",
    [
        "real",
        RUN + '{"result": "fake"}',
        '{"result": real<cls>, "mask": []<mask_1><mask_2><mask_3><mask_4>}',
        "区域: <mask_1> - <mask_4>；结论：<cls>",
        "<mask_1>~<mask_4>",
        "<cls> only",
        "<cls_1> - <cls_1>",
    ],
)
def test_good_answers_pass(photo: str, answer: str) -> None:
    assert messages([record(photo, answer)]) == []


def test_two_images_take_two_runs_over_all_turns(photo: str) -> None:
    two = {"num_images": 2, "question": "<image><image>?"}
    assert messages([record(photo, RUN + "a" + RUN, **two)]) == []
    good = record(photo, RUN, **two)
    split = Record(good.id, good.images, good.targets, (*good.turns, Turn("user", "and?"), Turn("assistant", RUN)))
    assert messages([split]) == []
    found = messages([record(photo, RUN, **two)])
    assert [message.split(";")[0] for message in found] == [
        "record 'r' (t.jsonl:1): 1 cls tokens for 2 images",
        "record 'r' (t.jsonl:1): 4 mask tokens for 2 images",
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<mask_1> - <mask_40>", "set tokens.num_mask: 40, or write <mask_1> - <mask_4>"),
        ("<cls_1> - <cls_32>", "set tokens.num_cls: 32, or write <cls>"),
        ("<mask_1> - <mask_999999999>", "number the tokens <mask_1>, <mask_2>"),
        ("<mask_01>", "without leading zeros"),
        ("<cls_1>", "write <cls>, the spelling of a single token"),
        ("<mask_1><mask_2><mask_3>", "3 mask tokens for 1 images"),
        ("<mask_1> - <mask_3>", "3 mask tokens for 1 images"),
        (
            "<mask_1><mask_3><mask_2><mask_4>",
            "mask tokens out of order at number 2; found '<mask_3>'; expected <mask_2>",
        ),
        ("<cls><cls>", "2 cls tokens for 1 images"),
        (" \n", "assistant turn is empty"),
        ("a<|image_pad|>", "control token of the chat format"),
        ("a<image>", "2 <image> placeholders but 1 images"),
    ],
)
def test_bad_answers_are_named(photo: str, answer: str, expected: str) -> None:
    (message,) = messages([record(photo, answer)])
    assert message.startswith("record 'r' (t.jsonl:1): ")
    assert expected in message
    assert "fix: " in message


@pytest.mark.parametrize("token", ["<cls>", "<mask_1>", "<image>", "<|im_end|>", "<|image_pad|>"])
def test_tokens_in_the_evidence_of_a_record_without_a_conversation(photo: str, token: str) -> None:
    """It becomes a part of the answer, where a forensic token is read and a control token ends the turn."""
    targets = (ImageTarget(label=0, evidence="none seen"), ImageTarget(label=1, evidence=f"see {token} here"))
    bad = Record(id="r", source="t.jsonl:1", images=(ImageInput(path=photo),) * 2, targets=targets)
    (message,) = messages([bad])
    assert message.startswith("record 'r' (t.jsonl:1): ")
    assert "token in the evidence" in message
    assert f"found '{token}'" in message


def test_cls_of_a_one_token_spelling_in_a_larger_vocabulary(photo: str) -> None:
    (message,) = messages([record(photo, "<cls>")], SpecialTokens(num_cls=3, num_mask=4))
    assert "write <cls_1> - <cls_3>, or set tokens.num_cls: 1" in message


def test_tokens_and_roles(photo: str) -> None:
    (message,) = messages([record(photo, "ok", question="<image> <cls>?")])
    assert "forensic token in a user turn" in message
    only_user = Record("r", (), (), (Turn("user", "hello"),))
    (message,) = messages([only_user])
    assert "without an assistant turn" in message
    (message,) = messages([record(photo, "ok", question="no placeholder")])
    assert "0 <image> placeholders but 1 images" in message


def test_a_record_for_templates_needs_labels(photo: str) -> None:
    image = (ImageInput(path=photo),)
    assert "no label" in messages([Record("r", image, (ImageTarget(),))])[0]
    assert messages([Record("r", image, (ImageTarget(0),)), Record("s", image, (ImageTarget(1),))]) == []


def test_the_users_first_example_is_reported_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    answer = "伪造区域: <mask_1> - <mask_32>；真实性结论：<cls_1> - <cls_32>"
    turns = [
        {"role": "user", "content": "<image> 这张证件照是否存在PS痕迹？"},
        {"role": "assistant", "content": answer},
    ]
    path.write_text(json.dumps({"conversations": turns}, ensure_ascii=False), encoding="utf-8")
    records = read_records(path)
    (message,) = messages(records, SpecialTokens(32, 32))
    assert "1 <image> placeholders but 0 images" in message
    found = messages(records, SpecialTokens())
    assert len(found) == 2
    assert "tokens.num_cls: 32" in found[1]
    assert leaking_tokens(records[0], SpecialTokens(32, 32))


def test_everything_wrong_in_a_file_is_found_at_once(photo: str, tmp_path: Path) -> None:
    entries = [
        {"id": "good", "image": "a.jpg", "label": 1, "mask": "m.png"},
        {"id": "missing", "image": "none.jpg", "label": 0},
        {"id": "cut", "image": "cut.jpg", "label": 0},
        {"id": "size", "image": "a.jpg", "label": 1, "mask": "small.png"},
        {"id": "label", "image": "a.jpg", "label": "1"},
        {"id": "both", "image": "cut.jpg", "messages": [{"role": "assistant", "content": "<image><mask_9>"}]},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n{broken", encoding="utf-8")
    records, problems = check_file(path, TOKENS)
    assert len(records) == 5
    by_record = [
        (problem.record, problem.message.split(": ", 1)[1].split(";")[0].split(" (")[0]) for problem in problems
    ]
    assert by_record == [
        ("label", "label is neither 0 nor 1"),
        ("", "damaged JSON at column 2: Expecting property name enclosed in double quotes"),
        ("missing", "image file not found"),
        ("cut", "image is truncated or damaged"),
        ("size", "mask is 40x50 but the image is 40x60"),
        ("both", "unknown mask token"),
        ("both", "image is truncated or damaged"),
    ]
    _, without_pixels = check_file(path, TOKENS, check_pixels=False)
    assert without_pixels == problems  # headers and a look at the files' ends are enough for all of these
    with pytest.raises(InvalidDataError) as caught:
        validate_for_training(records, TOKENS)
    lines = str(caught.value).split("\n")
    assert lines[0] == "5 problems in 4 of 5 records"
    assert len(lines) == 6
    assert isinstance(caught.value, DataFormatError)


def test_long_lists_are_cut(photo: str) -> None:
    with pytest.raises(InvalidDataError) as caught:
        validate_for_training([record(photo, "<mask_9>")] * 30, TOKENS, check_pixels=False)
    assert str(caught.value).count("\n") == 21
    assert "and 10 more" in str(caught.value)


def test_empty_files_and_single_classes(photo: str, tmp_path: Path) -> None:
    (problem,) = check_records([], TOKENS)
    assert (problem.severity, "empty data set" in problem.message) == ("error", True)
    (tmp_path / "e.json").write_text("[]")
    assert [problem.message.split("; ")[0] for problem in check_file(tmp_path / "e.json", TOKENS)[1]] == [
        "(e.json): empty data set"
    ]
    (problem,) = validate_for_training([record(photo, RUN, label=0)], TOKENS)
    assert problem.severity == "warning"
    assert "only one class present" in problem.message


@pytest.mark.parametrize(
    ("answers", "leaks"),
    [
        ([RUN + '{"result": "fake"}'], False),
        ([" \n" + RUN], False),
        (["<image>" + RUN], False),
        (["no token"], False),
        (['{"result": real<cls>}'], True),
        (["<mask_1> - <mask_4>；结论：<cls>"], True),
        (["first", RUN], True),
        ([RUN, "then text"], False),
        ([RUN + "text", RUN], True),
    ],
)
def test_tokens_that_have_read_the_answer(photo: str, answers: list[str], leaks: bool) -> None:
    turns = [turn for answer in answers for turn in (Turn("user", "<image>?"), Turn("assistant", answer))]
    assert leaking_tokens(Record("r", (), (), tuple(turns)), TOKENS) is leaks


@pytest.mark.parametrize(
    "written",
    ["＜cls＞", "<CLS>", "< cls >", "<mask1>", "<mask-1>", "‹mask＿1›", "<mask_1..32>", "<Mask_3>", "〈cls〉",
     "<mask 7>", "<mask_1 - mask_32>", "＜mask_1＞"],
)  # fmt: skip
def test_a_misspelt_token_is_no_plain_text(photo: str, written: str) -> None:
    (problem,) = messages([record(photo, written + " fake")])
    assert "misspelt forensic token" in problem
    assert written in problem
    assert "<cls> and <mask_1>" in problem


@pytest.mark.parametrize(
    "written",
    ["<mask>", "List<Mask>", "《Mask》", "<mask_token>", "<mask" + " " * 20_000, "<class>", "<masked>", "a < clsx > b",
     "mask_1", "<cls", "1 < mask and mask > 0", "<masks>", "</mask_area>"],
)  # fmt: skip
def test_other_words_are_left_alone(photo: str, written: str) -> None:
    assert messages([record(photo, RUN + written)]) == []


def test_a_text_without_images_may_hold_anything() -> None:
    assert messages([Record("r", (), (), (Turn("user", "?"), Turn("assistant", "write <CLS> and <mask1>")))]) == []


def test_tokens_before_their_image_are_refused(photo: str) -> None:
    """A state that has not seen the image can say nothing of it."""

    def problems(*turns: tuple[str, str], num_images: int = 1) -> list[str]:
        images = (ImageInput(path=photo),) * num_images
        said = tuple(Turn(role, text) for role, text in turns)  # type: ignore[arg-type]
        return messages([Record("r", images, (ImageTarget(),) * num_images, said)])

    early = problems(("user", "look"), ("assistant", RUN), ("user", "<image>"), ("assistant", "fake"))
    assert len(early) == 2  # of cls and of mask
    assert "the cls tokens of image 1 stand before it" in early[0]
    second = problems(
        ("user", "<image>?"), ("assistant", RUN * 2), ("user", "<image>?"), ("assistant", "x"), num_images=2
    )
    assert "the cls tokens of image 2 stand before it" in second[0]
    each = (("user", "<image>?"), ("assistant", RUN), ("user", "<image>?"), ("assistant", RUN))
    assert problems(*each, num_images=2) == []
    assert problems(("user", "<image><image>?"), ("assistant", RUN + RUN), num_images=2) == []


def test_tokens_of_one_kind_alone_are_warned_about(photo: str) -> None:
    mask = str(Path(photo).parent / "m.png")
    found = check_records([record(photo, "<cls>fake", label=1, mask_path=mask), record(photo, RUN, label=0)], TOKENS)
    assert [problem.severity for problem in found] == ["warning"]
    assert "record 'r': a mask but no mask token" in found[0].message
    many = [record(photo, "<cls>fake", label=1, mask_path=mask)] * 3 + [record(photo, "<cls>real", label=0)] * 3
    (problem,) = check_records(many, TOKENS)  # one line, and not of authentic images, which need no mask
    assert "record 'r' and 2 others" in problem.message
    found = check_records([record(photo, "<mask_1> - <mask_4>", label=1), record(photo, RUN, label=0)], TOKENS)
    assert [problem.severity for problem in found] == ["warning"]
    assert "a label but no cls token" in found[0].message


@pytest.mark.parametrize(
    ("answer", "labels", "is_odd"),
    [
        (RUN + '{"result": "fake"}', [1], False),
        (RUN + '{"result": "real"}', [1], True),
        ('{"result": real<cls>, "mask": []<mask_1> - <mask_4>}', [1], True),
        ('{"result": real<cls>, "mask": []<mask_1> - <mask_4>}', [0], False),
        (RUN + '{"result": "fake"}', [None], False),
        (RUN + "it is real", [1], False),
        (RUN + RUN + '[{"result": "fake"}, {"result": "real"}]', [1, 0], False),
        (RUN + RUN + '[{"result": "real"}, {"result": "fake"}]', [1, 0], True),
        (RUN + RUN + '{"result": "real"}', [1, 0], False),
        (RUN + '{"result": "real-looking splice"}', [1], False),
        (RUN + 'write "result": "real" or "result": "fake"', [1], False),
        (RUN + RUN + '{"second": {"result": "real"}, "first": {"result": "fake"}}', [1, 0], False),
        (RUN + '{"result": real <cls>}', [1], True),
    ],
)
def test_an_answer_that_says_other_than_the_label_is_warned_about(
    photo: str, answer: str, labels: list[int | None], is_odd: bool
) -> None:
    odd = Record(
        id="r",
        images=(ImageInput(path=photo),) * len(labels),
        targets=tuple(ImageTarget(label=label) for label in labels),
        turns=(Turn("user", "<image>" * len(labels)), Turn("assistant", answer)),
    )
    found = [text for text in messages([odd]) if "disagree" in text]
    message = "record 'r': the answer's \"result\" and the label disagree; correct the one that is wrong"
    assert found == ([message] if is_odd else [])
    assert not [text for text in messages([odd], has_text=False) if "disagree" in text]


def test_the_words_of_a_template_of_ones_own_are_known(photo: str) -> None:
    """Also where one begins like another; without them the answer says nothing that could be compared."""
    words = {"real": 0, "fake": 1, "真实": 0, "篡改": 1, "篡改(局部)": 1}
    answers = {'"篡改"': True, '"篡改(局部)"': True, "篡改<cls>": True, '"真实"': False, '"real"': False}
    for answer, is_odd in answers.items():
        record = Record(
            id="r",
            images=(ImageInput(path=photo),),
            targets=(ImageTarget(label=0),),
            turns=(Turn("user", "<image>"), Turn("assistant", f'{RUN}{{"result": {answer}}}')),
        )
        assert any("disagree" in message for message in messages([record], words=words)) == is_odd, answer
        assert not any("disagree" in message for message in messages([record]))


def test_questions_about_one_of_two_images_are_left_alone(photo: str) -> None:
    turns = [Turn("user", "<image><image>first?"), Turn("assistant", '{"result": "fake"}')] * 2
    turns[2] = Turn("user", "sure?")
    two = Record(
        id="r", images=(ImageInput(path=photo),) * 2, targets=(ImageTarget(label=1), ImageTarget(label=0)),
        turns=tuple(turns),
    )  # fmt: skip
    assert not [text for text in messages([two]) if "disagree" in text]


def test_a_file_that_only_seems_cut_off_is_decoded_and_kept(photo: str, tmp_path: Path) -> None:
    """Some cameras write behind a JPEG's end; a file cut off in the middle is refused without decoding the others."""
    (tmp_path / "long.jpg").write_bytes(Path(photo).read_bytes() + b"\0" * 500)
    for name in ("whole.png", "whole.webp", "whole.bmp"):
        Image.open(photo).save(tmp_path / name)
    for name in ("long.jpg", "whole.png", "whole.webp", "whole.bmp"):
        assert messages([record(str(tmp_path / name), RUN)], check_pixels=False) == []
        assert seems_cut_off(tmp_path / name) is (name == "long.jpg")
    for name in ("whole.png", "whole.webp"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
        (message,) = messages([record(str(tmp_path / name), RUN)], check_pixels=False)
        assert "image is truncated or damaged" in message or "not an image that Pillow can open" in message


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (ImageTarget(label=1, polygons=()), "label 1 (tampered) with an empty mask"),
        (ImageTarget(label=1, polygons=(((4.0, 4.0), (20.0, 20.0), (12.0, 12.0)),)), "polygons without a pixel"),
        (ImageTarget(label=1, mask_size_hw=(40, 60)), "label 1 (tampered) with an empty mask"),
        (ImageTarget(label=0, polygons=(((4.0, 4.0), (20.0, 4.0), (20.0, 20.0)),)), "label 0 (real) with a mask"),
        (ImageTarget(label=0, polygons=()), ""),
        (ImageTarget(label=0, mask_size_hw=(40, 60)), ""),
        (ImageTarget(label=1, polygons=(((4.0, 4.0), (7.0, 4.0), (7.0, 7.0), (4.0, 7.0)),)), ""),
        (ImageTarget(label=1, polygons=(((4.0, 4.0), (40.0, 4.0), (40.0, 30.0)),)), ""),
        (ImageTarget(label=None, polygons=()), ""),
    ],
)
def test_what_contradicts_a_label_without_a_file_is_found_before_training(
    photo: str, target: ImageTarget, expected: str
) -> None:
    turns = (Turn("user", "<image>?"), Turn("assistant", RUN))
    bad = Record(id="r", source="t.jsonl:1", images=(ImageInput(path=photo),), targets=(target,), turns=turns)
    for check_pixels in (False, True):
        found = [problem.message for problem in check_records([bad], TOKENS, check_pixels=check_pixels)]
        errors = [message for message in found if "only one class" not in message]
        assert len(errors) == bool(expected)
        assert all(expected in message and "record 'r'" in message for message in errors)


def test_a_strip_is_refused_by_the_doctor_too(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 3)).save(tmp_path / "strip.png")
    (message,) = messages([record(str(tmp_path / "strip.png"), RUN)])
    assert "cannot be resized for the model" in message
    assert "within a factor of 200" in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_key_written_twice_is_named(photo: str, tmp_path: Path, suffix: str) -> None:
    """Of two labels the last would count, and nobody would know."""
    good = '{"id": "a", "image": "a.jpg", "label": 0}'
    bad = '{"id": "b", "image": "a.jpg", "label": 1, "label": 0}'
    lines = [good, bad]
    (tmp_path / f"d{suffix}").write_text(f"[{','.join(lines)}]" if suffix == ".json" else "\n".join(lines))
    records, problems = check_file(tmp_path / f"d{suffix}", TOKENS)
    assert [record.id for record in records] == ["a"]
    messages_found = [problem.message for problem in problems if problem.severity == "error"]
    assert len(messages_found) == 1
    assert "the key 'label' stands twice in one object, with different values" in messages_found[0]
    assert f"d{suffix}" in messages_found[0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ('{"id": "a", "label": 1,}', "remove the comma after the last entry"),
        ('{"id": "a"，"label": 1}', "ASCII character instead of the full-width ，"),
        ('{"id"："a"}', "ASCII character instead of the full-width ："),
        ("{'id': 'a'}", "double quotes"),
        ('{"id": “a”}', "ASCII character instead of the full-width “"),
        ('{"id": "a", "label": True}', "write true, false or null"),
        ('{"id": "a", // a comment\t"label": 1}', "JSON has none"),
        (r'{"id": "img\a.png"}', "write / instead of"),
    ],
)
def test_json_written_by_hand_is_told_what_to_type(tmp_path: Path, suffix: str, text: str, fix: str) -> None:
    (tmp_path / f"d{suffix}").write_text(f"[{text}]" if suffix == ".json" else text, encoding="utf-8")
    _, (problem, *_) = check_file(tmp_path / f"d{suffix}", TOKENS)
    assert "damaged JSON" in problem.message
    assert fix in problem.message


def test_a_windows_path_is_told_what_to_write(photo: str) -> None:
    (message,) = messages([record("D:\\data\\a.png", RUN)])
    assert "(write / instead of" in message


def test_a_key_given_twice_with_one_value_loses_nothing(photo: str, tmp_path: Path) -> None:
    line = '{"id": "a", "image": "a.jpg", "label": 0, "provenance": {"exif": {"Make": "x", "Make": "x"}}}'
    (tmp_path / "d.jsonl").write_text(line)
    assert [problem.severity for problem in check_file(tmp_path / "d.jsonl", TOKENS)[1]] == ["warning"]  # one class


def test_a_file_that_may_not_be_opened_is_one_line(photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert seems_cut_off(photo) is False
    (message,) = messages([record(photo, RUN)], check_pixels=False)
    assert "record 'r'" in message


@pytest.mark.parametrize(
    ("inverted", "upright", "is_said"), [(8, 0, True), (5, 4, True), (4, 5, False), (7, 0, False), (0, 9, False)]
)
def test_masks_that_seem_inverted_are_warned_about(
    photo: str, tmp_path: Path, inverted: int, upright: int, is_said: bool
) -> None:
    """Where most masks of tampered images mark most of the image; a few say nothing, nor do headers alone."""
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:40] = 255
    for name, pixels in (("upright", mask), ("inverted", 255 - mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    kinds = ["inverted"] * inverted + ["upright"] * upright
    records = [
        Record(
            id=f"r{number}",
            images=(ImageInput(path=photo),),
            targets=(ImageTarget(label=1, mask_path=str(tmp_path / f"{kind}.png")),),
        )
        for number, kind in enumerate(kinds)
    ]
    found = [text for text in messages(records) if "mask_pixels: dark" in text]
    assert len(found) == is_said
    if is_said:
        assert f"{inverted} of {len(kinds)} masks of tampered images mark more than half of the image" in found[0]
        assert "(median 75%)" in found[0]
    assert not [text for text in messages(records, check_pixels=False) if "mask_pixels" in text]
