"""Muon for weight matrices and AdamW for every other parameter, as one optimizer.

Muon (Jordan et al. 2024) steps along the nearest semi-orthogonal matrix of the momentum, so that directions of small
gradient move as far as those of large gradient. For networks that see only minutes of training it is worth far more
than a tuned AdamW: docs/experiments.md, round 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan's iteration: five rounds bring every singular value above 0.01 into about [0.7, 1.2]."""
_ROUNDS = 5
_MOMENTUM = 0.95
_STACKED = 4_000_000
"""Values of matrices that step together: small ones cost calls, not arithmetic; large ones would cost memory."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of every matrix U S V^T, by Newton-Schulz iteration in float32; zeros stay zeros.

    Args:
        matrices: (n, rows, columns).
    """
    x = matrices.float()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(AdamW):
    """AdamW whose groups marked `"muon": True` take Muon steps instead, with Nesterov momentum and decoupled decay.

    Such a group holds weights of two or more dimensions; a convolution counts as (out, in * height * width). Its `lr`
    is the length of a step in the spectral norm, times sqrt(rows / columns) where there are more rows: 0.02 is usual.
    Needs whole gradients on every rank: fine under DDP, impossible under DeepSpeed, which cuts and flattens them.

    Args:
        params: parameter groups. arguments: of `torch.optim.AdamW`, for the other groups.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Iterable[dict[str, Any]], **arguments: Any) -> None:
        super().__init__(params, **arguments)
        for group in self.param_groups:
            group.setdefault("muon", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both kinds of groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = self.param_groups
        for group in every:
            if group["muon"]:
                self._step_matrices(group)
        self.param_groups = [group for group in every if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = every
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for parameters in _stacks([p for p in group["params"] if p.grad is not None]):
            rows, columns = parameters[0].flatten(1).shape
            steps = orthogonalize(torch.stack([self._nesterov(p).flatten(1) for p in parameters]))
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step.view_as(parameter).to(parameter.dtype), alpha=-rate)

    def _nesterov(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # unused; AdamW looks for it in every state it loads
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(momentum, _MOMENTUM)


def _stacks(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one shape, type and device together, ordered by their first, at most `_STACKED` values each."""
    alike: dict[tuple[Any, ...], list[list[nn.Parameter]]] = {}
    for parameter in parameters:
        stacks = alike.setdefault((parameter.flatten(1).shape, parameter.dtype, parameter.device), [[]])
        if stacks[-1] and (len(stacks[-1]) + 1) * parameter.numel() > _STACKED:
            stacks.append([])
        stacks[-1].append(parameter)
    return [stack for stacks in alike.values() for stack in stacks]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may train a parameter: not an embedding, nor a single row, whose step would forget its length."""
    return parameter.ndim > 1 and len(parameter) > 1 and not any(part in name for part in ("embed_tokens", "lm_head"))
