"""Numbers too small to matter count as zero while a model trains on a CPU, which computes with them far more slowly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def denormals_dropped(device: torch.device) -> Iterator[None]:
    """The CPU takes numbers below 1.2e-38 for 0 meanwhile, in this thread and those started by it.

    It computes with them many times slower, and training makes them: the quick start's steps cost 6 % less
    (docs/experiments.md, round 4).
    """
    if device.type != "cpu" or not torch.set_flush_denormal(True):
        yield
        return
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
