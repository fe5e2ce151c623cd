"""DeepSpeed ZeRO: building the model whole before it is divided, and refusing what division cannot do.

ZeRO-3 lets transformers divide every parameter while a checkpoint is read. Then new embedding rows, PEFT's token rows,
LoRA matrices and heads would be initialised from the empty shells that are left on each rank. So every rank builds the
whole model in host memory, and DeepSpeed divides it when the optimizer is made; nothing of it is on a GPU before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from transformers.integrations import deepspeed as integration

from finetune.config import RunConfig
from finetune.data.dataset import ForensicDataset
from finetune.errors import ConfigError
from finetune.models.loading import Bundle

logger = logging.getLogger(__name__)


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
    if zero_stage(args) and (args.bf16 or args.fp16):
        logger.warning(
            "DeepSpeed in %s computes with heads and new token rows in that precision too (and stores them so in "
            "checkpoints); their float32 copies live in its optimizer states. DDP keeps them in float32",
            "bf16" if args.bf16 else "fp16",
        )
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
    """Have ZeRO-3 gather all head weights before a forward pass, and hold them until the optimizer's step.

    How often a head's layers run depends on the sizes of a rank's images, and gathering is a step of all ranks at once:
    gathered where they are used, the ranks would wait for each other with different tensors. `unhook_heads` is the
    second half.
    """
    if zero_stage(args) != 3:
        return
    modules = bundle.base.head_modules()
    bundle.base.register_forward_pre_hook(lambda *_: _hold([p for module in modules for p in module.parameters()]))


def unhook_heads(bundle: Bundle, args: Any) -> None:
    """Take DeepSpeed's gathering hooks off the heads' layers, once they are in place.

    They would also record the order of all layers, which must be the same on every rank.
    """
    if zero_stage(args) != 3:
        return
    for head in bundle.base.head_modules():
        for module in head.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()


def _hold(parameters: list[Any]) -> None:
    """Gather divided parameters and mark them as in use; DeepSpeed takes the mark away when it divides them again."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    absent = [parameter for parameter in divided if parameter.ds_status.name == "NOT_AVAILABLE"]
    if absent:
        absent[0].all_gather(absent)
    for parameter in divided:
        parameter.ds_active_sub_modules.add("held")
