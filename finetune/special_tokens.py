"""The only place that spells the forensic tokens: `<cls>` (or `<cls_1>`..`<cls_n>`) and `<mask_1>`..`<mask_n>`.

Text goes in and out; ids belong to the tokenizer. A *run* is every token in order; it stands once per image.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container
from dataclasses import dataclass

from finetune.errors import ConfigError

IMAGE_PLACEHOLDER = "<image>"
"""Stands anywhere in a message's text for the next image of the record."""

IGNORE_INDEX = -100
"""Label of a position, image or pixel that supervises nothing (PyTorch's convention)."""

_FORENSIC_TOKEN = re.compile(r"<cls>|<cls_\d+>|<mask_\d+>")
_SHORTHAND = re.compile(  # 4 digits: a bound on size
    r"<(cls|mask)_1>\s*(?:-|–|—|－|~|～|〜|至|到|\.\.\.|…)\s*<\1_(\d{1,4})>"
)
_NEAR_MISS = re.compile(  # repetitions are bounded: text may hold anything
    r"[<＜‹〈]\s{0,3}(?:cls|(?:cls|mask)[\s_＿.–—－-]{0,3}\d{1,4}(?:[\s.~～…–—－-]{1,5}(?:(?:cls|mask)_)?\d{1,4})?)"
    r"\s{0,3}[>＞›〉]",
    re.IGNORECASE,
)
"""`<CLS>`, `< cls >`, `＜cls＞`, `<mask1>`, `<mask-1>`, `<mask_1..32>`: one of ours was meant. Not `<mask>` and
other words without a number, which other people's texts hold."""


@dataclass(frozen=True)
class SpecialTokens:
    """The forensic vocabulary of one model.

    Args:
        num_cls: number of classification tokens, >= 1; one token is spelled `<cls>`, several `<cls_1>`..`<cls_n>`.
        num_mask: number of mask tokens, >= 1, spelled `<mask_1>`..`<mask_n>`.
    """

    num_cls: int = 1
    num_mask: int = 32

    def __post_init__(self) -> None:
        if self.num_cls < 1 or self.num_mask < 1:
            raise ConfigError(
                f"tokens.num_cls is {self.num_cls} and tokens.num_mask {self.num_mask}; expected at least 1 of each"
            )

    @classmethod
    def in_vocabulary(cls, vocabulary: Container[str]) -> SpecialTokens | None:
        """The tokens a tokenizer's vocabulary holds; None where it lacks a kind."""

        def count(kind: str) -> int:
            return next(i for i in itertools.count() if f"<{kind}_{i + 1}>" not in vocabulary)

        num_cls, num_mask = count("cls") or int("<cls>" in vocabulary), count("mask")
        return cls(num_cls, num_mask) if num_cls and num_mask else None

    @property
    def cls(self) -> tuple[str, ...]:
        """Classification tokens in order."""
        return ("<cls>",) if self.num_cls == 1 else tuple(f"<cls_{i}>" for i in range(1, self.num_cls + 1))

    @property
    def mask(self) -> tuple[str, ...]:
        """Mask tokens in order."""
        return tuple(f"<mask_{i}>" for i in range(1, self.num_mask + 1))

    @property
    def all(self) -> tuple[str, ...]:
        """Every forensic token: cls first, then mask. The order in which they enter the tokenizer."""
        return self.cls + self.mask

    @property
    def run(self) -> str:
        """`<cls><mask_1>...<mask_n>`: what stands once per image in the `tokens_first` layout."""
        return "".join(self.all)

    def expand(self, text: str) -> str:
        """Write the shorthand `<mask_1> - <mask_32>` (and `<cls_1> - <cls_n>`) out as the whole run of tokens.

        The last index is kept as written; `unknown` reports it when this vocabulary is smaller.
        """

        def write_out(match: re.Match[str]) -> str:
            kind, last = match.group(1), int(match.group(2))
            if kind == "cls" and last == 1:
                return "<cls>"
            return "".join(f"<{kind}_{i}>" for i in range(1, last + 1))

        return _SHORTHAND.sub(write_out, text)

    def unknown(self, text: str) -> list[str]:
        """Forensic-looking tokens of `text` that this vocabulary does not hold, in order of first appearance."""
        known = set(self.all)
        return list(dict.fromkeys(token for token in _FORENSIC_TOKEN.findall(text) if token not in known))

    @staticmethod
    def misspelt(text: str) -> list[str]:
        """What nearly is a forensic token, in order of first appearance: a model would read it as plain text."""
        found = [match.group() for match in _NEAR_MISS.finditer(text)]
        return list(dict.fromkeys(token for token in found if not _FORENSIC_TOKEN.fullmatch(token)))

    def strip(self, text: str) -> str:
        """`text` without any forensic token."""
        return _FORENSIC_TOKEN.sub("", text)

    @staticmethod
    def find(text: str) -> list[re.Match[str]]:
        """Every forensic-looking token of `text`, as regex matches in reading order."""
        return list(_FORENSIC_TOKEN.finditer(text))
