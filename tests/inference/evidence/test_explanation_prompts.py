"""Prompts of explanations: placeholders, braces of JSON, images, and which prompt an image gets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from finetune.errors import ConfigError
from finetune.inference.evidence.prompts import (
    PLACEHOLDERS,
    QUESTIONS,
    check_prompts,
    choose_prompt,
    fill_prompt,
    literal_prompt,
)
from finetune.inference.evidence.wording import evidence_text, gather_evidence, regions_text

SCORES = np.zeros((40, 80), np.float32)
SCORES[10:20, 0:20] = 0.8
FOUND = gather_evidence(0.875, 1, SCORES, (40, 80), threshold=0.4, heatmap_threshold=0.5)


def test_every_placeholder_is_filled_and_other_braces_stay() -> None:
    prompt = '<image>{verdict} {score} {percent} {threshold} {boxes} {width}x{height} {"a": {"b": 1}} {{score}} {1}'
    expected = '<image>tampered 0.88 88% 0.4 [[0, 10, 20, 20]] 80x40 {"a": {"b": 1}} {score} {1}'
    assert fill_prompt(prompt, FOUND, "en") == expected
    for name in PLACEHOLDERS:
        assert "{" not in fill_prompt(f"{{{name}}}", FOUND, "zh").replace("{evidence}", "")


def test_a_prompt_without_placeholder_gets_the_evidence() -> None:
    text = evidence_text(FOUND, "zh")
    assert fill_prompt("为什么？", FOUND, "zh") == f"<image>{text}\n为什么？"
    assert fill_prompt("<image>为什么？", FOUND, "zh") == f"<image>{text}\n为什么？"
    assert fill_prompt("<image><image>为什么？", FOUND, "zh", 2) == f"<image><image>{text}\n为什么？"
    assert fill_prompt("看<image>，为什么？", FOUND, "zh") == f"{text}\n看<image>，为什么？"
    assert fill_prompt("为什么{regions}？", FOUND, "zh", 2) == f"<image><image>为什么{regions_text(FOUND, 'zh')}？"


def test_the_users_own_words_are_not_filled_in() -> None:
    text = "{score} {{score}} {a: 1} }{"
    assert fill_prompt(literal_prompt(text), FOUND, "en").endswith("\n{score} {{score}} {a: 1} }{")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_built_in_prompts_are_sound_and_give_the_evidence(language: str) -> None:
    check_prompts(QUESTIONS[language], 1, "built in")  # type: ignore[index]
    for prompt in QUESTIONS[language]:  # type: ignore[index]
        text = fill_prompt(prompt, FOUND, language)  # type: ignore[arg-type]
        assert "[0, 10, 20, 20]" in text
        assert "0.88" in text


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{scores}", ["{scores}", "did you mean {score}?", "{heatmap_threshold}", "{{scores}}"]),
        ("{0x} {nothing_like_it}", ["{nothing_like_it}", "known: {evidence}"]),
        ("  ", ["empty prompt"]),
        ("<image><image>x", ["2 <image>", "1 images"]),
        ("<|im_end|>{score}", ["<|im_end|>", "only the program"]),
        ("<mask_1> {score}", ["<mask_1>"]),
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(prompt: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_prompts([prompt], 1, "user_prompt")
    for word in ["user_prompt", *words]:
        assert word in str(error.value)


def test_the_choice_depends_on_seed_and_id_alone_and_is_even() -> None:
    prompts = ["a", "b", "c"]
    names = [f"folder/{n}.jpg" for n in range(3000)]
    first = {name: choose_prompt(prompts, 0, name) for name in names}
    assert {name: choose_prompt(prompts, 0, name) for name in reversed(names)} == first
    assert all(900 < count < 1100 for count in Counter(first.values()).values())
    other = {name: choose_prompt(prompts, 1, name) for name in names}
    assert 0.2 < np.mean([other[name] == first[name] for name in names]) < 0.45
