"""One base model in memory under any number of adapters, each with heads, token rows and LoRA of its own.

Every adapter gets its own tree of modules around the *same* frozen tensors, so switching between adapters switches no
state: outputs are those of the adapter loaded alone, bit by bit, and heads may differ in kind and size, which PEFT's
named adapters (one `modules_to_save` architecture for all) cannot do.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from finetune.config import HeadsConfig, ModelConfig, to_dict
from finetune.config.model_folder import ADAPTER_CONFIG
from finetune.errors import ModelLoadError
from finetune.models.loading import Bundle, is_plain, load_bundle, load_model, load_processor
from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration
from finetune.special_tokens import SpecialTokens


class SharedBase:
    """A base model that is read once.

    Args:
        config: `path` of a plain Qwen2.5-VL or of a whole model of ours; `adapter` is not used.

    The memory taken is that of the base, plus each adapter's own tensors; on a plain base also one copy of the
    embedding per set of forensic tokens, since their rows are initialised in it and the base stays as released. Heads
    on the vision tower read no tokens and need no such copy; with `language: skip` the language model is left out.
    """

    def __init__(self, config: ModelConfig) -> None:
        if (Path(config.path) / ADAPTER_CONFIG).is_file():
            raise ModelLoadError(f"{config.path} is an adapter, not a base model; give the base it was trained on")
        self.config = replace(config, adapter=None)
        self.is_plain = is_plain(config.path)
        self._bundle = self._load_plain() if self.is_plain else load_bundle(self.config)
        self._embeddings: dict[tuple[int, ...], tuple[nn.Parameter, nn.Parameter]] = {}

    def base(self) -> Bundle:
        """The base alone: a plain one exactly as released, without heads and without forensic tokens."""
        return self._bundle

    def adapter(self, path: str | Path) -> Bundle:
        """The base with one adapter, or with one folder of vision parts; equal to `load_bundle` of both.

        Raises:
            ModelLoadError: as `load_bundle`.
        """
        return load_bundle(replace(self.config, adapter=str(path)), build_base=self._share)

    def _load_plain(self) -> Bundle:
        settings = {"heads": to_dict(HeadsConfig(enabled=False)), "has_language": self.config.language != "skip"}
        processor = load_processor(self.config.path)
        model = load_model(self.config.path, self.config, settings)
        return Bundle(model, processor, SpecialTokens())

    def _share(self, settings: dict[str, Any]) -> QwenForensicsForConditionalGeneration:
        """A new tree of modules around the base's tensors, with the heads of `settings`."""
        source = self._bundle.base
        tensors = [*source.parameters(), *source.buffers()]
        model = copy.deepcopy(source, {id(tensor): tensor for tensor in tensors})
        if self.is_plain:
            model.replace_heads({"heads": {}, **settings})
            if ids := (*settings.get("cls_token_ids", ()), *settings.get("mask_token_ids", ())):
                self._own_embeddings(model, ids)
        return model

    def _own_embeddings(self, model: QwenForensicsForConditionalGeneration, ids: tuple[int, ...]) -> None:
        """Matrices whose rows `ids` may be written, shared by the adapters that write the same rows the same way."""
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        if ids not in self._embeddings:
            is_tied = inputs.weight is outputs.weight
            first = _copy(inputs.weight)
            self._embeddings[ids] = (first, first if is_tied else _copy(outputs.weight))
        inputs.weight, outputs.weight = self._embeddings[ids]


def _copy(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
