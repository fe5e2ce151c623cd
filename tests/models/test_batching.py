"""A padded batch gives what each sample gives alone: text, scores and masks; left and right padding, ragged images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from model_helpers import STREAM, collate, forward, load, record_named, samples_of

ATOL = 5e-5
"""Measured on CPU in fp32: 3e-6 for text logits of spread 1.6, 2e-7 for scores, 7e-7 for masks (matmul shapes)."""


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("heads", [{}, {"mask": "grid", "noise_residual": STREAM}])
def test_batch_equals_single_samples(
    tied: Path, photo_records: Path, padding_side: Literal["left", "right"], heads: dict[str, Any]
) -> None:
    bundle = load(tied, **heads)
    samples = samples_of(bundle, record_named(photo_records))
    batch = collate(bundle, samples, padding_side)
    assert batch["attention_mask"].sum(dim=1).unique().numel() > 3  # ragged
    output = forward(bundle.model, batch)
    assert output.cls_image_index.tolist() == list(range(7)) == output.mask_image_index.tolist()
    image = 0
    for row, sample in enumerate(samples):
        alone = forward(bundle.model, collate(bundle, [sample]))
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(output.logits[row, real], alone.logits[0], rtol=0, atol=ATOL)
        count = len(sample.images)
        if not count:
            assert alone.cls_logits is None
            continue
        torch.testing.assert_close(output.cls_logits[image : image + count], alone.cls_logits, rtol=0, atol=ATOL)
        for k in range(count):
            torch.testing.assert_close(output.mask_logits[image + k], alone.mask_logits[k], rtol=0, atol=ATOL)
            assert tuple(output.mask_logits[image + k].shape) == sample.mask_sizes_hw[k]
        image += count


def test_images_of_one_sample_do_not_swap(tied: Path, photo_records: Path) -> None:
    """The second image's run reads the second image: changing its pixels leaves the first one's mask alone."""
    bundle = load(tied)
    samples = samples_of(bundle, record_named(photo_records, "pair"))
    before = forward(bundle.model, collate(bundle, samples))
    samples[0].images[1] = samples[0].images[1].rotate(180)
    after = forward(bundle.model, collate(bundle, samples))
    assert not torch.allclose(after.mask_logits[1], before.mask_logits[1], atol=1e-2)
    torch.testing.assert_close(after.mask_features[0], before.mask_features[0], rtol=0, atol=ATOL)
    assert not torch.allclose(after.mask_features[1], before.mask_features[1], atol=1e-3)


def test_order_of_the_samples_does_not_matter(tied: Path, photo_records: Path) -> None:
    bundle = load(tied)
    samples = samples_of(bundle, record_named(photo_records, "tampered_224x196", "pair", "text", "real_112x252"))
    forwards = forward(bundle.model, collate(bundle, samples))
    backwards = forward(bundle.model, collate(bundle, samples[::-1]))
    order = [3, 1, 2, 0]  # images of the reversed batch: real, pair#1, pair#2, tampered
    torch.testing.assert_close(backwards.cls_logits[order], forwards.cls_logits, rtol=0, atol=ATOL)


def test_sample_without_tokens_in_the_batch_has_no_heads(tied: Path, photo_records: Path) -> None:
    bundle = load(tied)
    samples = samples_of(bundle, record_named(photo_records, "real_84x140", "tampered_224x196", "real_112x252"))
    forensic = set(bundle.tokenizer.convert_tokens_to_ids(list(bundle.tokens.all)))
    samples[1].input_ids = [token for token in samples[1].input_ids if token not in forensic]
    samples[1].labels = samples[1].input_ids
    batch = collate(bundle, samples)
    output = forward(bundle.model, batch)
    assert output.cls_image_index.tolist() == [0, 2] == batch["cls_image_index"].tolist()
    assert output.mask_image_index.tolist() == [0, 2] == batch["mask_image_index"].tolist()
    assert [tuple(m.shape) for m in output.mask_logits] == [(84, 140), (112, 252)]
    alone = forward(bundle.model, collate(bundle, samples[2:]))
    torch.testing.assert_close(output.cls_logits[1:], alone.cls_logits, rtol=0, atol=ATOL)
