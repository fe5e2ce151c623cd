"""Flip test: under `tokens_first` nothing the heads return depends on the answer; under `text_first` it leaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_helpers import STREAM, collate, forward, head_outputs, load, record_named, samples_of

from finetune.config import DataConfig
from finetune.data.dataset import ForensicDataset
from finetune.models.loading import Bundle
from finetune.schema import ImageTarget, Record, Turn

POLYGON = ((5.0, 5.0), (60.0, 5.0), (60.0, 40.0))


@pytest.fixture(scope="module")
def bundle(tied: Path) -> Bundle:
    return load(tied, layer="weighted", noise_residual=STREAM)


def flipped(record: Record) -> Record:
    """The same images with the opposite word, other polygons and another evidence sentence: a longer answer."""
    targets = tuple(
        ImageTarget(label=1 - t.label, polygons=(POLYGON, POLYGON), evidence="something else entirely")
        if t.label == 0
        else ImageTarget(label=0, evidence="nothing to see")
        for t in record.targets
    )
    return replace(record, targets=targets)


@pytest.mark.parametrize("name", ["tampered_224x196", "real_84x140", "pair"])
def test_heads_do_not_read_the_answer_under_tokens_first(bundle: Bundle, photo_records: Path, name: str) -> None:
    (record,) = record_named(photo_records, name)
    samples = [samples_of(bundle, [r], layout="tokens_first")[0] for r in (record, flipped(record))]
    assert samples[0].input_ids != samples[1].input_ids
    length = max(len(sample.input_ids) for sample in samples)
    for sample in samples:  # equal lengths make the comparison exact: the same matmuls
        sample.input_ids += [bundle.tokenizer.pad_token_id] * (length - len(sample.input_ids))
        sample.labels += [-100] * (length - len(sample.labels))
        sample.mask_sizes_hw = samples[0].mask_sizes_hw
    first, second = (forward(bundle.model, collate(bundle, [sample])) for sample in samples)
    for ours, theirs in zip(head_outputs(first), head_outputs(second), strict=True):
        assert torch.equal(ours, theirs)


def test_heads_read_the_answer_under_text_first(bundle: Bundle, photo_records: Path) -> None:
    """Demonstrates the leak that makes `tokens_first` the default."""
    (record,) = record_named(photo_records, "tampered_224x196")
    first, second = (
        forward(bundle.model, collate(bundle, samples_of(bundle, [version], layout="text_first")))
        for version in (record, flipped(record))
    )
    assert (first.cls_logits - second.cls_logits).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["tokens_first", "text_first"])
def test_scoring_samples_hold_no_answer(bundle: Bundle, photo_records: Path, layout: str) -> None:
    """What evaluation scores where an answer could leak is the same for a record and its flipped twin."""
    for name in ("tampered_150x211", "pair"):
        (record,) = record_named(photo_records, name)
        ids = []
        for version in (record, flipped(record)):
            dataset = ForensicDataset([version], bundle.processor, bundle.tokens, DataConfig(layout=layout))
            (sample,) = dataset.without_answers_at([[r.id for r in dataset.records].index(name)])
            assert set(sample.labels) == {-100}
            ids.append(sample.input_ids)
        assert ids[0] == ids[1]
        run = bundle.tokenizer.convert_tokens_to_ids(list(bundle.tokens.all)) * len(record.images)
        assert ids[0][-len(run) :] == run


def conversation(record: Record, *turns: tuple[str, str]) -> Record:
    return replace(record, turns=tuple(Turn(role, text) for role, text in turns))


LEAKY = [
    # The answer stands in the same turn as the image (a format of the spec).
    [("assistant", "<image>is the SECRET one")],
    # An earlier answer already tells the verdict; a label without tokens puts them into the last turn.
    [("user", "real or fake?"), ("assistant", "SECRET"), ("user", "<image> and where?"), ("assistant", "there")],
    [("user", "<image>"), ("assistant", "SECRET"), ("user", "sure?"), ("assistant", "<cls><mask_1> - <mask_32> yes")],
]


@pytest.mark.parametrize("turns", LEAKY)
def test_scoring_a_conversation_drops_every_answer(bundle: Bundle, photo_records: Path, turns: list) -> None:
    (record,) = record_named(photo_records, "tampered_150x211")
    told = conversation(record, *turns)
    dataset = ForensicDataset([told], bundle.processor, bundle.tokens, DataConfig())
    (sample,) = dataset.without_answers_at([[r.id for r in dataset.records].index(told.id)])
    text = bundle.tokenizer.decode(sample.input_ids)
    assert "SECRET" not in text
    assert text.count("<|vision_start|>") == 1
    assert sample.input_ids.count(bundle.processor.image_token_id) == 140 * 224 // 28**2


@pytest.mark.parametrize("turns", LEAKY[1:])
def test_leak_through_an_earlier_answer_is_noticed(bundle: Bundle, photo_records: Path, turns: list) -> None:
    (record,) = record_named(photo_records, "tampered_150x211")
    told = conversation(record, *turns)
    assert ForensicDataset([told], bundle.processor, bundle.tokens, DataConfig()).heads_may_read_answers
    clean = conversation(record, ("user", "<image>"), ("assistant", "fake"))
    assert not ForensicDataset([record, clean], bundle.processor, bundle.tokens, DataConfig()).heads_may_read_answers
