"""Class-balanced sampling: real and tampered records are drawn equally often, whatever their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ClassBalancedSampler(Sampler[int]):
    """Indices of one epoch, alternating between the classes.

    Every class is shuffled and walked through without replacement, and shuffled anew when it is exhausted, so a rare class
    is repeated and none is left out for long. An epoch has as many draws as there are records.

    Args:
        labels: one per record; None (unlabelled) is a class of its own and keeps its natural share.
        seed: with the epoch, decides every draw.
    """

    def __init__(self, labels: Sequence[int | None], seed: int = 0) -> None:
        self.labels = list(labels)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        unlabelled = [i for i, label in enumerate(self.labels) if label is None]
        classes = [[i for i, label in enumerate(self.labels) if label == value] for value in (0, 1)]
        classes = [members for members in classes if members]
        draws = self._balanced(classes, len(self.labels) - len(unlabelled), generator)
        if unlabelled:
            draws += unlabelled
            draws = [draws[i] for i in torch.randperm(len(draws), generator=generator).tolist()]
        return iter(draws)

    @staticmethod
    def _balanced(classes: list[list[int]], count: int, generator: torch.Generator) -> list[int]:
        queues: list[list[int]] = [[] for _ in classes]
        draws: list[int] = []
        while len(draws) < count:
            for members, queue in zip(classes, queues, strict=True):
                if not queue:
                    queue += [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
                draws.append(queue.pop())
        return draws[:count]
