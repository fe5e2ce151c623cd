"""Criterion: counts from targets alone, one division, heads that are off, splitting a batch changes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.config import LossConfig
from finetune.losses import functional
from finetune.losses.criterion import TERMS, Criterion, total

ALL_ON = LossConfig(**dict.fromkeys(TERMS, 1.0))


def sample_batch() -> dict[str, Any]:
    """Five images: tampered, real, real without mask, unlabelled with a full mask, tampered without tokens."""
    tampered = torch.zeros(8, 8, dtype=torch.uint8)
    tampered[:, :4] = 1
    return {
        "text_targets": torch.tensor([1, -100, 2, 0]),
        "cls_labels": torch.tensor([1, 0, 0, -100, 1]),
        "operation_maps": [2 * tampered, torch.zeros(6, 4, dtype=torch.uint8), None, None, tampered],
        "mask_targets": [tampered, torch.zeros(6, 4, dtype=torch.uint8), None, torch.ones(4, 4), tampered],
        "cls_image_index": torch.tensor([0, 1, 2, 3]),
        "mask_image_index": torch.tensor([0, 1, 3]),
    }


def sample_outputs(seed: int = 0) -> SimpleNamespace:
    torch.manual_seed(seed)
    return SimpleNamespace(
        logits=torch.randn(4, 7, requires_grad=True),
        cls_logits=torch.randn(4, requires_grad=True),
        cls_image_index=torch.tensor([0, 1, 2, 3]),
        mask_logits=[torch.randn(s, requires_grad=True) for s in ((8, 8), (6, 4), (4, 4))],
        mask_image_index=torch.tensor([0, 1, 3]),
        mask_features=[torch.randn(5, 4, 4, requires_grad=True) for _ in range(3)],
        operation_logits=[torch.randn(3, 4, 4, requires_grad=True) for _ in range(3)],
        image_features=torch.randn(4, 6, requires_grad=True),
    )


def test_every_term_has_a_weight_in_the_configuration() -> None:
    assert all(isinstance(getattr(LossConfig(), name), float) for name in TERMS)


def test_counts_come_from_targets_alone_and_equal_those_of_the_call() -> None:
    criterion, batch = Criterion(ALL_ON), sample_batch()
    counts = criterion.counts(batch)
    assert counts == {
        "text": 3,
        "focal": 3,
        "dice": 2,
        "boundary": 1,
        "authentic": 1,
        "bce": 3,
        "evidence": 2,
        "sparsity": 1,
        "contrast_region": 1,
        "operation": 2,
        "contrast_image": 2,
    }
    assert {name: term.count for name, term in criterion(sample_outputs(), batch).items()} == counts


def test_evidence_reads_the_label_of_the_maps_image() -> None:
    """Maps of images 0 (tampered), 1 (real) and 3 (unlabelled), though image 2 stands between them."""
    outputs, batch = sample_outputs(), sample_batch()
    config = LossConfig(evidence=1.0, evidence_share=0.1)
    expected, count = functional.evidence_loss(outputs.mask_logits, torch.tensor([1, 0, -100]), 0.1)
    found = Criterion(config)(outputs, batch)["evidence"]
    assert found.count == count == 2
    torch.testing.assert_close(found.sum, expected)


def test_operation_reads_the_operations_of_the_maps_image() -> None:
    """Maps of images 0 (operation 2), 1 (authentic) and 3 (unknown)."""
    outputs, batch = sample_outputs(), sample_batch()
    targets = [batch["operation_maps"][i] for i in (0, 1, 3)]
    expected, count = functional.operation_loss(outputs.operation_logits, targets, 0.5)
    found = Criterion(LossConfig(operation=1.0, operation_authentic_weight=0.5))(outputs, batch)["operation"]
    assert found.count == count == 2
    torch.testing.assert_close(found.sum, expected)
    del batch["operation_maps"]
    assert Criterion(LossConfig(operation=1.0))(outputs, batch)["operation"][:2] == (0.0, 0)


def test_the_parameters_of_the_class_term_reach_it() -> None:
    outputs, batch = sample_outputs(), sample_batch()
    plain, weighted = (Criterion(LossConfig(cls_pos_weight=w))(outputs, batch)["focal"] for w in (1.0, 4.0))
    own = functional.focal_loss(outputs.cls_logits[:1], torch.tensor([1]))[0]  # the one tampered image
    torch.testing.assert_close(weighted.sum - plain.sum, 3 * own)


def test_total_is_the_weighted_sum_of_the_means() -> None:
    config = LossConfig(text=2.0, focal=0.5, dice=0.0, boundary=0.0, authentic=3.0, contrast_region=0.0)
    terms = Criterion(config)(sample_outputs(), sample_batch())
    assert list(terms) == ["text", "focal", "authentic"]
    loss, means = total(terms)
    expected = 2.0 * terms["text"].sum / 3 + 0.5 * terms["focal"].sum / 3 + 3.0 * terms["authentic"].sum
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(means["text"], terms["text"].sum / 3)
    assert not means["text"].requires_grad


def test_two_halves_with_common_normalizers_equal_the_whole() -> None:
    """What gradient accumulation does: uneven micro-batches, one division."""
    criterion = Criterion(LossConfig(contrast_image=0.0))
    batch, outputs = sample_batch(), sample_outputs()
    whole, _ = total(criterion(outputs, batch))
    norm = criterion.counts(batch)
    parts = []
    for rows, maps, words in (([0], [0], slice(0, 1)), ([1, 2, 3], [1, 2], slice(1, 4))):
        part_outputs = SimpleNamespace(
            logits=outputs.logits[words],
            cls_logits=outputs.cls_logits[rows],
            cls_image_index=outputs.cls_image_index[rows],
            mask_logits=[outputs.mask_logits[i] for i in maps],
            mask_image_index=outputs.mask_image_index[maps],
            mask_features=[outputs.mask_features[i] for i in maps],
            image_features=None,
        )
        part = {
            **batch,
            "text_targets": batch["text_targets"][words],
            "cls_image_index": batch["cls_image_index"][rows],
            "mask_image_index": batch["mask_image_index"][maps],
        }
        parts.append(total(criterion(part_outputs, part), norm)[0])
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_a_batch_that_supervises_nothing_gives_zero_gradients_everywhere() -> None:
    batch, outputs = sample_batch(), sample_outputs()
    batch["text_targets"] = torch.full((4,), -100)
    batch["cls_labels"] = torch.full((5,), -100)
    batch["mask_targets"] = batch["operation_maps"] = [None] * 5
    criterion = Criterion(ALL_ON)
    loss, means = total(criterion(outputs, batch), criterion.counts(batch))
    loss.backward()
    assert loss.item() == 0.0
    assert set(means) == set(TERMS)
    maps = [*outputs.mask_logits, *outputs.mask_features, *outputs.operation_logits]
    leaves = [outputs.logits, outputs.cls_logits, *maps, outputs.image_features]
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_heads_that_are_off_leave_their_terms_out(caplog: pytest.LogCaptureFixture) -> None:
    batch = {"text_targets": torch.tensor([1, 2])}
    outputs = SimpleNamespace(logits=torch.randn(2, 5), cls_logits=None, mask_logits=None)
    criterion = Criterion(LossConfig())
    assert list(criterion(outputs, batch)) == ["text"]
    assert {name: count for name, count in criterion.counts(batch).items() if count} == {"text": 2}
    assert not caplog.records  # nothing was supervised, so nothing is missing


def test_a_head_that_is_off_although_there_are_targets_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    outputs, criterion = sample_outputs(), Criterion(LossConfig())
    outputs.mask_features = None
    for _ in range(2):
        assert "contrast_region" not in criterion(outputs, sample_batch())
    assert [record.args[0] for record in caplog.records] == ["contrast_region"]


def test_disagreeing_image_order_is_an_error() -> None:
    outputs = sample_outputs()
    outputs.mask_image_index = torch.tensor([1, 0, 3])
    with pytest.raises(ValueError, match="mask_image_index"):
        Criterion(LossConfig())(outputs, sample_batch())


def test_no_term_and_missing_normalizer_are_errors() -> None:
    with pytest.raises(ValueError, match="no loss term"):
        total({})
    terms = Criterion(LossConfig())(sample_outputs(), sample_batch())
    with pytest.raises(KeyError):
        total(terms, {"text": 1})
