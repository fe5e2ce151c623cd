"""Runs the real trainer and keeps every step's gradients and logs. Started by torchrun it is one rank of several:

python -m torch.distributed.run --nproc_per_node 2 gradient_capture.py OUT.pt CONFIG.yaml [CONFIG.yaml ...]
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from finetune.config import RunConfig, load_config
from finetune.training.run import build_trainer  # before transformers: it makes torchvision importable

from transformers import TrainerCallback  # isort: skip


class CaptureGradients(TrainerCallback):
    """Gradients by parameter name, one dictionary per optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.model: Any = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        parameters = self.model.named_parameters()
        self.steps.append({n: p.grad.detach().clone() for n, p in parameters if p.requires_grad and p.grad is not None})


def train_and_capture(config: RunConfig) -> dict[str, Any]:
    """Gradients and logs of every step, and the final weights of what trains."""
    trainer, _, _ = build_trainer(config)
    capture = CaptureGradients()
    capture.model = trainer.model
    trainer.add_callback(capture)
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"gradients": capture.steps, "logs": logs, "weights": weights, "rank": trainer.args.process_index}


if __name__ == "__main__":
    torch.set_num_threads(1)
    captured = [train_and_capture(load_config(path)) for path in sys.argv[2:]]
    torch.save(captured, f"{sys.argv[1]}.{captured[0]['rank']}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.destroy_process_group()
