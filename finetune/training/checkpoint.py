"""Weights of a checkpoint folder back into a model that is already built; optimizer and schedule are the Trainer's."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers.utils import logging

from finetune.errors import ModelLoadError
from finetune.models.loading import Bundle, refuse_pickle


def load_weights(bundle: Bundle, folder: str | Path) -> None:
    """Copy a checkpoint's weights into a bundle's model, in place.

    Handing the file's tensors to `load_state_dict` would find nothing: names on disk are those of the released
    checkpoints, in memory they begin with `model.visual` and `model.language_model`.

    Raises:
        ModelLoadError: the folder is incomplete or belongs to another model or another choice of trained groups.
    """
    refuse_pickle(folder)
    if bundle.model is bundle.base:
        _load_whole(bundle, Path(folder))
    else:
        _load_adapter(bundle, Path(folder))


def _load_whole(bundle: Bundle, folder: Path) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is an error below
    try:
        stored, info = type(bundle.base).from_pretrained(
            folder, dtype=bundle.base.dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{folder}: cannot be resumed from: {str(error).splitlines()[0][:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
    state = stored.state_dict()
    own = bundle.base.state_dict()
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"], *(set(own) ^ set(state))])
    odd += [name for name in own if name in state and own[name].shape != state[name].shape]
    if odd:
        raise ModelLoadError(f"{folder}: {len(odd)} weights do not fit the model of this run, e.g. '{odd[0]}'")
    bundle.base.load_state_dict(state)


def _load_adapter(bundle: Bundle, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelLoadError(f"{folder}: no adapter_model.safetensors, but this run trains an adapter; start a new run")
    state = load_file(file)
    own = get_peft_model_state_dict(bundle.model, save_embedding_layers=False)
    odd = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if odd:
        raise ModelLoadError(
            f"{folder}: {len(odd)} adapter tensors do not fit this run, e.g. '{odd[0]}'; resume with the same "
            "train.trainable, lora and heads"
        )
    with torch.no_grad():
        set_peft_model_state_dict(bundle.model, state)
