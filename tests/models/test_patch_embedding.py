"""The patch embedding as a matrix product: values and gradients of the convolution; at rest the convolution itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune.models.patch_embedding import PatchEmbed


@pytest.fixture
def embed() -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

    torch.manual_seed(0)
    return Qwen2_5_VisionPatchEmbed(patch_size=14, temporal_patch_size=2, in_channels=3, embed_dim=24)


@pytest.fixture
def patches() -> Tensor:
    return torch.randn(20, 1176, generator=torch.Generator().manual_seed(1))


def test_trained_it_has_the_values_and_gradients_of_the_convolution(embed: nn.Module, patches: Tensor) -> None:
    results = []
    for module in (embed, PatchEmbed(embed)):
        embed.zero_grad()
        values = module(patches)
        values.square().sum().backward()
        results.append((values, embed.proj.weight.grad.clone()))
    for convolution, product in zip(*results, strict=True):
        torch.testing.assert_close(product, convolution, rtol=1e-4, atol=1e-4)


def test_trained_it_does_not_call_the_convolution(
    embed: nn.Module, patches: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Conv3d, "forward", None)
    assert PatchEmbed(embed)(patches).requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_at_rest_it_is_the_convolution_to_the_bit(embed: nn.Module, patches: Tensor, frozen: bool) -> None:
    embed.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        assert torch.equal(PatchEmbed(embed)(patches), embed(patches))


def test_names_of_weights_stay(embed: nn.Module) -> None:
    assert list(PatchEmbed(embed).state_dict()) == list(embed.state_dict()) == ["proj.weight"]


def test_a_wrapped_convolution_is_called(embed: nn.Module, patches: Tensor) -> None:
    class Wrapper(nn.Module):  # as PEFT puts one in the place of a layer
        def __init__(self, inner: nn.Conv3d) -> None:
            super().__init__()
            self.inner = inner

        @property
        def weight(self) -> Tensor:
            return self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    expected = embed(patches) + 1
    embed.proj = Wrapper(embed.proj)
    torch.testing.assert_close(PatchEmbed(embed)(patches), expected)
