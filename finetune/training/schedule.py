"""Learning-rate schedule over training progress, which is counted in steps or, with a time budget, in seconds."""

from __future__ import annotations

import math
import time

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

CLOCK_SLACK = 0.1
"""Share of the budget before the clock counts: a slow first step or one evaluation does not bend the schedule."""


class TimeBudget:
    """Share of a wall-clock budget that is used up; every rank must see the same share, so rank 0's is handed round.

    Args:
        seconds: budget, or None for no limit (the share stays 0).
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.share = 0.0
        self._start = time.monotonic()

    def start(self, elapsed: float = 0.0) -> None:
        """Begin counting; a resumed run has used up `elapsed` seconds before."""
        self._start = time.monotonic() - elapsed
        self.share = min(elapsed / self.seconds, 1.0) if self.seconds else 0.0

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resumption included."""
        return time.monotonic() - self._start

    def elapsed_share(self) -> float:
        """This process's own reading."""
        return self.elapsed() / self.seconds if self.seconds else 0.0


def make_scheduler(
    optimizer: Optimizer, kind: str, num_steps: int, warmup_ratio: float, budget: TimeBudget
) -> LambdaLR:
    """Linear warm-up, then cosine, linear or no decay; the factor is never above 1.

    Without a budget, or while the run is fast enough for it, progress = step / num_steps and the run is reproducible. A
    slower run reads progress from the clock, so that the decay is complete when the budget is.
    """

    def factor(step: int) -> float:
        clock = (budget.share - CLOCK_SLACK) / (1 - CLOCK_SLACK)
        progress = min(max(step / max(num_steps, 1), clock), 1.0)
        if progress < warmup_ratio:
            return max(progress / warmup_ratio, min(1 / max(num_steps, 1) / warmup_ratio, 1.0))
        if kind == "constant":
            return 1.0
        rest = (progress - warmup_ratio) / max(1 - warmup_ratio, 1e-9)
        return 1 - rest if kind == "linear" else 0.5 * (1 + math.cos(math.pi * rest))

    return LambdaLR(optimizer, factor)
