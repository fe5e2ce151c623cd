"""DeepSpeed ZeRO: building the model whole before it is divided, and refusing what division cannot do.

ZeRO-3 lets transformers divide every parameter while a checkpoint is read. Then new embedding rows, PEFT's token rows,
LoRA matrices and heads would be initialised from the empty shells that are left on each rank. So every rank builds the
whole model in host memory, and DeepSpeed divides it when the optimizer is made; nothing of it is on a GPU before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers.integrations import deepspeed as integration

from finetune.config import RunConfig
from finetune.data.dataset import ForensicDataset
from finetune.errors import ConfigError
from finetune.models.loading import Bundle


def zero_stage(args: Any) -> int:
    """The ZeRO stage of a run's TrainingArguments; 0 without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return int(plugin.zero_stage) if plugin is not None else 0


@contextlib.contextmanager
def built_whole(args: Any) -> Iterator[None]:
    """Inside, transformers and PEFT do not see that ZeRO-3 will be used."""
    config = args.deepspeed_plugin.hf_ds_config if zero_stage(args) == 3 else None
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


def check_sharding(config: RunConfig, args: Any, *datasets: ForensicDataset | None) -> None:
    """Refuse what ZeRO-3 cannot do, before anything is divided.

    Raises:
        ConfigError: 4-bit weights, records without images, or weights that would not be gathered on saving.
    """
    if zero_stage(args) != 3:
        return
    if config.model.quantization != "none":
        raise ConfigError(
            f"model.quantization: {config.model.quantization} cannot be divided by ZeRO-3; use zero2 with it (4-bit "
            "weights are small), or quantization: none"
        )
    settings = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if not settings.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            "ZeRO-3 would write checkpoints without safetensors; set zero3_save_16bit_model: true in the accelerate "
            "configuration (configs/accelerate/zero3.yaml has it)"
        )
    for dataset in datasets:
        without = [record.id for record in dataset.records if not record.images] if dataset is not None else []
        if without:
            raise ConfigError(
                f"record '{without[0]}' and {len(without) - 1} others have no image: under ZeRO-3 every rank must run "
                "the same modules at the same time, and a text-only batch leaves the vision tower out; use zero2, or "
                "give these records an image"
            )


def keep_heads_whole(bundle: Bundle, args: Any) -> None:
    """Have ZeRO-3 leave every head weight whole on every rank, and gather the others only when they are used.

    How often a head's layers run depends on the sizes of a rank's images, and gathering is a step of all ranks at once.
    Parameters up to the size of the largest head weight then stay whole, which is little beside the model: the released
    ones have no other weights of that size but biases, norms and the key and value projections.
    """
    if zero_stage(args) != 3:
        return
    settings = args.deepspeed_plugin.hf_ds_config.config["zero_optimization"]
    largest = max((p.numel() for module in bundle.base.head_modules() for p in module.parameters()), default=0)
    given = settings.get("stage3_param_persistence_threshold", 0)
    settings["stage3_param_persistence_threshold"] = max(largest, int(given) if given != "auto" else 0)
    settings["stage3_prefetch_bucket_size"] = 0  # ranks would gather ahead along different traces
