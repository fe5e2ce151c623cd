"""Probability of a word at a place of a forced answer: `abnormal` against `normal`, region after region, with a cache.

The text around the words is given, so nothing is sampled. A verdict's probability is that of all tokens in which the
two continuations differ: a word may be several tokens, and a tokenizer may merge its end with the quote behind it.
Positions are counted here and handed to the model (M-RoPE: text behind an image goes on from the image's longest side,
not from its number of tokens), so no state of an earlier call has a part in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.data.regions.wording import ABNORMAL, NORMAL, answer_start

DECISION = 0.5
"""Probability from which `abnormal` is written before the next region is asked about; no threshold of the user's, so
that a threshold can be chosen afterwards."""


@dataclass(frozen=True)
class Fork:
    """One place of a verdict as token ids of the answer.

    Args:
        shared: what stands before the first token that differs.
        abnormal, normal: each word's own tokens, up to where both continuations are the same again.
    """

    shared: list[int]
    abnormal: list[int]
    normal: list[int]


def fork(tokenizer: Any, ids: Sequence[str], decided: Sequence[bool]) -> Fork:
    """The place of the next verdict about the regions `ids`, after those `decided`.

    Both answers are tokenised whole, each with its word and the text behind it, since the word's neighbours decide
    where its tokens end.
    """
    start = len(answer_start(ids, decided))
    found = []
    for is_abnormal, word in ((True, ABNORMAL), (False, NORMAL)):
        text = answer_start(ids, [*decided, is_abnormal])
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        behind = sum(first >= start + len(word) for first, _ in encoded["offset_mapping"])
        found.append((list(encoded["input_ids"]), behind))
    (abnormal, most), (normal, least) = found
    same, tail = common_length(abnormal, normal), 0
    while tail < min(most, least) and abnormal[-1 - tail] == normal[-1 - tail]:
        tail += 1
    return Fork(abnormal[:same], abnormal[same : len(abnormal) - tail], normal[same : len(normal) - tail])


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class CachedAnswers:
    """A batch of prompts in the model's cache, and the token ids that each row holds behind its own.

    Ids are taken back by masking their slots of the cache, so rows of a batch need not move together.

    Args:
        model: the model, in whatever wrapper. base: the model without one.
        inputs: of the prompts, left-padded, images included; every row ends with its prompt's last token.
    """

    def __init__(self, model: Any, base: Any, inputs: dict[str, Any]) -> None:
        self.model = model
        self.mask: Tensor = inputs["attention_mask"].clone()  # (B, S), 1 where a slot of the cache counts
        positions, _ = base.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=self.mask,
        )  # (3, B, T)
        output = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.next_position = positions.masked_fill(self.mask[None] == 0, -1).amax(dim=(0, 2)) + 1  # (B,)
        self.held: list[list[int]] = [[] for _ in range(len(self.mask))]
        self.slots: list[list[int]] = [[] for _ in range(len(self.mask))]

    def hold(self, wanted: Sequence[Sequence[int]], since: Sequence[int]) -> list[Tensor]:
        """Make each row hold the ids `wanted`, in one forward pass over what is new.

        Args:
            since: for each row the number of its ids behind which the next one's log-probabilities are asked for; at
                least 1 where anything is.

        Returns:
            For each row (n, V) float32 log-probabilities of the id behind the first `since`, `since` + 1, ... ids.
        """
        first = [
            min(common_length(held, ids), max(start - 1, 0))
            for held, ids, start in zip(self.held, wanted, since, strict=True)
        ]
        new = [list(ids[start:]) for ids, start in zip(wanted, first, strict=True)]
        length, past = max(map(len, new)), self.mask.shape[1]
        tokens = self.mask.new_zeros(len(new), length)
        fresh = self.mask.new_zeros(len(new), length)
        positions = self.next_position[:, None].repeat(1, length)  # (B, n)
        for row, (ids, start) in enumerate(zip(new, first, strict=True)):
            if taken_back := self.slots[row][start:]:
                self.mask[row, taken_back] = 0
            self.held[row], self.slots[row] = list(wanted[row]), self.slots[row][:start]
            self.slots[row] += range(past, past + len(ids))
            tokens[row, : len(ids)] = self.mask.new_tensor(ids)
            fresh[row, : len(ids)] = 1
            positions[row, : len(ids)] += torch.arange(start, start + len(ids), device=positions.device)
        self.mask = torch.cat([self.mask, fresh], dim=1)  # (B, S + n)
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions.expand(3, -1, -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        logits = output.logits.float()  # (B, n, V)
        return [
            logits[row, start - 1 - begin : len(ids)].log_softmax(dim=-1)
            for row, (ids, begin, start) in enumerate(zip(new, first, since, strict=True))
        ]


def verdict_scores(answers: CachedAnswers, tokenizer: Any, ids: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """P(abnormal) / (P(abnormal) + P(normal)) of every region of every row, each after the likelier words before it.

    Args:
        ids: for each row the ids of its regions, in the order of the answer.

    Returns:
        For each row id -> probability in [0, 1].
    """
    scores: list[dict[str, float]] = [{} for _ in ids]
    decided: list[list[bool]] = [[] for _ in ids]
    for place in range(max(map(len, ids))):
        forks = [
            fork(tokenizer, names, words) if place < len(names) else None
            for names, words in zip(ids, decided, strict=True)
        ]
        odds = log_odds(answers, forks)
        for row, (place_fork, value) in enumerate(zip(forks, odds, strict=True)):
            if place_fork is not None:
                score = float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)))
                scores[row][ids[row][place]] = score
                decided[row].append(score >= DECISION)
    return scores


def log_odds(answers: CachedAnswers, forks: Sequence[Fork | None]) -> list[float]:
    """log P(abnormal) - log P(normal) at each row's fork; 0 for a row without one, which stays as it is.

    One forward pass over what was decided since the last call and over `abnormal` without its last token; a second one
    where `normal` has several tokens too.
    """
    total = [0.0] * len(forks)
    wanted, since = _branches(answers, forks, lambda each: each.abnormal, 0)
    for row, (each, found) in enumerate(zip(forks, answers.hold(wanted, since), strict=True)):
        if each is not None:
            first = float(found[0, each.normal[0]])  # both words begin at the same place
            total[row] = sum(float(found[k, token]) for k, token in enumerate(each.abnormal)) - first
    if any(each is not None and len(each.normal) > 1 for each in forks):
        wanted, since = _branches(answers, forks, lambda each: each.normal, 1)
        for row, (each, found) in enumerate(zip(forks, answers.hold(wanted, since), strict=True)):
            if each is not None:
                total[row] -= sum(float(found[k, token]) for k, token in enumerate(each.normal[1:]))
    return total


def _branches(
    answers: CachedAnswers, forks: Sequence[Fork | None], word: Callable[[Fork], list[int]], start: int
) -> tuple[list[list[int]], list[int]]:
    """What the rows are to hold so that a word's tokens from number `start` on can be read, and since which id."""
    wanted, since = [], []
    for held, each in zip(answers.held, forks, strict=True):
        wanted.append(held if each is None else each.shared + word(each)[:-1])
        since.append(len(held) + 1 if each is None else len(each.shared) + start)
    return wanted, since
