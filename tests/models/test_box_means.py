"""Means over windows and blocks against torch's pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.models.box_means import block_mean, local_mean, window_mean


@pytest.fixture
def maps() -> Tensor:
    return torch.randn(2, 3, 24, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("side", [1, 3, 5, 9])
def test_windows(maps: Tensor, side: int) -> None:
    reach = side // 2
    torch.testing.assert_close(window_mean(maps, side), F.avg_pool2d(maps, side, 1, reach))
    inside = F.avg_pool2d(maps, side, 1, reach, count_include_pad=False)
    torch.testing.assert_close(local_mean(maps, side), inside)


@pytest.mark.parametrize("side", [1, 2, 4, 12])
def test_blocks(maps: Tensor, side: int) -> None:
    torch.testing.assert_close(block_mean(maps, side), F.avg_pool2d(maps, side))


@pytest.mark.parametrize("side", [3, 5, 7])
def test_a_constant_has_no_variance_at_the_border_either(side: int) -> None:
    levels = torch.full((1, 1, 20, 30), 127.0)
    assert torch.equal(local_mean(levels, side), levels)
    assert torch.equal(local_mean(levels.square(), side) - local_mean(levels, side).square(), torch.zeros_like(levels))


def test_they_are_differentiable(maps: Tensor) -> None:
    small = maps[:1, :1, :4, :8].clone().requires_grad_()
    for pooled in (lambda x: window_mean(x, 3), lambda x: local_mean(x, 3), lambda x: block_mean(x, 2)):
        assert torch.autograd.gradcheck(pooled, small)
