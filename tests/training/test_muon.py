"""Muon: what one step is, which parameters take it, and that AdamW's groups do not notice."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from finetune.config import RunConfig
from finetune.training import muon
from finetune.training.muon import MuonAdamW, orthogonalize
from finetune.training.run import build_trainer


@pytest.mark.parametrize("shape", [(8, 8), (16, 48), (48, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = (u * torch.linspace(1, 0.05, len(s), dtype=torch.float64)) @ vh
    result = orthogonalize(matrix[None])[0].double()
    assert result.shape == shape
    inner = u.T @ result @ vh.T
    diagonal = inner.diagonal()
    assert float(diagonal.min()) > 0.6
    assert float(diagonal.max()) < 1.3
    assert float((inner - torch.diag(diagonal)).abs().max()) < 1e-3


def test_zeros_stay_zeros() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_step_ignores_the_scale_of_the_gradient_and_decays_apart_from_it() -> None:
    start, gradient = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3)
    results = []
    for scale in (1.0, 1e4):
        weight = torch.nn.Parameter(start.clone())
        optimizer = MuonAdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.5, "muon": True}])
        weight.grad = scale * gradient
        optimizer.step()
        results.append(weight.detach())
    assert torch.allclose(results[0], results[1], atol=1e-5)
    expected = start * 0.95 - 0.1 * orthogonalize(gradient.flatten(1)[None]).view_as(start)
    assert torch.allclose(results[0], expected, atol=1e-5)


def test_tall_matrices_step_further() -> None:
    weight = torch.nn.Parameter(torch.zeros(12, 3))
    optimizer = MuonAdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.0, "muon": True}])
    weight.grad = torch.randn(12, 3)
    optimizer.step()
    assert torch.allclose(weight.detach(), -0.2 * orthogonalize(weight.grad[None])[0], atol=1e-6)


@pytest.mark.parametrize("stacked", [0, 30, 1000])
def test_matrices_of_one_shape_step_as_if_alone(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_STACKED", stacked)
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 3), (6, 2, 3), (4, 3), (3, 4), (4, 3), (6, 6)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]

    def train(chosen: list[int]) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(values[i].clone()) for i in chosen]
        optimizer = MuonAdamW([{"params": weights, "lr": 0.1, "weight_decay": 0.2, "muon": True}])
        for step in gradients:
            for i, weight in zip(chosen, weights, strict=True):
                weight.grad = step[i] if i else None  # the first one takes no part
            optimizer.step()
        return [weight.detach() for weight in weights]

    together = train(list(range(len(shapes))))
    assert torch.equal(together[0], values[0])
    for i, found in enumerate(together):
        torch.testing.assert_close(found, train([i])[0], rtol=1e-5, atol=1e-5)


def test_other_groups_are_adamw_and_the_state_can_be_restored() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)]
    gradients = [[torch.randn(t.shape, generator=generator) for t in tensors] for _ in range(4)]

    def make() -> tuple[list[torch.nn.Parameter], MuonAdamW]:
        weights = [torch.nn.Parameter(t.clone()) for t in tensors]
        groups = [{"params": weights[:1], "muon": True}, {"params": weights[1:]}]
        return weights, MuonAdamW(groups, lr=0.01, weight_decay=0.1)

    def run(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: list[int]) -> None:
        for step in steps:
            for weight, gradient in zip(weights, gradients[step], strict=False):
                weight.grad = gradient
            optimizer.step()

    weights, optimizer = make()
    run(weights, optimizer, [0, 1])
    saved, values = deepcopy(optimizer.state_dict()), [w.detach().clone() for w in weights]
    run(weights, optimizer, [2, 3])
    assert len(optimizer.param_groups) == 2

    again, restored = make()
    with torch.no_grad():
        for weight, value in zip(again, values, strict=True):
            weight.copy_(value)
    restored.load_state_dict(saved)
    run(again, restored, [2, 3])
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))

    plain = torch.nn.Parameter(tensors[1].clone())
    adamw = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1)
    for step in range(4):
        plain.grad = gradients[step][1]
        adamw.step()
    assert torch.equal(plain, weights[1])


def test_closure_is_evaluated_once_before_the_step() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = MuonAdamW([{"params": [weight], "lr": 0.1, "muon": True}])
    calls = []

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert calls == [4.0]
    assert not torch.equal(weight, torch.ones(2, 2))


def test_the_trainer_gives_matrices_of_the_named_groups_to_muon(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(
        data={"eval": []},
        train={
            "muon_groups": ["noise_residual", "lm_full", "cls_head"],
            "muon_learning_rate": 0.03,
            "weight_decay": 0.1,
            "warmup_ratio": 0,
            "lr_scheduler": "constant",
        },
    )
    trainer = build_trainer(config)[0]
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    chosen = set()
    for group in trainer.optimizer.param_groups:
        assert group["muon"] == group["name"].endswith("(Muon)")
        if group["muon"]:
            assert (group["lr"], group["weight_decay"]) == (0.03, 0.1)
            chosen |= {names[id(p)] for p in group["params"]}
    assert {name.split(".")[0] for name in chosen} >= {"noise_residual", "cls_head"}
    assert any("language_model.layers" in name for name in chosen)
    assert not any("embed_tokens" in name or "lm_head" in name or "visual" in name for name in chosen)
    assert "cls_head.out.weight" not in chosen  # one row
    assert all(p.ndim > 1 and len(p) > 1 for p in trainer.model.parameters() if names[id(p)] in chosen)
    in_groups = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if name in chosen}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name].detach(), value) for name, value in before.items())
