"""Parts of a half-precision model that train whole are held in float32; nothing else is converted here.

PEFT holds LoRA and token rows so already. A weight of 0.02 in bfloat16 has neighbours 1.2e-4 away: AdamW's steps at a
learning rate of 1e-5 would be rounded away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.models.groups import group_of
from finetune.models.loading import Bundle
from finetune.training.sharding import zero_stage

HELD = ("projector", "vision_top")


def hold_in_float32(bundle: Bundle, groups: Sequence[str], args: Any) -> None:
    """Convert what trains of `HELD` to float32, where steps run under autocast.

    `lm_full` and `vision_full` stay as loaded (`model.dtype: float32` holds them so, at twice the memory); DeepSpeed
    has float32 copies of its own.

    Args:
        groups: `train.trainable`. args: the run's TrainingArguments.
    """
    if zero_stage(args) or not (args.bf16 or args.fp16):
        return
    for name, parameter in bundle.model.named_parameters():
        if parameter.requires_grad and group_of(name, groups) in HELD:
            parameter.data = parameter.data.float()
