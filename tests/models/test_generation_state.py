"""The state read at a forensic token is one and the same in a full forward pass and while generating with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import collate, forward, load, plain_inputs, record_named, samples_of
from torch import Tensor

from finetune.data.dataset import Sample
from finetune.models.features import gather_states, locate_runs
from finetune.models.loading import Bundle

ATOL = 2e-5
"""Measured on CPU in fp32: below 1e-5 for states of size 1; 1-D positions move the text logits by more than 0.02."""


@pytest.fixture(scope="module")
def bundle(tied: Path) -> Bundle:
    return load(tied)


def token_states(bundle: Bundle, input_ids: Tensor, states: Tensor, images: list[int]) -> Tensor:
    ids = bundle.tokenizer.convert_tokens_to_ids(list(bundle.tokens.all))
    return gather_states(states, locate_runs(input_ids, ids, images))


def prompts(samples: list[Sample], length_of: Any) -> list[Sample]:
    """Samples cut after `length_of(sample)` tokens."""
    for sample in samples:
        sample.input_ids = sample.input_ids[: length_of(sample)]
        sample.labels = [-100] * len(sample.input_ids)
    return samples


def test_prefill_of_generation_has_the_states_of_the_full_sequence(bundle: Bundle, photo_records: Path) -> None:
    """`tokens_first`: the tokens stand in the prompt; left padding, one and two images of different sizes."""
    records = record_named(photo_records, "tampered_150x211", "pair")
    samples = samples_of(bundle, records)
    batch = collate(bundle, samples)
    full = forward(bundle.model, batch, output_hidden_states=True)
    expected = token_states(bundle, batch["input_ids"], full.hidden_states[-1], [1, 2])
    last_mask = bundle.tokenizer.convert_tokens_to_ids(bundle.tokens.mask[-1])
    prompt = prompts(samples, lambda s: len(s.input_ids) - s.input_ids[::-1].index(last_mask))
    inputs = plain_inputs(collate(bundle, prompt, "left"))
    captured: list[Any] = []
    handle = bundle.model.register_forward_hook(lambda _m, _i, output: captured.append(output))
    result = bundle.model.generate(
        **inputs,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    handle.remove()
    states = token_states(bundle, inputs["input_ids"], result.hidden_states[0][-1], [1, 2])
    torch.testing.assert_close(states, expected, rtol=0, atol=ATOL)
    assert expected.std() > 0.5
    torch.testing.assert_close(captured[0].cls_logits, full.cls_logits, rtol=0, atol=ATOL)
    assert [output.cls_logits is None for output in captured] == [False, True]  # heads run in the prefill only


def test_tokens_fed_one_by_one_have_the_states_of_the_full_sequence(bundle: Bundle, photo_records: Path) -> None:
    """`text_first`: `generate` writes a given answer token by token, from a left-padded batch."""
    samples = samples_of(bundle, record_named(photo_records, "real_112x252", "pair"), layout="text_first")
    batch = collate(bundle, samples)
    states = forward(bundle.model, batch, output_hidden_states=True).hidden_states[-1]
    expected = token_states(bundle, batch["input_ids"], states, [1, 2])
    starts = [next(i for i, label in enumerate(sample.labels) if label != -100) for sample in samples]
    answers = [sample.input_ids[start:] for sample, start in zip(samples, starts, strict=True)]
    length = max(map(len, answers))
    answers = [[*answer, *[bundle.tokenizer.pad_token_id] * (length - len(answer))] for answer in answers]
    lengths = iter(starts)
    inputs = plain_inputs(collate(bundle, prompts(samples, lambda _: next(lengths)), "left"))
    width = inputs["input_ids"].shape[1]
    result = bundle.model.generate(
        **inputs,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda row, ids: [answers[row][len(ids) - width]],
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert result.sequences[:, width:].tolist() == answers
    generated = torch.cat([step[-1] for step in result.hidden_states], dim=1)
    found = token_states(bundle, result.sequences[:, :-1], generated, [1, 2])
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    assert bool((bundle.base.model.rope_deltas < 0).all())  # an image takes fewer positions than tokens


def test_generate_continues_like_the_full_forward(bundle: Bundle, photo_records: Path) -> None:
    """Greedy tokens are the argmax of a full pass over prompt and continuation, with and without images."""
    for name in ("tampered_224x196", "text"):
        samples = samples_of(bundle, record_named(photo_records, name))
        first = next(i for i, label in enumerate(samples[0].labels) if label != -100)
        inputs = plain_inputs(collate(bundle, prompts(samples, lambda s, n=first: n)))
        sequences = bundle.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        inputs |= {"input_ids": sequences, "attention_mask": torch.ones_like(sequences)}
        new = torch.zeros_like(sequences[:, first:])
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], new], dim=1)
        with torch.no_grad():
            logits = bundle.model(**inputs).logits
        ends = [bundle.tokenizer.eos_token_id, bundle.tokenizer.pad_token_id]  # `min_new_tokens` forbids them
        logits[..., ends] = -torch.inf
        assert sequences[0, first:].tolist() == logits[0, first - 1 : -1].argmax(dim=-1).tolist()


def test_forward_after_generation_has_fresh_positions(bundle: Bundle, photo_records: Path) -> None:
    """`rope_deltas` left on the model by another batch does not enter a forward pass without a cache."""
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, "text")))
    bundle.base.model.rope_deltas = None
    before = forward(bundle.model, batch).logits
    forward(bundle.model, collate(bundle, samples_of(bundle, record_named(photo_records, "pair", "real_84x140"))))
    assert torch.equal(forward(bundle.model, batch).logits, before)


def test_without_token_types_the_positions_are_wrong(bundle: Bundle, photo_records: Path) -> None:
    """The trap that makes `mm_token_type_ids` part of every batch: leaving it out is silent."""
    batch = collate(bundle, samples_of(bundle, record_named(photo_records, "tampered_224x196")))
    right = forward(bundle.model, batch)
    wrong = forward(bundle.model, batch, mm_token_type_ids=None)
    assert (right.logits - wrong.logits).abs().max() > 1000 * ATOL
