"""Parts of a half-precision model that train whole are held in float32; what they are is `set_trainable`'s part.

PEFT holds LoRA and token rows so already. A weight of 0.02 in bfloat16 has neighbours 1.2e-4 away: AdamW's steps at a
learning rate of 1e-5 would be rounded away.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune.training.sharding import zero_stage


def whole_dtype(args: Any) -> torch.dtype | None:
    """float32 where steps run under autocast, None (as loaded) elsewhere; DeepSpeed has float32 copies of its own.

    Args:
        args: the run's TrainingArguments.
    """
    return torch.float32 if (args.bf16 or args.fp16) and not zero_stage(args) else None
