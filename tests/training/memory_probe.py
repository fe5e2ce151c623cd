"""Trains two steps and prints by how many bytes the process grew: python memory_probe.py SMALL.yaml CONFIG.yaml"""

from __future__ import annotations

import resource
import sys

import torch

from finetune.config import load_config
from finetune.training.run import train


def peak() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(load_config(sys.argv[1]))  # the small configuration: everything is imported and used once
    before = peak()
    train(load_config(sys.argv[2]))
    print("grew by", peak() - before)
