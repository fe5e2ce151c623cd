"""The vision tower's patch embedding as one matrix product while it trains.

Its kernel is as large as its stride, so the 3-D convolution of transformers is a linear layer on flattened patches;
forward and backward of the convolution cost four times as much on a CPU (14 against 3 ms for 1016 patches of the tiny
model, one thread).
"""

from __future__ import annotations

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed  # noqa: E402


class PatchEmbed(Qwen2_5_VisionPatchEmbed):
    """`Qwen2_5_VisionPatchEmbed` with the same parameters, and the same output to the bit where they rest."""

    def __init__(self, embed: Qwen2_5_VisionPatchEmbed) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(embed).items() if not name.startswith("_")})
        self.proj = embed.proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(P, channels * frames * height * width) patches -> (P, embed_dim)."""
        if not self._is_plain_and_trains():
            return super().forward(hidden_states)
        weight = self.proj.weight.flatten(1)
        return F.linear(hidden_states.view(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)

    def _is_plain_and_trains(self) -> bool:
        """Not wrapped by LoRA, not cut up by ZeRO-3, and with a gradient to compute."""
        proj = self.proj
        trains = type(proj) is nn.Conv3d and proj.weight.requires_grad and torch.is_grad_enabled()
        return trains and not hasattr(proj.weight, "ds_id")
