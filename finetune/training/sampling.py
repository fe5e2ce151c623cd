"""Which records an epoch and an evaluation see: class-balanced draws, and shares of an evaluation without repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ClassBalancedSampler(Sampler[int]):
    """Indices of one epoch: pairs of one real and one tampered record, in random order within a pair.

    Every class is an endless walk through fresh shuffles of its members, and an epoch takes up where the one before
    ended: a rare class is repeated, and no record waits longer than two walks of its class. An epoch has as many draws
    as there are records.

    Partners (a real and a tampered record of the same picture) are drawn together where an epoch has both: what the
    picture shows then cancels in the batch's gradient. Which records an epoch draws does not depend on it.

    Args:
        labels: one per record; None (unlabelled) is a class of its own and keeps its natural share.
        pairs: one per record, the same value for partners, None for a record without; None for no partners at all.
        seed: with the epoch, decides every draw.
    """

    def __init__(self, labels: Sequence[int | None], pairs: Sequence[str | None] | None = None, seed: int = 0) -> None:
        self.unlabelled = [i for i, label in enumerate(labels) if label is None]
        self.classes = [members for value in (0, 1) if (members := [i for i, x in enumerate(labels) if x == value])]
        self.pairs = list(pairs) if pairs is not None else [None] * len(labels)
        self.length = len(labels)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = _generator(self.seed, 2, self.epoch)
        count = self.length - len(self.unlabelled)
        shares = [len(range(number, count, len(self.classes))) for number in range(len(self.classes))]
        walks = [self._walk(number, share) for number, share in enumerate(shares)]
        couples = self._couples(*walks) if len(walks) == 2 else [[index] for walk in walks for index in walk]
        units = [[couple[i] for i in torch.randperm(len(couple), generator=order).tolist()] for couple in couples]
        if self.unlabelled:
            units = [unit for couple in units for unit in self._unless_partners(couple)]
            units += [[i] for i in self.unlabelled]
            units = [units[i] for i in torch.randperm(len(units), generator=order).tolist()]
        return iter([index for unit in units for index in unit])

    def _couples(self, real: list[int], tampered: list[int]) -> list[list[int]]:
        """The draws of two classes two by two, partners together, the others in the order of their walks.

        `real` has as many draws as `tampered` or one more, which then comes last on its own.
        """
        waiting: dict[str, list[int]] = {}
        for place, index in enumerate(tampered):
            if (pair := self.pairs[index]) is not None:
                waiting.setdefault(pair, []).append(place)
        found = [places.pop(0) if (places := waiting.get(self.pairs[index] or "")) else None for index in real]
        others = iter(sorted(set(range(len(tampered))) - {place for place in found if place is not None}))
        places = [next(others, -1) if place is None else place for place in found]
        couples = [[a, tampered[b]] for a, b in zip(real, places, strict=True) if b >= 0]
        return couples + [[a] for a, b in zip(real, places, strict=True) if b < 0]

    def _unless_partners(self, couple: list[int]) -> list[list[int]]:
        is_one = len({self.pairs[index] for index in couple}) == 1 and self.pairs[couple[0]] is not None
        return [couple] if is_one else [[index] for index in couple]

    def _walk(self, number: int, share: int) -> list[int]:
        """This epoch's `share` draws of one class: a window of its endless walk."""
        members = self.classes[number]
        first, shuffles, draws = self.epoch * share, {}, []
        for position in range(first, first + share):
            lap, place = divmod(position, len(members))
            if lap not in shuffles:
                shuffles[lap] = torch.randperm(len(members), generator=_generator(self.seed, number, lap)).tolist()
            draws.append(members[shuffles[lap][place]])
        return draws


def evaluation_batches(count: int, batch_size: int, world_size: int, rank: int) -> tuple[list[list[int]], int]:
    """One rank's batches of an evaluation over `count` records, each of which counts once over all ranks.

    Every rank gets the same number of batches (under ZeRO-3 a forward pass is a collective operation), so some may end
    in one that is only run, not counted.

    Returns:
        The batches as lists of indices, and how many of them count.
    """
    own = list(range(rank, count, world_size))
    batches = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    num_counted = len(batches)
    rounds = -(-len(range(0, count, world_size)) // batch_size)  # of rank 0, which has the most
    return batches + [[0]] * (rounds - num_counted), num_counted


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % (1 << 62)
    return torch.Generator().manual_seed(seed)
