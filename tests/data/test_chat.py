"""Templates, layouts, inserted tokens, and the rendering of ids with their loss mask."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.data.chat import (
    Segment,
    conversation,
    encode,
    polygon_text,
    prompt,
    question_turns,
    render_answer,
    segments,
)
from finetune.data.template import LAYOUTS, Template, load_template, template_problem
from finetune.errors import ConfigError, DataFormatError
from finetune.schema import ImageInput, ImageTarget, Record, Turn
from finetune.special_tokens import SpecialTokens

TOKENS = SpecialTokens()
MASKS = "".join(TOKENS.mask)
SQUARE = ((10.0, 20.0), (60.4, 20.0), (60.0, 79.6))
TRIANGLE = ((1.0, 2.0), (3.0, 2.0), (2.0, 5.0))
FAKE = ImageTarget(label=1, polygons=(SQUARE, TRIANGLE), evidence='edge "too" sharp\n发际线')
REAL = ImageTarget(label=0)


@pytest.fixture(scope="module")
def zh() -> Template:
    return load_template("zh")


def record(*targets: ImageTarget, turns: tuple[tuple[str, str], ...] = (), name: str = "r") -> Record:
    images = tuple(ImageInput(path=f"{i}.png") for i in range(len(targets)))
    return Record(name, images, targets, tuple(Turn(role, text) for role, text in turns))  # type: ignore[arg-type]


# ---- templates ----


def test_prompt_of_the_spec_is_the_first_phrasing(zh: Template) -> None:
    assert zh.prompts[0] == "请分析下面这张图片的真伪<image>, 用json格式输出"
    assert prompt(zh, 1) == zh.prompts[0]


def test_phrasing_is_fixed_by_the_record(zh: Template) -> None:
    chosen = [prompt(zh, 1, key=f"record {i}") for i in range(40)]
    assert chosen == [prompt(zh, 1, key=f"record {i}") for i in range(40)]
    assert set(chosen) == set(zh.prompts)
    assert prompt(zh, 3).count("<image><image><image>") == 1


def test_a_record_is_asked_in_the_language_it_answers_in(zh: Template, tmp_path: Path) -> None:
    """`provenance.language` against a built-in template; a template of the user's own holds for every record."""
    english = load_template("en")
    saved = Template.from_dict(json.loads(json.dumps(zh.to_dict())))  # as a trained folder brings it along
    own_file = tmp_path / "own.yaml"
    own_file.write_text(yaml.safe_dump({k: v for k, v in zh.to_dict().items() if k != "name"}), encoding="utf-8")
    own = load_template(str(own_file))
    for name, language, given, expected in (
        ("a", "en", zh, english),
        ("b", "en", saved, english),
        ("c", "zh", english, zh),
        ("d", "zh", zh, zh),
        ("e", "en", own, own),
        ("f", "fr", zh, zh),
        ("g", None, english, english),
        ("h", ["en"], zh, zh),
    ):
        provenance = {} if language is None else {"language": language}
        for targets in ((REAL,), (REAL, FAKE)):
            asked = dataclasses.replace(record(*targets, name=name), provenance=provenance)
            question, answer = conversation(asked, given, TOKENS, "tokens_first")
            assert question.content == prompt(expected, len(targets), key=name)
            assert answer.content == render_answer(asked, expected, TOKENS, "tokens_first")
            assert question_turns(asked, given) == (Turn("user", prompt(expected, len(targets))),)
    written = dataclasses.replace(record(REAL, turns=(("user", "<image>真伪？"),)), provenance={"language": "en"})
    assert question_turns(written, zh) == written.turns


def test_text_first_is_verbatim_the_answer_of_the_spec(zh: Template) -> None:
    """`{"result": real<cls>, "mask": [[x...], [y...], ...]<mask_1>...<mask_32>}`: no quotes, tokens inside."""
    answer = render_answer(record(REAL), zh, TOKENS, "text_first")
    assert answer == '{"result": real<cls>, "mask": []' + MASKS + "}"
    answer = render_answer(record(FAKE), zh, TOKENS, "text_first")
    coordinates = "[[10, 60, 60], [20, 20, 80], [1, 3, 2], [2, 2, 5]]"
    assert answer == '{"result": fake<cls>, "mask": ' + coordinates + MASKS + "}"


def test_tokens_first_is_the_run_and_strict_json(zh: Template) -> None:
    answer = render_answer(record(FAKE), zh, TOKENS, "tokens_first")
    assert answer.startswith(TOKENS.run + "{")
    parsed = json.loads(answer.removeprefix(TOKENS.run))
    assert parsed == {
        "result": "fake",
        "mask": [[10, 60, 60], [20, 20, 80], [1, 3, 2], [2, 2, 5]],
        "evidence": 'edge "too" sharp\n发际线',
    }
    assert list(parsed) == ["result", "mask", "evidence"]
    real = json.loads(render_answer(record(REAL), zh, TOKENS, "tokens_first").removeprefix(TOKENS.run))
    assert real == {"result": "real", "mask": [], "evidence": zh.evidence[0]}


def test_polygons_of_the_processed_image_win(zh: Template) -> None:
    answer = render_answer(record(FAKE), zh, TOKENS, "tokens_first", polygons=[[TRIANGLE]])
    assert '"mask": [[1, 3, 2], [2, 2, 5]]' in answer


def test_several_images_are_a_list_with_the_runs_in_front(zh: Template) -> None:
    answer = render_answer(record(REAL, FAKE), zh, TOKENS, "tokens_first")
    assert answer.startswith(TOKENS.run * 2 + "[{")
    assert [item["result"] for item in json.loads(answer.removeprefix(TOKENS.run * 2))] == ["real", "fake"]
    inline = render_answer(record(REAL, FAKE), zh, TOKENS, "text_first")
    assert [match.group() for match in TOKENS.find(inline)] == list(TOKENS.all) * 2
    assert inline.startswith('[{"result": real<cls>, "mask": []<mask_1>')


def test_image_without_label_cannot_be_answered(zh: Template) -> None:
    with pytest.raises(DataFormatError, match=r"record 'r'.*image 2 has neither a label nor a written answer"):
        render_answer(record(REAL, ImageTarget()), zh, TOKENS, "tokens_first")


def test_polygon_text() -> None:
    assert polygon_text([]) == "[]"
    assert polygon_text([SQUARE]) == "[[10, 60, 60], [20, 20, 80]]"


def template_tree() -> dict[str, Any]:
    return {
        "system": "s",
        "prompts": ["<image>?"],
        "prompts_multi": ["{images}?"],
        "result": {0: "ok", 1: "bad"},
        "evidence": {0: "none", 1: "some"},
        "answers": {"tokens_first": "{tokens}{result}", "text_first": "{result}{cls}{mask_tokens}"},
    }


def test_template_from_a_file(tmp_path: Path, zh: Template) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(template_tree()), encoding="utf-8")
    own = load_template(str(path))
    assert render_answer(record(FAKE), own, TOKENS, "tokens_first") == TOKENS.run + "bad"
    assert Template.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    assert Template.from_dict(json.loads(json.dumps(zh.to_dict()))) == zh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "expected the keys"),
        ({"result": {0: "real"}}, "'result' needs one entry for 0"),
        ({"result": {0: "real", 1: "real "}}, "expected two different words"),
        ({"result": {0: "", 1: "fake"}}, "expected two different words"),
        ({"answers": {"tokens_first": "x"}}, "needs the layouts tokens_first, text_first"),
        ({"answers": {"tokens_first": "{tokn}", "text_first": ""}}, "unknown placeholder 'tokn'; known: cls, "),
        ({"answers": {"tokens_first": '{"a": 1', "text_first": ""}}, "a literal brace is {{ or }}"),
        ({"prompts": ["no image"]}, "needs exactly one <image>"),
        ({"prompts": []}, "expected a list of texts"),
        ({"prompts": "<image>"}, "expected a list of texts"),
        ({"prompts_multi": ["<image><image>"]}, "needs exactly one {images}"),
        ({"prompts_multi": ["{images}<image>"]}, "needs exactly one {images}"),
        ({"system": None}, "system is None; expected a text"),
        ({"system": "look at <image>"}, "system holds <image>"),
        ({"prompts": ["<image>?", "<image> <cls>?"]}, "prompts.1 holds <cls>"),
        ({"evidence": {0: "none", 1: "at <mask_1>"}}, "evidence.1 holds <mask_1>"),
        ({"evidence": {0: "none<|im_end|>", 1: "some"}}, "evidence.0 holds <|im_end|>"),
        ({"evidence": ["none", "some"]}, "'evidence' needs one entry for 0"),
        ({"result": {0: False, 1: True}}, "result.0 is False; expected a text, in quotes"),
        ({"answers": {"tokens_first": "<cls>{tokens}", "text_first": ""}}, "answers.tokens_first holds <cls>"),
        ({"answers": {"tokens_first": "{result!z}", "text_first": ""}}, "answers.tokens_first: "),
        ({"answers": {"tokens_first": "{result:d}", "text_first": ""}}, "answers.tokens_first: "),
    ],
)
def test_mistakes_in_a_template(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**template_tree(), **change}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_template(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "answer", "found"),
    [
        ("tokens_first", "{result}", "no forensic token; expected {tokens}"),
        ("tokens_first", "{cls}{mask_tokens}{result}", "{cls} {mask_tokens}; expected {tokens}"),
        ("tokens_first", "{tokens}{result}{tokens}", "{tokens} {tokens}; expected {tokens}"),
        ("text_first", "{result}", "no forensic token; expected {cls} {mask_tokens}"),
        ("text_first", "{result}{cls}", "{cls}; expected {cls} {mask_tokens}"),
        ("text_first", "{tokens}", "{tokens}; expected {cls} {mask_tokens}"),
    ],
)
def test_template_whose_answers_lack_tokens_trains_no_head(zh: Template, layout: Any, answer: str, found: str) -> None:
    """Only the layout in use is asked; {{cls}} is a literal brace, no placeholder."""
    other = dataclasses.replace(zh, answers={**zh.answers, layout: answer + " {{tokens}}"})
    problem = template_problem(other, layout)
    assert problem is not None
    assert f"data.template zh: answers.{layout} holds {found}, once" in problem
    assert "heads.enabled: false" in problem
    (in_use,) = set(LAYOUTS) - {layout}
    assert template_problem(other, in_use) is None


def test_built_in_templates_carry_their_tokens() -> None:
    assert [template_problem(load_template(name), layout) for name in ("zh", "en") for layout in LAYOUTS] == [None] * 4


def test_unreadable_templates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fr' is not built in; choose zh, en"):
        load_template("fr")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_template(str(tmp_path / "bad.yaml"))


# ---- conversations ----


def test_record_without_turns_is_rendered(zh: Template) -> None:
    turns = conversation(record(FAKE), zh, TOKENS, "tokens_first")
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert turns[0].content in zh.prompts
    assert turns[1].content.startswith(TOKENS.run)


def test_shorthand_is_written_out_in_answers_only(zh: Template) -> None:
    tokens = SpecialTokens(32, 32)
    user, answer = "what is <mask_1> - <mask_32>?", "区域: <mask_1> - <mask_32>；结论：<cls_1> - <cls_32>"
    turns = conversation(record(FAKE, turns=(("user", user), ("assistant", answer))), zh, tokens, "tokens_first")
    assert turns[0].content == user
    assert turns[1].content == f"区域: {''.join(tokens.mask)}；结论：{''.join(tokens.cls)}"


@pytest.mark.parametrize(
    ("layout", "expected"), [("tokens_first", TOKENS.run + "fake"), ("text_first", "fake" + TOKENS.run)]
)
def test_labelled_answer_without_tokens_gains_them(zh: Template, layout: Any, expected: str) -> None:
    turns = (("user", "<image> real?"), ("assistant", "fake"))
    assert conversation(record(FAKE, turns=turns), zh, TOKENS, layout)[1].content == expected


def test_tokens_stand_where_every_image_has_been_seen(zh: Template) -> None:
    turns = (("user", "<image>"), ("assistant", "first"), ("user", "<image>"), ("assistant", "a"), ("assistant", "b"))
    found = conversation(record(REAL, FAKE, turns=turns), zh, TOKENS, "tokens_first")
    assert [turn.content for turn in found] == ["<image>", "first", "<image>", TOKENS.run * 2 + "a", "b"]


@pytest.mark.parametrize(
    ("targets", "answer"),
    [
        ((FAKE,), "<mask_1> - <mask_32> the user's own place<cls>"),
        ((ImageTarget(),), "nothing is known about this image"),
        ((), "no image at all"),
    ],
)
def test_no_tokens_are_added(zh: Template, targets: tuple[ImageTarget, ...], answer: str) -> None:
    turns = (("user", "<image>" * len(targets)), ("assistant", answer))
    found = conversation(record(*targets, turns=turns), zh, TOKENS, "tokens_first")
    assert found[1].content == TOKENS.expand(answer)


def test_no_place_for_tokens_is_said_once(zh: Template, caplog: pytest.LogCaptureFixture) -> None:
    told = record(FAKE, turns=(("assistant", "<image>是伪造图像"),), name="only-answer")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert conversation(told, zh, TOKENS, "tokens_first") == told.turns
    assert caplog.text.count("record 'only-answer' has labels but no assistant turn after its last image") == 1


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((("user", "<image> a?"), ("assistant", "x")), [("user", "<image> a?")]),
        (
            (("system", "s"), ("user", "<image>"), ("assistant", "x"), ("user", "y")),
            [("system", "s"), ("user", "<image>")],
        ),
        ((("assistant", "<image>真<image>假"),), [("user", "<image><image>")]),
        (
            (("user", "<image>"), ("assistant", "fake"), ("user", "<image>?"), ("assistant", "x")),
            [("user", "<image>"), ("user", "<image>?")],
        ),
    ],
)
def test_question_holds_no_answer(zh: Template, turns: Any, expected: list[tuple[str, str]]) -> None:
    targets = (REAL,) * sum(text.count("<image>") for _, text in turns)
    found = question_turns(record(*targets, turns=turns), zh)
    assert [(turn.role, turn.content) for turn in found] == expected


def test_question_of_a_rendered_record_does_not_depend_on_its_name(zh: Template) -> None:
    assert question_turns(record(REAL, name="a"), zh) == question_turns(record(FAKE, name="b"), zh)


# ---- segments and ids ----


def test_segments_are_the_chat_format() -> None:
    turns = (Turn("user", "<image>a?"), Turn("assistant", "b<image>c"), Turn("user", "d"))
    pieces = segments(turns, "S", for_generation=True)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    assert "".join(piece.text for piece in pieces) == (
        "<|im_start|>system\nS<|im_end|>\n"
        f"<|im_start|>user\n{vision}a?<|im_end|>\n"
        f"<|im_start|>assistant\nb{vision}c<|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [piece.text for piece in pieces if piece.is_supervised] == ["b", "c", "<|im_end|>"]


def test_own_system_turn_replaces_the_template_s() -> None:
    text = "".join(piece.text for piece in segments((Turn("system", "mine"), Turn("user", "a")), "S"))
    assert text == "<|im_start|>system\nmine<|im_end|>\n<|im_start|>user\na<|im_end|>\n"


def test_image_tokens_are_repeated_per_image_and_never_supervised(tiny_dir: Path) -> None:
    from finetune.models.loading import add_forensic_tokens, load_processor

    tokenizer = load_processor(tiny_dir).tokenizer
    add_forensic_tokens(tokenizer, TOKENS)
    turns = (Turn("user", "<image>?"), Turn("assistant", f"{TOKENS.run}yes <image> and no"))
    ids, labels = encode(segments(turns, "S"), tokenizer, [3, 5])
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert ids.count(pad) == 8
    assert pad not in labels
    assert tokenizer.decode([label for label in labels if label != -100]) == f"{TOKENS.run}yes  and no<|im_end|>"
    rendered = tokenizer.decode(ids)
    assert "<|vision_start|>" + "<|image_pad|>" * 3 + "<|vision_end|>?" in rendered
    assert "yes <|vision_start|>" + "<|image_pad|>" * 5 + "<|vision_end|> and" in rendered
    assert encode([Segment("a", True), Segment("b", True)], tokenizer, [])[0] == tokenizer.encode("ab")
