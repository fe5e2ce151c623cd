"""What turns texts and images into ids and pixels: processor, tokenizer, the forensic tokens it gains. No weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

from transformers import AutoProcessor, Qwen2VLImageProcessorPil  # noqa: E402

from finetune.config.model_folder import is_model_folder  # noqa: E402
from finetune.errors import ModelLoadError  # noqa: E402
from finetune.models.plain import read_config  # noqa: E402
from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration  # noqa: E402
from finetune.special_tokens import SpecialTokens  # noqa: E402


def load_vocabulary(
    source: str | Path,
    tokens: SpecialTokens | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[Any, SpecialTokens, list[int]]:
    """What turns records into ids, without any weights: processor, forensic tokens, and their ids that are new.

    A folder saved by this project has its own tokens; any other gets `tokens`, or those its tokenizer holds (a plain
    folder of `forensics merge`), or the default ones.

    Raises:
        ModelLoadError: as `load_processor` and `add_forensic_tokens`.
    """
    processor = load_processor(source, min_pixels, max_pixels)
    saved = read_config(source)
    if saved is not None and saved.cls_token_ids:
        tokens = SpecialTokens(saved.num_cls, saved.num_mask)
    tokens = tokens or SpecialTokens.in_vocabulary(processor.tokenizer.get_vocab()) or SpecialTokens()
    return processor, tokens, add_forensic_tokens(processor.tokenizer, tokens)


def load_processor(path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The official processor with the PIL image backend (CPU and GPU then see the same pixels).

    Args:
        min_pixels, max_pixels: bounds of the resized image's area; None keeps the checkpoint's.

    Raises:
        ModelLoadError: no tokenizer or processor in the folder.
    """
    check_folder(str(path))
    try:
        processor = AutoProcessor.from_pretrained(path)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            not_found(path, error)
            or f"{path}: no Qwen2.5-VL tokenizer and processor could be read ({first_line(error)}); point model.path "
            "at a complete checkpoint folder"
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


def save_processor(processor: Any, out_dir: str | Path) -> None:
    """Write processor and tokenizer, without truncation or padding an earlier call may have left in the tokenizer."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    processor.save_pretrained(out_dir)


def check_tokenizer(path: str, processor: Any, model: QwenForensicsForConditionalGeneration) -> None:
    """Without its vocabulary files transformers makes an empty tokenizer, whose ids mean nothing to the model.

    Raises:
        ModelLoadError: an id of the tokenizer is not the model's.
    """
    expected = {"<|image_pad|>": model.config.image_token_id, "<|vision_start|>": model.config.vision_start_token_id}
    for token, token_id in expected.items():
        found = processor.tokenizer.convert_tokens_to_ids(token)
        if found != token_id:
            raise ModelLoadError(
                f"{path}: the tokenizer gives {token} the id {found}, the model expects {token_id}; copy the "
                f"tokenizer files "
                "(tokenizer.json, or vocab.json and merges.txt) of this model into the folder"
            )


def check_folder(path: str) -> None:
    """Refuse what looks like a path on this machine and is no folder, and a run's folder, whose model is in `best`.

    Raises:
        ModelLoadError: as said.
    """
    first = path.partition("/")[0]
    looks_local = (
        path.startswith((".", "/", "~")) or Path(path).exists() or path.count("/") != 1 or Path(first).is_dir()
    )
    if looks_local and not Path(path).is_dir():
        raise ModelLoadError(
            f"model folder '{path}' does not exist; give an existing folder or a hub name like org/model"
            + (f" ('{first}' is a folder here, so this is taken for a path)" if Path(first).is_dir() and first else "")
        )
    if not is_model_folder(path) and (Path(path) / "best").is_dir():
        raise ModelLoadError(f"'{path}' is the folder of a training run, not of a model; give {Path(path) / 'best'}")


def not_found(path: str | Path, error: BaseException) -> str | None:
    """What to say of a name that is no folder here and could not be read as one of the hub; None where it is a folder.

    `runs/none` may be meant as either: that the folder is missing comes first, then what became of the hub.
    """
    if Path(path).is_dir():
        return None
    return (
        f"model folder '{path}' does not exist, and no model of that name could be read from the hub "
        f"({first_line(error)}); give an existing folder or a hub name like org/model"
    )


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
