"""Strict parsing of generated answers, and the two agreements that must not be mixed up."""

import pytest

from finetune.metrics.text import ParsedAnswer, parse_answer, text_metrics
from finetune.special_tokens import SpecialTokens

FAKE = '{"result": "fake", "mask": [[1, 2, 3.5], [4, 5, 6], [0,9,9,0], [0,0,9,9]], "evidence": "边缘\\u5f02常"}'
REAL = '{"result": "real", "mask": [], "evidence": ""}'


def test_a_good_answer_is_read() -> None:
    answer = parse_answer(FAKE)
    assert answer is not None
    assert (answer.label, answer.evidence) == (1, "边缘异常")
    assert answer.polygons == (((1, 4), (2, 5), (3.5, 6)), ((0, 0), (9, 0), (9, 9), (0, 9)))
    assert parse_answer(REAL) == ParsedAnswer(0, (), "")


def test_forensic_tokens_and_outer_space_do_not_matter() -> None:
    assert parse_answer(f" {SpecialTokens().run}{REAL}\n") == parse_answer(REAL)


def test_required_keys_are_a_choice() -> None:
    assert parse_answer('{"result": "real"}') is None
    assert parse_answer('{"result": "real"}', required=()) == ParsedAnswer(0, (), "")
    assert parse_answer('{"result": "real", "mask": []}', required=("mask", "evidence")) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "这张图像是伪造的",
        f"```json\n{REAL}\n```",
        f"答：{REAL}",
        REAL + REAL,
        REAL[:-1],
        f"[{REAL}]",
        '{"result": real<cls>, "mask": []}',  # the text_first layout is no JSON
        "{'result': 'real', 'mask': []}",
        '{"result": "Real", "mask": []}',
        '{"result": 1, "mask": []}',
        '{"result": ["real"], "mask": []}',
        '{"result": "real", "result": "fake", "mask": []}',
        '{"result": "real", "mask": [], "evidence": null}',
        '{"result": "fake", "mask": [[1, 2, 3]]}',
        '{"result": "fake", "mask": [[1, 2, 3], [1, 2]]}',
        '{"result": "fake", "mask": [[1, 2], [1, 2]]}',
        '{"result": "fake", "mask": [[1, 2, NaN], [1, 2, 3]]}',
        '{"result": "fake", "mask": [[1, 2, 1e999], [1, 2, 3]]}',
        '{"result": "fake", "mask": [[1, 2, "3"], [1, 2, 3]]}',
        '{"result": "fake", "mask": [[1, 2, true], [1, 2, 3]]}',
        '{"result": "fake", "mask": null}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_not_parsed(text: str) -> None:
    assert parse_answer(text) is None


def test_agreement_with_the_head_is_not_accuracy() -> None:
    got = text_metrics([FAKE, FAKE, REAL, "fake"], head_labels=[1, 0, 0, 1], true_labels=[0, 0, 0, 1])
    assert got == pytest.approx(
        {"parse_rate": 0.75, "label_agreement": 2 / 3, "label_accuracy": 1 / 3, "n": 4, "n_parsed": 3}
    )


def test_unknown_verdicts_and_truths_are_left_out() -> None:
    got = text_metrics([FAKE, REAL], head_labels=[None, 0], true_labels=[None, None])
    assert (got["label_agreement"], got["label_accuracy"]) == (1.0, None)
    assert text_metrics([REAL], [0])["label_accuracy"] is None
    empty = text_metrics([], [])
    assert (empty["parse_rate"], empty["label_agreement"], empty["n"]) == (None, None, 0)


def test_lists_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="one label per text"):
        text_metrics([REAL], [0, 1])
