"""Each loss against its oracle, a number worked out by hand, its numerical gradient, and the empty cases."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from finetune.losses import functional as L

MASK_LOSSES = [L.dice_loss, L.boundary_loss, L.authentic_pixel_loss, L.mask_bce, L.sparsity_loss]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_maps(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor | None]]:
    """Four maps of different sizes: two tampered, one authentic, one without target."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(7, 9), (6, 5), (8, 8), (4, 4)]
    logits = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    targets: list[Tensor | None] = [(torch.rand(size, generator=generator) > 0.6).to(torch.uint8) for size in sizes[:2]]
    return logits, [*targets, torch.zeros(sizes[2], dtype=torch.uint8), None]


def random_features(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(3, 4, 4) features and a (8, 8) mask whose left column of cells is tampered, the next one mixed."""
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:, :3] = 1  # cells of 2 x 2 pixels: column 0 full, column 1 half, columns 2 and 3 empty
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype), mask


# --- text


def test_text_by_hand_and_ignored_positions() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [5.0, -5.0]])
    total, count = L.text_cross_entropy(logits, torch.tensor([0, 1, -100]))
    assert count == 2
    assert total.item() == pytest.approx(math.log(2) + math.log(4), abs=1e-6)


def test_text_over_its_count_is_the_mean_of_the_shifted_causal_loss() -> None:
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    labels[:, :3] = -100
    is_supervised = labels[:, 1:] != -100
    total, count = L.text_cross_entropy(logits[:, :-1][is_supervised], labels[:, 1:][is_supervised])
    causal = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(total / count, causal, atol=1e-6, rtol=0)


# --- focal


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_equals_monai(gamma: float, alpha: float | None) -> None:
    from monai.losses import FocalLoss

    logits, labels = 4 * torch.randn(12), torch.randint(0, 2, (12,))
    total, count = L.focal_loss(logits, labels, gamma, alpha)
    oracle = FocalLoss(gamma=gamma, alpha=alpha, use_softmax=False, reduction="none")
    assert count == 12
    torch.testing.assert_close(total, oracle(logits[:, None], labels[:, None].float()).sum(), atol=1e-5, rtol=1e-6)


def test_focal_by_hand() -> None:
    total, count = L.focal_loss(torch.tensor([0.0, 3.0]), torch.tensor([1, -100]), gamma=2.0, alpha=0.25)
    assert count == 1
    assert total.item() == pytest.approx(0.25 * 0.25 * math.log(2), abs=1e-7)


def test_focal_with_a_positive_weight_equals_torch() -> None:
    logits, labels = 4 * torch.randn(12), torch.randint(0, 2, (12,))
    total, count = L.focal_loss(logits, labels, gamma=0.0, pos_weight=3.0)
    weight = torch.tensor(3.0)
    expected = F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weight, reduction="sum")
    assert count == 12  # the number of images, as torch's mean divides
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-6)


def test_focal_gradient_is_finite_for_sure_answers() -> None:
    logits = torch.tensor([200.0, -200.0, 200.0], requires_grad=True)
    L.focal_loss(logits, torch.tensor([1, 1, 0]), gamma=0.5)[0].backward()
    assert torch.isfinite(logits.grad).all()


def test_a_label_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="0, 1 or -100"):
        L.focal_loss(torch.zeros(2), torch.tensor([0, 2]))


# --- masks


def test_dice_equals_monai_on_tampered_images_only() -> None:
    from monai.losses import DiceLoss

    logits, targets = random_maps()
    oracle = DiceLoss(sigmoid=True, smooth_nr=L.DICE_SMOOTH, smooth_dr=L.DICE_SMOOTH)
    expected = sum(oracle(logits[i][None, None], targets[i][None, None].float()) for i in range(2))
    total, count = L.dice_loss(logits, targets)
    assert count == 2
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=0)


def test_dice_by_hand() -> None:
    total, count = L.dice_loss([torch.zeros(1, 4)], [torch.tensor([[1, 1, 0, 0]])])  # 1 - 2*1/(2+2)
    assert count == 1
    assert total.item() == pytest.approx(0.5, abs=1e-5)


def test_masks_stored_as_255_count_as_one() -> None:
    logits, targets = random_maps()
    scaled = [None if target is None else target * 255 for target in targets]
    for loss in MASK_LOSSES:
        assert loss(logits, targets)[0] == loss(logits, scaled)[0]


def test_signed_distance_by_hand_and_against_the_authors_code() -> None:
    assert L.signed_distance(torch.tensor([[0, 0, 1, 1, 1]])).tolist() == [[1.5, 0.5, -0.5, -1.5, -2.5]]
    mask = (torch.rand(20, 30) > 0.7).numpy()
    authors = distance_transform_edt(~mask) * ~mask - (distance_transform_edt(mask) - 1) * mask  # one_hot2dist
    np.testing.assert_allclose(L.signed_distance(torch.from_numpy(mask)).numpy(), authors - 0.5, atol=1e-6)


def test_signed_distance_is_exact_at_the_size_of_photographs() -> None:
    mask = np.zeros((480, 640), dtype=bool)
    mask[[3, 200, 470], [5, 600, 20]] = True
    mask[100:180, 300:420] = True
    outward, inward = distance_transform_edt(~mask), distance_transform_edt(mask)
    found = L.signed_distance(torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found, np.where(mask, 0.5 - inward, outward - 0.5), atol=1e-4)


def test_signed_distance_does_not_depend_on_where_its_memory_lies() -> None:
    """A resumed run must take the same steps: two processes never have the same addresses."""
    mask = torch.zeros(112, 84, dtype=torch.uint8)
    mask[30:50, 20:61], mask[77:80, 3:70] = 1, 1
    used_ipp = hasattr(cv2, "ipp") and cv2.ipp.useIPP()
    first, kept = L.signed_distance(mask), []
    for size in range(1, 400):  # allocations of every size between the calls move the next ones
        kept.append(np.empty(size * 7, dtype=np.uint8))
        assert torch.equal(L.signed_distance(mask), first)
    outward, inward = distance_transform_edt(1 - mask.numpy()), distance_transform_edt(mask.numpy())
    exact = np.where(mask.numpy(), 0.5 - inward.astype(np.float32), outward.astype(np.float32) - 0.5)
    assert np.array_equal(first.numpy(), exact)
    assert (hasattr(cv2, "ipp") and cv2.ipp.useIPP()) == used_ipp  # other users of OpenCV find it as it was


def test_boundary_by_hand() -> None:
    total, count = L.boundary_loss([torch.zeros(1, 4)], [torch.tensor([[0, 0, 0, 1]])])  # distances 2.5 1.5 .5 -.5
    assert count == 1
    assert total.item() == pytest.approx(0.5 * (4.0 / 4) / math.hypot(1, 4), abs=1e-6)


def test_boundary_does_not_grow_with_resolution() -> None:
    values = []
    for side in (64, 256, 1024):
        mask = torch.zeros(side, side, dtype=torch.uint8)
        mask[side // 4 : side // 2, side // 4 : side // 2] = 1
        values.append(L.boundary_loss([torch.zeros(side, side)], [mask])[0].item())
    assert max(values) / min(values) < 1.01


def test_boundary_takes_images_with_both_kinds_of_pixel_and_prefers_the_right_mask() -> None:
    full = torch.ones(4, 4, dtype=torch.uint8)
    total, count = L.boundary_loss([torch.randn(4, 4)], [full])
    assert (total.item(), count) == (0.0, 0)
    mask = torch.zeros(9, 9, dtype=torch.uint8)
    mask[3:6, 3:6] = 1
    sure = (mask.float() - 0.5) * 20
    assert L.boundary_loss([sure], [mask])[0] < 0 < L.boundary_loss([-sure], [mask])[0]


def test_authentic_term_pushes_a_positive_prediction_down() -> None:
    logits = torch.full((3, 3), 8.0, requires_grad=True)
    total, count = L.authentic_pixel_loss([logits], [torch.zeros(3, 3, dtype=torch.uint8)])
    total.backward()
    assert count == 1
    assert total.item() == pytest.approx(math.log1p(math.exp(8)), abs=1e-5)
    assert (logits.grad > 0.1).all()


def test_bce_equals_torch_per_image() -> None:
    logits, targets = random_maps()
    total, count = L.mask_bce(logits, targets, pos_weight=3.0)
    weight = torch.tensor(3.0)
    expected = sum(
        F.binary_cross_entropy_with_logits(logits[i], targets[i].float(), pos_weight=weight) for i in range(3)
    )
    assert count == 3
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_a_map_of_another_size_than_its_target_is_an_error(loss) -> None:
    for target in (torch.eye(4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)):
        if loss([torch.zeros(4, 4)], [target])[1]:
            with pytest.raises(ValueError, match="found shapes"):
                loss([torch.zeros(4, 5)], [target])
    with pytest.raises(ValueError, match="one target per map"):
        loss([torch.zeros(4, 4)], [])


# --- evidence and sparsity


def test_evidence_by_hand() -> None:
    """The two largest of 100 logits are 3 and 1: z = 2; the unlabelled map takes no part."""
    logits = torch.full((10, 10), -5.0)
    logits[2, 3], logits[7, 1] = 3.0, 1.0
    total, count = L.evidence_loss([logits, logits, logits], torch.tensor([1, 0, -100]), share=0.02)
    assert count == 2
    assert total.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(2)), abs=1e-5)


@pytest.mark.parametrize("share", [0.001, 0.13, 1.0])
def test_evidence_equals_torch_on_the_sorted_map(share: float) -> None:
    logits, labels = random_maps()[0], torch.tensor([1, 0, 1, 0])
    strongest = [m.flatten().sort().values[-max(1, math.ceil(share * m.numel())) :].mean() for m in logits]
    expected = F.binary_cross_entropy_with_logits(torch.stack(strongest), labels.float(), reduction="sum")
    torch.testing.assert_close(L.evidence_loss(logits, labels, share)[0], expected, atol=1e-6, rtol=0)


def test_evidence_moves_only_the_strongest_pixels_and_towards_the_label() -> None:
    logits = torch.arange(100.0).view(10, 10) / 10
    for label, sign in ((1, -1.0), (0, 1.0)):
        leaf = logits.clone().requires_grad_()
        L.evidence_loss([leaf], torch.tensor([label]), share=0.05)[0].backward()
        moved = leaf.grad.flatten()
        assert torch.equal(moved[:-5], torch.zeros(95))
        assert (moved[-5:].sign() == sign).all()


def test_evidence_wants_a_label_for_each_map() -> None:
    with pytest.raises(ValueError, match="one label per map"):
        L.evidence_loss([torch.zeros(2, 2)], torch.tensor([0, 1]))


def test_sparsity_is_the_mean_score_of_authentic_maps() -> None:
    logits, targets = random_maps()
    total, count = L.sparsity_loss(logits, targets)
    assert count == 1  # the third map
    torch.testing.assert_close(total, F.l1_loss(logits[2].sigmoid(), torch.zeros(8, 8)), atol=1e-6, rtol=0)


def test_sparsity_lets_go_of_sure_alarms_where_the_pixel_term_does_not() -> None:
    faint, sure = torch.tensor([[0.0]], requires_grad=True), torch.tensor([[8.0]], requires_grad=True)
    nothing = torch.zeros(1, 1, dtype=torch.uint8)
    L.sparsity_loss([faint, sure], [nothing, nothing])[0].backward()
    assert faint.grad.item() == pytest.approx(0.25)
    assert 0 < sure.grad.item() < 1e-3


# --- contrast


def test_region_contrast_equals_ntxent_of_pytorch_metric_learning() -> None:
    from pytorch_metric_learning.losses import NTXentLoss

    features, mask = random_features()
    cells = features.flatten(1).T.reshape(4, 4, 3)
    authentic, tampered = cells[:, 2:].reshape(-1, 3), cells[:, 0]
    labels = torch.tensor([0] * len(authentic) + [1 + i for i in range(len(tampered))])  # tampered: each its own class
    expected = NTXentLoss(temperature=0.1)(torch.cat([authentic, tampered]), labels)
    total, count = L.region_contrast([features], [mask], temperature=0.1)
    assert count == 1
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-6)


def test_image_contrast_equals_ntxent_of_pytorch_metric_learning() -> None:
    from pytorch_metric_learning.losses import NTXentLoss

    features, labels = torch.randn(8, 5), torch.tensor([0, 1, 0, 0, 1, -100, 0, 1])
    classes = torch.tensor([0, 1, 0, 0, 2, 0, 3])
    known = labels != -100
    total, count = L.image_contrast(features, labels, temperature=0.2)
    assert count == 4
    torch.testing.assert_close(
        total / count, NTXentLoss(temperature=0.2)(features[known], classes), atol=1e-5, rtol=1e-6
    )


def test_image_contrast_by_hand() -> None:
    """Two equal real images and a tampered one at a right angle: -log(e^10 / (e^10 + e^0)) for both anchors."""
    features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    total, count = L.image_contrast(features, torch.tensor([0, 0, 1]), temperature=0.1)
    assert count == 2
    assert total.item() == pytest.approx(2 * math.log1p(math.exp(-10)), abs=1e-7)


def test_region_contrast_drops_mixed_cells_and_is_lowest_when_regions_differ() -> None:
    features, mask = random_features()
    changed = features.clone()
    changed[:, :, 1] = 100.0  # the mixed column
    assert L.region_contrast([features], [mask])[0] == L.region_contrast([changed], [mask])[0]
    apart = torch.zeros(2, 4, 4)
    apart[0, :, 0], apart[1, :, 1:] = 1.0, 1.0
    assert L.region_contrast([apart], [mask])[0] < 1e-3 < L.region_contrast([torch.ones(2, 4, 4)], [mask])[0]


def test_region_contrast_subsamples_evenly_and_repeatably() -> None:
    assert L._evenly(torch.arange(10), 4).tolist() == [0, 2, 5, 7]
    features, mask = random_features()
    first, second = (L.region_contrast([features], [mask], max_anchors=3)[0] for _ in range(2))
    assert first == second
    assert first != L.region_contrast([features], [mask])[0]


def test_region_contrast_counts_an_image_whose_grid_keeps_no_region() -> None:
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[0, 0] = 1
    features = torch.randn(3, 2, 2, requires_grad=True)
    total, count = L.region_contrast([features], [mask])
    total.backward()
    assert (total.item(), count) == (0.0, 1)
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("labels", [[0, 0], [0, 1], [1, 1], [-100, -100], [0, -100]])
def test_image_contrast_without_enough_images_is_zero(labels: list[int]) -> None:
    features = torch.randn(2, 3, requires_grad=True)
    total, count = L.image_contrast(features, torch.tensor(labels))
    total.backward()
    assert (total.item(), count) == (0.0, 0)


def test_zero_features_give_finite_gradients() -> None:
    features = torch.zeros(3, 4, 4, requires_grad=True)
    L.region_contrast([features], [random_features()[1]])[0].backward()
    assert torch.isfinite(features.grad).all()


# --- operations


def test_operation_loss_by_hand() -> None:
    """2x2 cells of a 4x4 mask, one all tampered, one half, one a quarter, one not; half is enough."""
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[:2, :2] = 1
    mask[0, 2:] = 1
    mask[3, 0] = 1
    logits = torch.randn(4, 2, 2, generator=torch.manual_seed(0))
    log_p = logits.log_softmax(dim=0)
    expected = -(log_p[3, 0, 0] + log_p[3, 0, 1] + 0.3 * (log_p[0, 1, 0] + log_p[0, 1, 1])) / 4
    total, count = L.operation_loss([logits], [3 * mask])
    torch.testing.assert_close(total, expected)
    assert count == 1
    authentic, _ = L.operation_loss([logits], [torch.zeros_like(mask)], 2.0)
    torch.testing.assert_close(authentic, -2.0 * log_p[0].mean())


def test_operation_loss_of_an_edit_too_thin_for_any_cell() -> None:
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[0, :6] = 1  # a quarter of the first cell, an eighth of the second
    logits = torch.randn(2, 2, 2, generator=torch.manual_seed(0))
    log_p = logits.log_softmax(dim=0)
    expected = -(log_p[1, 0, 0] + 0.3 * (log_p[0].sum() - log_p[0, 0, 0])) / 4
    torch.testing.assert_close(L.operation_loss([logits], [mask])[0], expected)


def test_operation_loss_of_several_edits_by_hand() -> None:
    """2x2 cells of a 4x4 map: operation 2 over most of the first, an unknown one over most of the second; 1, too thin
    for any cell, in these alone; 3, as thin, in the third."""
    operations = torch.zeros(4, 4, dtype=torch.int16)
    operations[:2, :2] = torch.tensor([[2, 2], [2, 1]])
    operations[:2, 2:] = torch.tensor([[-100, -100], [1, 0]])
    operations[2, 0] = 3
    logits = torch.randn(4, 2, 2, generator=torch.manual_seed(0))
    log_p = logits.log_softmax(dim=0)
    expected = -(log_p[2, 0, 0] + log_p[3, 1, 0] + 0.3 * log_p[0, 1, 1]) / 4
    total, count = L.operation_loss([logits], [operations])
    torch.testing.assert_close(total, expected)
    assert count == 1


def test_operation_loss_takes_images_with_a_map_only() -> None:
    maps = [torch.randn(3, *side, requires_grad=True) for side in ((4, 4), (2, 6), (4, 4))]
    total, count = L.operation_loss(maps, [None, torch.full((5, 7), 2), None])
    total.backward()
    assert count == 1
    torch.testing.assert_close(total, -maps[1].log_softmax(dim=0)[2].mean())
    assert [bool(leaf.grad.any()) for leaf in maps] == [False, True, False]
    assert L.operation_loss([], []) == (0.0, 0)
    with pytest.raises(ValueError, match="operation 3, but the head tells 2 operations apart"):
        L.operation_loss(maps[:1], [torch.full((8, 8), 3)])
    with pytest.raises(ValueError, match="one target per map"):
        L.operation_loss(maps[:1], [])


# --- all of them


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_mask_loss_gradients_are_the_numerical_ones(loss) -> None:
    logits, targets = random_maps(dtype=torch.float64)
    for tensor in logits:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *maps: loss(maps, targets)[0], tuple(logits))


def test_other_gradients_are_the_numerical_ones() -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    labels = torch.tensor([0, 1, -100, 0, 0, 1])
    check = torch.autograd.gradcheck
    assert check(lambda x: L.text_cross_entropy(x, torch.tensor([3, -100, 0]))[0], (tensor(3, 5),))
    assert check(lambda x: L.focal_loss(x, labels, 2.0, 0.25)[0], (tensor(6),))
    assert check(lambda x: L.focal_loss(x, labels, 2.0, None, 3.0)[0], (tensor(6),))
    assert check(lambda x: L.image_contrast(x, labels, 0.5)[0], (tensor(6, 4),))
    maps = (tensor(3, 4), tensor(5, 2), tensor(2, 2))
    assert check(lambda *m: L.evidence_loss(m, torch.tensor([1, 0, -100]), 0.3)[0], maps)
    features, mask = random_features(dtype=torch.float64)
    assert check(lambda x: L.region_contrast([x], [mask], 0.5)[0], (features.requires_grad_(),))
    assert check(lambda x: L.operation_loss([x], [2 * mask])[0], (tensor(3, 4, 4),))


@pytest.mark.parametrize("loss", [*MASK_LOSSES, L.region_contrast])
def test_mask_losses_without_images_or_targets(loss) -> None:
    total, count = loss([], [])
    assert (total.item(), count) == (0.0, 0)
    shape = (3, 4, 4) if loss is L.region_contrast else (4, 4)
    maps = [torch.full(shape, math.inf, requires_grad=True), torch.randn(shape, requires_grad=True)]
    total, count = loss(maps, [None, None])
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert all(torch.equal(m.grad, torch.zeros(shape)) for m in maps)


@pytest.mark.parametrize(
    ("loss", "shape"), [(L.text_cross_entropy, (5,)), (L.focal_loss, ()), (L.image_contrast, (5,))]
)
@pytest.mark.parametrize("rows", [0, 3])
def test_row_losses_without_supervision(loss, shape: tuple[int, ...], rows: int) -> None:
    inputs = torch.randn(rows, *shape, requires_grad=True)
    total, count = loss(inputs, torch.full((rows,), -100))
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert torch.equal(inputs.grad, torch.zeros_like(inputs))


def test_evidence_without_supervision() -> None:
    assert L.evidence_loss([], torch.zeros(0, dtype=torch.long))[1] == 0
    leaf = torch.full((3, 3), math.inf, requires_grad=True)
    total, count = L.evidence_loss([leaf], torch.tensor([-100]))
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert torch.equal(leaf.grad, torch.zeros(3, 3))


def test_half_precision_is_computed_in_float32() -> None:
    logits, targets = random_maps()
    half = [m.bfloat16() for m in logits]
    for loss in MASK_LOSSES:
        total = loss(half, targets)[0]
        assert total.dtype == torch.float32
        assert total == loss([m.float() for m in half], targets)[0]
    features, mask = random_features()
    labels = torch.tensor([0, 0, 1])
    assert L.region_contrast([features.bfloat16()], [mask])[0].dtype == torch.float32
    assert L.image_contrast(torch.randn(3, 4).bfloat16(), labels)[0].dtype == torch.float32
    assert L.focal_loss(torch.randn(3).bfloat16(), labels)[0].dtype == torch.float32
    assert L.evidence_loss([half[0]], labels[:1])[0].dtype == torch.float32
    assert L.operation_loss([features.bfloat16()], [mask])[0].dtype == torch.float32
    assert L.text_cross_entropy(torch.randn(3, 4).bfloat16(), labels)[0].dtype == torch.float32
