"""Weights of a model or an adapter from a folder or hub name; safetensors only, every key must find its place.

New embedding rows are initialised here. Processor and tokenizer are `vocabulary`'s part, both together `loading`'s.
"""

from __future__ import annotations

import json
import logging as stdlib_logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import logging

from finetune.config import ModelConfig
from finetune.config.model_folder import ADAPTER_CONFIG, MODEL_CONFIG
from finetune.errors import MissingDependencyError, ModelLoadError
from finetune.models.plain import attach_heads, saved_heads
from finetune.models.qwen_forensics_model import HEAD_MODULES, QwenForensicsForConditionalGeneration
from finetune.models.vocabulary import first_line, not_found

# bitsandbytes, which PEFT imports, warns that a kernel it could download is missing; it works without.
stdlib_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(stdlib_logging.ERROR)
# PEFT 0.21 asks a model for its checkpointing under the name that transformers 5.23 has replaced.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""Beginnings of the names of pickles that a checkpoint has beside its weights; the Trainer reads tensors only."""


def load_model(
    path: str,
    config: ModelConfig,
    settings: dict[str, Any],
    device_map: Any = None,
    *,
    ignores_heads: bool = False,
) -> QwenForensicsForConditionalGeneration:
    """The model of a plain folder or one of ours, with the configuration fields of `settings`; no adapter.

    Args:
        ignores_heads: leave head weights of the folder unread instead of refusing those without a place.

    Raises:
        ModelLoadError: folder incomplete, pickled, or weights that do not fit.
    """
    arguments: dict[str, Any] = {
        "dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        "attn_implementation": _attention(config.attn_implementation),
        "device_map": device_map,
        **settings,
    }
    if config.quantization == "nf4":
        arguments["quantization_config"] = _nf4()
    _check_config(path)
    refuse_pickle(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # new heads are expected; anything else missing is an error below
    try:
        model, info = QwenForensicsForConditionalGeneration.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, **arguments
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        if "mismatched" in reason:
            reason = (
                "its weights have other shapes than this configuration; leave `heads` and `tokens` as they were saved"
            )
        raise ModelLoadError(not_found(path, error) or f"{path}: the model cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if key.split(".")[0] not in HEAD_MODULES)
    unexpected = sorted(key for key in info["unexpected_keys"])
    if missing:
        raise ModelLoadError(
            f"{path}: {len(missing)} weights are missing, e.g. '{missing[0]}'; this is not a complete checkpoint"
        )
    if not ignores_heads and any(key.split(".")[0] in HEAD_MODULES for key in unexpected):
        raise ModelLoadError(
            f"{path}: the folder holds head weights that this configuration has no place for, e.g. '{unexpected[0]}'; "
            "leave `heads` as they were saved"
        )
    if model.has_heads and Path(path).is_dir() and saved_heads(path) is not None:
        attach_heads(model, path)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights at a CPU's first evaluation into a form that has no gradient afterwards
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def refuse_pickle(path: str | Path) -> None:
    """Weights are read from safetensors only: a pickle can run any code while it is loaded.

    Raises:
        ModelLoadError: the folder's only weights are pickles (`*.bin`, `*.pt`, `*.pth`, `*.ckpt`).
    """
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind))
    weights = [name for name in pickles if not name.startswith(_NO_WEIGHTS)]
    if weights:
        raise ModelLoadError(
            f"{path}: its only weights are a pickle ({', '.join(weights[:3])}), which can run any code when it is "
            "loaded; expected .safetensors: save the model again with safetensors, or download that version"
        )


def grow_embeddings(
    model: QwenForensicsForConditionalGeneration, vocabulary: int, new_ids: list[int], seed: int = 0
) -> None:
    """Make room for `vocabulary` tokens if there is none, and initialise the rows of `new_ids`.

    The released matrices have spare rows (151936 or 152064 for 151665 tokens): they are never shrunk, and only grown
    when a row is really missing. A new row is the mean of the rows in use plus noise of a tenth of their spread, by
    token id.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary > rows:
        model.resize_token_embeddings(vocabulary, pad_to_multiple_of=64, mean_resizing=False)
    if not new_ids:
        return
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    generator = torch.Generator().manual_seed(seed)
    used = min(new_ids)
    with torch.no_grad():
        for weight in matrices.values():
            known = weight[:used].float()
            noise = torch.randn(len(new_ids), weight.shape[1], generator=generator).to(weight.device)
            weight[new_ids] = (known.mean(dim=0) + 0.1 * known.std(dim=0) * noise).to(weight.dtype)


def load_adapter(model: QwenForensicsForConditionalGeneration, path: str | Path, *, is_trainable: bool = False) -> Any:
    """Put a PEFT folder (LoRA, token rows, heads) on a model; every key must find its place.

    Raises:
        ModelLoadError: an adapter key matches nothing in the model, or a part the adapter declares is missing.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights_path = Path(path) / "adapter_model.safetensors"
    refuse_pickle(path)
    if not weights_path.is_file():
        raise ModelLoadError(f"{path}: no adapter_model.safetensors; this is not a complete adapter folder")
    try:
        with safe_open(weights_path, "pt") as stored:
            found = set(stored.keys())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below, in one line
            wrapped = PeftModel.from_pretrained(model, path, is_trainable=is_trainable)
    except SafetensorError as error:
        raise ModelLoadError(
            f"{path}: adapter_model.safetensors cannot be read ({first_line(error)}); copy it again"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]  # torch puts which weight it is on a line of its own
        raise ModelLoadError(
            f"{path}: the adapter does not fit this base model ({reason}); load it on the model it was trained on"
        ) from error
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if found != expected:
        odd = sorted(found ^ expected)
        raise ModelLoadError(
            f"{path}: {len(odd)} of {len(found | expected)} adapter tensors do not fit this base model, e.g. "
            f"'{odd[0]}'; "
            "load it on the model it was trained on"
        )
    return wrapped


def check_adapter(path: str | Path) -> None:
    """Refuse what is no folder of an adapter on this machine.

    Raises:
        ModelLoadError: as said.
    """
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        found = (
            f"no {ADAPTER_CONFIG} in it; a whole model is given as the model" if Path(path).is_dir() else "not there"
        )
        raise ModelLoadError(f"adapter '{path}': {found}; give the folder of an adapter")


def base_model_path(adapter: str) -> str:
    """The base model that an adapter folder names.

    Raises:
        ModelLoadError: it names none, or is no adapter.
    """
    check_adapter(adapter)
    base = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelLoadError(
            f"{adapter}: {ADAPTER_CONFIG} names no base model; give it as model.path with model.adapter"
        )
    return str(base)


def _check_config(path: str) -> None:
    """Without config.json transformers would build the default model, of 7 billion parameters."""
    if Path(path).is_dir() and not (Path(path) / MODEL_CONFIG).is_file():
        raise ModelLoadError(f"{path}: the model cannot be loaded: no config.json; give a complete checkpoint folder")


def _attention(name: str) -> str:
    if name != "auto":
        return name
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise MissingDependencyError(
            "model.quantization: nf4 needs bitsandbytes; install it with: pip install 'qwen-forensics[qlora]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head", "embed_tokens", *HEAD_MODULES],
    )
