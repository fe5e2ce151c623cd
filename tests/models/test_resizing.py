"""Bilinear resizing by matrix products against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.models.resizing import resize_bilinear


@pytest.fixture
def maps() -> Tensor:
    return torch.randn(2, 3, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [(14, 24), (7, 12), (100, 31), (3, 5), (1, 1)])
def test_values_and_gradients_are_torch_s(maps: Tensor, size: tuple[int, int]) -> None:
    results = []
    for function in (resize_bilinear, lambda x, s: F.interpolate(x, s, mode="bilinear", align_corners=False)):
        x = maps.clone().requires_grad_()
        values = function(x, size)
        (values * torch.linspace(0, 1, values.numel(), dtype=x.dtype).view_as(values)).sum().backward()
        results.append((values, x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_type_and_precision_stay_under_autocast(maps: Tensor, dtype: torch.dtype) -> None:
    expected = resize_bilinear(maps, (14, 24))
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_bilinear(maps.to(dtype).requires_grad_(), (14, 24)).detach()
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_without_a_gradient_it_is_torch_s_to_the_bit(maps: Tensor) -> None:
    expected = F.interpolate(maps, (30, 31), mode="bilinear", align_corners=False)
    assert torch.equal(resize_bilinear(maps, (30, 31)), expected)
