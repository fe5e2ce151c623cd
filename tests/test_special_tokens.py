"""The vocabulary: spelling, shorthand, unknown tokens."""

from __future__ import annotations

import pytest

from finetune.errors import ConfigError
from finetune.special_tokens import SpecialTokens

TOKENS = SpecialTokens(num_cls=1, num_mask=4)
MASKS = "<mask_1><mask_2><mask_3><mask_4>"


def test_spelling() -> None:
    default = SpecialTokens()
    assert len(default.all) == 33
    assert default.run == "<cls>" + "".join(f"<mask_{i}>" for i in range(1, 33))
    assert SpecialTokens(3, 2).all == ("<cls_1>", "<cls_2>", "<cls_3>", "<mask_1>", "<mask_2>")


@pytest.mark.parametrize("tokens", [SpecialTokens(), SpecialTokens(1, 2), SpecialTokens(3, 2), SpecialTokens(2, 1)])
def test_a_vocabulary_shows_its_tokens(tokens: SpecialTokens) -> None:
    assert SpecialTokens.in_vocabulary({"a", *tokens.all}) == tokens
    assert SpecialTokens.in_vocabulary({"a", *tokens.cls}) is None
    assert SpecialTokens.in_vocabulary({"a", *tokens.mask}) is None


@pytest.mark.parametrize(("num_cls", "num_mask"), [(0, 1), (1, 0), (-1, 4)])
def test_a_run_is_never_empty(num_cls: int, num_mask: int) -> None:
    with pytest.raises(ConfigError, match="expected at least 1 of each"):
        SpecialTokens(num_cls, num_mask)


@pytest.mark.parametrize("dash", ["-", " - ", "–", "—", "~", "～", "至", " 到 ", "...", "…"])
def test_shorthand_is_written_out(dash: str) -> None:
    assert TOKENS.expand(f"区域: <mask_1>{dash}<mask_4>；易") == f"区域: {MASKS}；易"


def test_shorthand_of_the_spec() -> None:
    tokens = SpecialTokens(num_cls=32, num_mask=32)
    text = "伪造区域: <mask_1> - <mask_32>；取证难易判断: 易；真实性结论：<cls_1> - <cls_32>"
    masks, classes = "".join(tokens.mask), "".join(tokens.cls)
    assert tokens.expand(text) == f"伪造区域: {masks}；取证难易判断: 易；真实性结论：{classes}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<cls_1> - <cls_1>", "<cls>"),
        ("<mask_1> - <mask_2>", "<mask_1><mask_2>"),  # as written; validation reports the incomplete run
        ("<mask_1> - <cls_4>", "<mask_1> - <cls_4>"),
        ("<mask_2> - <mask_4>", "<mask_2> - <mask_4>"),
        ("<mask_1> and <mask_4>", "<mask_1> and <mask_4>"),
        ("<mask_1> - <mask_99999>", "<mask_1> - <mask_99999>"),
        (f"{MASKS} - x", f"{MASKS} - x"),
    ],
)
def test_shorthand_only_where_it_is_meant(text: str, expected: str) -> None:
    assert TOKENS.expand(text) == expected


def test_two_shorthands_in_one_text() -> None:
    assert TOKENS.expand("<mask_1>-<mask_4> <mask_1>-<mask_4>") == f"{MASKS} {MASKS}"


def test_unknown_tokens_are_named_once_in_order() -> None:
    assert TOKENS.unknown("<cls><mask_5> <cls_2><mask_5><mask_4><mask_0>") == ["<mask_5>", "<cls_2>", "<mask_0>"]
    assert TOKENS.unknown(TOKENS.run + " <image> <mask> <b>") == []
    assert SpecialTokens(2, 4).unknown("<cls><cls_2>") == ["<cls>"]


def test_find_and_strip() -> None:
    text = f'{{"result": real<cls>, "mask": []{MASKS}}}'
    assert [match.group() for match in TOKENS.find(text)] == ["<cls>", *TOKENS.mask]
    assert TOKENS.strip(text) == '{"result": real, "mask": []}'
