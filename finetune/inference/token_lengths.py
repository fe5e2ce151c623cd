"""How many tokens a record takes for a named model: what `forensics audit --config/--model` counts with.

Rendered as preview and training render it; reads image headers, no pixels and no weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from finetune.data.dataset import ForensicDataset
from finetune.inference.preview import rendering
from finetune.schema import Record
from finetune.special_tokens import SpecialTokens

_UNLIMITED = 2**31


def token_counter(
    config_path: str | None, model_path: str | None, max_length: int | None
) -> tuple[Callable[[Record], int], int, SpecialTokens]:
    """A function from a record to its number of tokens, the limit, and the model's forensic tokens.

    Args:
        config_path, model_path: a training YAML or a model folder, one of them.
        max_length: limit; wins over the configuration's `data.max_length`.

    Raises:
        ConfigError, ModelLoadError: a file or folder that cannot be used. The function raises `DataFormatError` for a
            record that cannot be rendered, however long.
    """
    named = argparse.Namespace(config=config_path, model=model_path, overrides=[])
    data, processor, tokens, template, _ = rendering(named)
    dataset = ForensicDataset([], processor, tokens, replace(data, max_length=_UNLIMITED))
    if template is not None:
        dataset.template = template

    def count(record: Record) -> int:
        dataset.records = [record]
        return dataset.num_tokens(0)

    return count, max_length or data.max_length, tokens
