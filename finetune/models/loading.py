"""Model, tokenizer and processor as one unit: loading from hub names, plain folders, our folders and adapters; saving.

The tokenizer gains the forensic tokens here, the embedding rows are initialised here, and everything a folder needs to
be loaded again is written here. safetensors only: no pickle is ever loaded.
"""

from __future__ import annotations

import json
import logging as stdlib_logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoProcessor, Qwen2VLImageProcessorPil, logging  # noqa: E402

from finetune.config import HeadsConfig, ModelConfig, to_dict  # noqa: E402
from finetune.errors import MissingDependencyError, ModelLoadError  # noqa: E402
from finetune.models.plain import SECTION, attach_heads, read_config, saved_heads  # noqa: E402
from finetune.models.qwen_forensics_model import (  # noqa: E402
    HEAD_MODULES,
    QwenForensicsConfig,
    QwenForensicsForConditionalGeneration,
)
from finetune.models.vision_parts import PARTS_SECTION, BaseTower, write_parts  # noqa: E402
from finetune.special_tokens import SpecialTokens  # noqa: E402

# bitsandbytes, which PEFT imports, warns that a kernel it could download is missing; it works without.
stdlib_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(stdlib_logging.ERROR)
# PEFT 0.21 asks a model for its checkpointing under the name that transformers 5.23 has replaced.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

ADAPTER_CONFIG = "adapter_config.json"
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""Beginnings of the names of pickles that a checkpoint has beside its weights; the Trainer reads tensors only."""
SETTINGS = "forensics.json"


@dataclass
class Bundle:
    """A model with the processor and the vocabulary that belong to it.

    model: a `QwenForensicsForConditionalGeneration`, or a PeftModel around one.
    has_new_heads: whether the heads are freshly initialised, so that their verdicts mean nothing yet.
    tower: the base of heads on the vision tower, whose weights are not copied on saving; None: saved as a whole model
        or as an adapter.
    settings: what other layers want to find again beside the weights (template, layout, origin); plain JSON, not read
    here.
    """

    model: nn.Module
    processor: Any
    tokens: SpecialTokens
    settings: dict[str, Any] = field(default_factory=dict)
    has_new_heads: bool = False
    tower: BaseTower | None = None

    @property
    def base(self) -> QwenForensicsForConditionalGeneration:
        """The model without a PEFT wrapper."""
        return unwrap(self.model)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer


def unwrap(model: Any) -> QwenForensicsForConditionalGeneration:
    """The `QwenForensicsForConditionalGeneration` inside any wrapper (DDP, DeepSpeed, PEFT)."""
    while not isinstance(model, QwenForensicsForConditionalGeneration):
        inner = getattr(model, "module", None) or getattr(getattr(model, "base_model", None), "model", None)
        if inner is None:
            raise TypeError(f"found a {type(model).__name__}, expected a QwenForensicsForConditionalGeneration")
        model = inner
    return model


def load_bundle(
    config: ModelConfig,
    tokens: SpecialTokens | None = None,
    heads: HeadsConfig | None = None,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    device_map: Any = None,
    build_base: Callable[[dict[str, Any]], QwenForensicsForConditionalGeneration] | None = None,
) -> Bundle:
    """Load a checkpoint of any kind with its processor.

    A plain Qwen2.5-VL checkpoint gets `tokens` and `heads` (or their defaults); a folder saved by this project keeps
    its own, and `heads`, when given, must have the same shapes. A folder with `adapter_config.json` is loaded on its
    base model, a plain folder exported by `forensics merge --plain` with the heads beside it.

    Args:
        build_base: makes the base model from the fields of `QwenForensicsConfig` instead of reading `config.path`
            (`finetune.models.shared_base` puts several adapters on one base with it).

    Raises:
        ModelLoadError: folder missing or incomplete, weights that do not fit, an adapter that matches nothing.
    """
    adapter = config.adapter or (config.path if (Path(config.path) / ADAPTER_CONFIG).is_file() else None)
    source = adapter or config.path
    _check_folder(source)
    saved = read_config(source)
    from finetune.models.vision_loading import open_vision, reads_tower  # which itself loads through this module

    if reads_tower(config, saved, heads):
        return open_vision(config, heads, min_pixels=min_pixels, max_pixels=max_pixels, device_map=device_map)
    processor, tokens, new_ids = load_vocabulary(source, tokens, min_pixels, max_pixels)
    base_path = base_model_path(adapter) if adapter and adapter == config.path else config.path
    _check_folder(base_path)
    if adapter and read_config(base_path) is None:  # a plain base lacks rows for the tokens the adapter brings
        new_ids = processor.tokenizer.convert_tokens_to_ids(list(tokens.all))
    settings_of_model = _model_settings(saved, heads, processor, tokens)
    settings_of_model["has_language"] = config.language != "skip" and (saved is None or saved.has_language)
    if build_base is not None:
        model = build_base(settings_of_model)
    else:
        model = load_model(base_path, config, settings_of_model, device_map)
    _check_tokenizer(source, processor, model)
    if model.config.has_language:
        grow_embeddings(model, len(processor.tokenizer), new_ids)
    settings = saved_settings(source)
    if adapter:
        wrapped = load_adapter(model, adapter)
        is_new = model.has_heads and read_config(base_path) is None and not _brings_heads(wrapped)
        return Bundle(wrapped, processor, tokens, settings, has_new_heads=is_new)
    return Bundle(model, processor, tokens, settings, has_new_heads=model.has_heads and saved is None)


def load_vocabulary(
    source: str | Path,
    tokens: SpecialTokens | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[Any, SpecialTokens, list[int]]:
    """What turns records into ids, without any weights: processor, forensic tokens, and their ids that are new.

    A folder saved by this project has its own tokens; any other gets `tokens` or the default ones.

    Raises:
        ModelLoadError: as `load_processor` and `add_forensic_tokens`.
    """
    processor = load_processor(source, min_pixels, max_pixels)
    saved = read_config(source)
    if saved is not None and saved.cls_token_ids:
        tokens = SpecialTokens(saved.num_cls, saved.num_mask)
    tokens = tokens or SpecialTokens()
    return processor, tokens, add_forensic_tokens(processor.tokenizer, tokens)


def saved_settings(source: str | Path) -> dict[str, Any]:
    """What other layers wrote beside a model (`Bundle.settings`); {} where there is nothing."""
    file = Path(source) / SETTINGS
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for section in (SECTION, PARTS_SECTION):
        settings.pop(section, None)  # describes the folder's files, not the model
    return settings


def load_processor(path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The official processor with the PIL image backend (CPU and GPU then see the same pixels).

    Args:
        min_pixels, max_pixels: bounds of the resized image's area; None keeps the checkpoint's.

    Raises:
        ModelLoadError: no tokenizer or processor in the folder.
    """
    _check_folder(str(path))
    try:
        processor = AutoProcessor.from_pretrained(path)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path}: no Qwen2.5-VL tokenizer and processor could be read ({_first_line(error)}); point model.path "
            f"at a "
            "complete checkpoint folder"
        ) from error
    size = dict(image_processor.size)
    image_processor.size = {
        "shortest_edge": min_pixels or size["shortest_edge"],
        "longest_edge": max_pixels or size["longest_edge"],
    }
    processor.image_processor = image_processor
    return processor


def add_forensic_tokens(tokenizer: Any, tokens: SpecialTokens) -> list[int]:
    """Add the tokens a tokenizer lacks, as special tokens; returns the ids that are new.

    Raises:
        ModelLoadError: two tokens share an id, or one is split into pieces.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens.all if token not in vocabulary]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(tokens.all))
    if len(set(ids)) != len(ids) or tokenizer.encode(tokens.run, add_special_tokens=False) != ids:
        raise ModelLoadError(f"the tokenizer does not give the {len(ids)} forensic tokens one id each: found {ids}")
    return [token_id for token, token_id in zip(tokens.all, ids, strict=True) if token in missing]


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
        wrapped = PeftModel.from_pretrained(model, path, is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelLoadError(
            f"{path}: the adapter does not fit this base model ({_first_line(error)}); "
            "load it on the model it was trained on"
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


def _brings_heads(wrapped: Any) -> bool:
    """Whether an adapter holds trained heads; without them a plain base's heads are random."""
    return "cls_head" in (wrapped.peft_config[wrapped.active_adapter].modules_to_save or ())


def save_bundle(
    bundle: Bundle, out_dir: str | Path, state_dict: dict[str, Any] | None = None, max_shard_size: str | None = None
) -> None:
    """Write a folder that `load_bundle` opens: weights, adapter or vision parts, our config, tokenizer, processor."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Any] = {}
    if bundle.tower is not None:
        sections[PARTS_SECTION] = write_parts(bundle.model, bundle.tower, out_dir, state_dict)
    else:
        _write_weights(bundle, out_dir, state_dict, max_shard_size)
    save_processor(bundle.processor, out_dir)
    settings = json.dumps({**bundle.settings, **sections}, indent=2, ensure_ascii=False)
    (out_dir / SETTINGS).write_text(settings, encoding="utf-8")


def _write_weights(
    bundle: Bundle, out_dir: Path, state_dict: dict[str, Any] | None, max_shard_size: str | None
) -> None:
    """A whole model, or an adapter with its configuration."""
    arguments: dict[str, Any] = {} if bundle.model is bundle.base else {"save_embedding_layers": False}
    if max_shard_size is not None:
        arguments["max_shard_size"] = max_shard_size
    bundle.model.save_pretrained(out_dir, state_dict=state_dict, **arguments)
    if bundle.model is not bundle.base:
        bundle.base.config.save_pretrained(out_dir)


def save_processor(processor: Any, out_dir: str | Path) -> None:
    """Write processor and tokenizer, without truncation or padding an earlier call may have left in the tokenizer."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    processor.save_pretrained(out_dir)


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
        reason = _first_line(error)
        if "mismatched" in reason:
            reason = (
                "its weights have other shapes than this configuration; leave `heads` and `tokens` as they were saved"
            )
        raise ModelLoadError(f"{path}: the model cannot be loaded: {reason}") from error
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


def _model_settings(
    saved: QwenForensicsConfig | None, heads: HeadsConfig | None, processor: Any, tokens: SpecialTokens
) -> dict[str, Any]:
    ids = processor.tokenizer.convert_tokens_to_ids
    settings: dict[str, Any] = {
        "cls_token_ids": ids(list(tokens.cls)),
        "mask_token_ids": ids(list(tokens.mask)),
        "image_mean": list(processor.image_processor.image_mean),
        "image_std": list(processor.image_processor.image_std),
    }
    if heads is not None:
        settings["heads"] = to_dict(heads)
    elif saved is not None:
        settings["heads"] = saved.heads
    return settings


def _check_config(path: str) -> None:
    """Without config.json transformers would build the default model, of 7 billion parameters."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelLoadError(f"{path}: the model cannot be loaded: no config.json; give a complete checkpoint folder")


def _check_tokenizer(path: str, processor: Any, model: QwenForensicsForConditionalGeneration) -> None:
    """Without its vocabulary files transformers makes an empty tokenizer, whose ids mean nothing to the model."""
    expected = {"<|image_pad|>": model.config.image_token_id, "<|vision_start|>": model.config.vision_start_token_id}
    for token, token_id in expected.items():
        found = processor.tokenizer.convert_tokens_to_ids(token)
        if found != token_id:
            raise ModelLoadError(
                f"{path}: the tokenizer gives {token} the id {found}, the model expects {token_id}; copy the "
                f"tokenizer files "
                "(tokenizer.json, or vocab.json and merges.txt) of this model into the folder"
            )


def is_plain(path: str) -> bool:
    """Whether a base folder or hub name is a released Qwen2.5-VL: without trained heads, without forensic tokens."""
    _check_folder(path)
    return read_config(path) is None


def base_model_path(adapter: str) -> str:
    """The base model that an adapter folder names.

    Raises:
        ModelLoadError: it names none.
    """
    base = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelLoadError(
            f"{adapter}: {ADAPTER_CONFIG} names no base model; give it as model.path with model.adapter"
        )
    return str(base)


def _check_folder(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists() or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ModelLoadError(
            f"model folder '{path}' does not exist; give an existing folder or a hub name like org/model"
        )


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
