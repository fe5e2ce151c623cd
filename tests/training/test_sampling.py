"""Draws of an epoch, shares of an evaluation, and the learning-rate schedule: plain Python, no model."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from finetune.training.sampling import ClassBalancedSampler, evaluation_batches
from finetune.training.schedule import CLOCK_SLACK, TimeBudget, make_scheduler

LABELS = [0] * 30 + [1] * 7


def draws(sampler: ClassBalancedSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_pair_is_balanced_in_random_order() -> None:
    sampler = ClassBalancedSampler(LABELS, seed=3)
    epoch = draws(sampler, 0)
    assert len(epoch) == len(sampler) == 37
    pairs = [(LABELS[a], LABELS[b]) for a, b in zip(epoch[0:36:2], epoch[1:36:2], strict=True)]
    assert {frozenset(pair) for pair in pairs} == {frozenset((0, 1))}
    assert len(set(pairs)) == 2  # not always the real one first: two ranks of batch 1 both see both classes


def test_epochs_are_reproducible_and_differ() -> None:
    first, again, other = (ClassBalancedSampler(LABELS, seed=seed) for seed in (3, 3, 4))
    assert draws(first, 5) == draws(again, 5)  # whatever was asked for before
    assert draws(first, 5) != draws(first, 6)
    assert draws(first, 5) != draws(other, 5)


def test_no_record_waits_long_and_rare_ones_repeat_evenly() -> None:
    sampler = ClassBalancedSampler(LABELS, seed=0)
    seen = Counter(index for epoch in range(6) for index in draws(sampler, epoch))
    assert set(seen) == set(range(37))
    real, rare = [seen[i] for i in range(30)], [seen[i] for i in range(30, 37)]
    assert max(real) - min(real) <= 1  # 6 x 19 draws of 30 records
    assert max(rare) - min(rare) <= 1


def test_unlabelled_records_keep_their_share() -> None:
    labels: list[int | None] = [None] * 5 + [0] * 10 + [1] * 2
    epoch = draws(ClassBalancedSampler(labels), 0)
    assert Counter(labels[i] for i in epoch) == {None: 5, 0: 6, 1: 6}
    assert sorted(i for i in epoch if i < 5) == list(range(5))


PAIRS = [f"p{i % 20}" for i in range(40)]  # record i and i + 20 are of the same picture


def test_partners_are_drawn_together_in_random_order() -> None:
    labels = [0] * 20 + [1] * 20
    epoch = draws(ClassBalancedSampler(labels, PAIRS, seed=1), 2)
    assert sorted(epoch) == list(range(40))
    assert all(abs(a - b) == 20 for a, b in zip(epoch[::2], epoch[1::2], strict=True))
    assert len({a < b for a, b in zip(epoch[::2], epoch[1::2], strict=True)}) == 2


@pytest.mark.parametrize(
    ("num_real", "num_tampered", "num_unlabelled"), [(30, 7, 0), (7, 30, 0), (11, 10, 4), (1, 1, 0)]
)
def test_pairs_change_the_neighbours_not_the_draws(num_real: int, num_tampered: int, num_unlabelled: int) -> None:
    labels = [0] * num_real + [1] * num_tampered + [None] * num_unlabelled
    pairs = [f"p{i}" for i in range(num_real)] + [f"p{i}" if i % 3 else None for i in range(num_tampered)]
    pairs += [None] * num_unlabelled
    for epoch in range(5):
        with_pairs = draws(ClassBalancedSampler(labels, pairs, seed=4), epoch)
        assert Counter(with_pairs) == Counter(draws(ClassBalancedSampler(labels, seed=4), epoch))
        if not num_unlabelled:
            couples = list(zip(with_pairs[::2], with_pairs[1::2], strict=False))
            assert all({labels[a], labels[b]} == {0, 1} for a, b in couples)
        drawn = set(with_pairs)
        possible = {pairs[i] for i in drawn if labels[i] == 0} & {pairs[i] for i in drawn if labels[i] == 1} - {None}
        neighbours = pairwise(with_pairs)
        assert possible <= {pairs[a] for a, b in neighbours if pairs[a] == pairs[b] and labels[a] != labels[b]}


def test_ranks_get_different_records_of_both_classes() -> None:
    labels = [0] * 20 + [1] * 20
    shards = []
    for rank in range(2):
        batches = BatchSampler(ClassBalancedSampler(labels, seed=1), batch_size=1, drop_last=False)
        shards.append([i for batch in BatchSamplerShard(batches, 2, rank) for i in batch])
    assert sorted(shards[0] + shards[1]) == list(range(40))  # balanced classes: each record once, on one rank
    for shard in shards:
        assert {labels[i] for i in shard} == {0, 1}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
def test_evaluation_counts_each_record_once(count: int, batch_size: int, world_size: int) -> None:
    shares = [evaluation_batches(count, batch_size, world_size, rank) for rank in range(world_size)]
    assert len({len(batches) for batches, _ in shares}) == 1  # forward passes may be collective
    counted = [i for batches, num_counted in shares for batch in batches[:num_counted] for i in batch]
    assert sorted(counted) == list(range(count))
    assert all(0 < len(batch) <= batch_size for batches, _ in shares for batch in batches)


def rates(kind: str, num_steps: int, warmup: float, shares: list[float] | None = None) -> list[float]:
    """Factor of the learning rate at every step; `shares`: of a time budget after each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    budget = TimeBudget(1000.0 if shares else None)
    scheduler = make_scheduler(optimizer, kind, num_steps, warmup, budget)
    values = []
    for step in range(len(shares) if shares else num_steps):
        values.append(optimizer.param_groups[0]["lr"])
        budget.share = shares[step] if shares else 0.0
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 5, 10, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.25, 1.0])
def test_rate_is_positive_and_never_above_its_peak(kind: str, num_steps: int, warmup: float) -> None:
    values = rates(kind, num_steps, warmup)
    assert all(0 < value <= 1 for value in values), values
    assert max(values) > 0.75 or num_steps < 5 or warmup == 1
    if kind != "constant" and warmup < 1 and num_steps >= 10:
        assert values[-1] < 0.3 * max(values)


def test_fast_runs_ignore_the_clock_and_slow_ones_complete_their_decay() -> None:
    plain = rates("cosine", 100, 0.05)
    slow_start = [min(0.09, 0.03 + step * 0.007) if step < 9 else 0.09 + step * 0.008 for step in range(100)]
    assert rates("cosine", 100, 0.05, shares=slow_start) == plain  # finishes at 0.88 of the budget, with a slow start
    slow = rates("cosine", 1000, 0.05, shares=[(step + 1) / 50 for step in range(50)])
    assert slow[-1] < 0.01  # 50 of 1000 steps, yet the decay is complete
    assert max(slow) > 0.9
    assert 0 < CLOCK_SLACK < 0.5
