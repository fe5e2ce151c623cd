"""The embedded default model: a tiny, randomly initialised Qwen2.5-VL with its own tokenizer, built without any
download.

Same classes, special tokens, chat template, padded vocabulary and file layout as the released checkpoints, so every
YAML runs on it by changing `model.path`. It knows nothing until it is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

from finetune.errors import ConfigError  # noqa: E402

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the tiny model; the defaults train in minutes on two CPU cores."""

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 256
    vision_hidden_size: int = 64
    vision_depth: int = 2
    vision_num_heads: int = 4
    vision_intermediate_size: int = 128
    fullatt_block_indexes: tuple[int, ...] = (1,)
    vocab_size: int = 1024  # learned BPE tokens, before the special ones
    tie_word_embeddings: bool = True


_FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
_MAX_BYTES = 64 * 2**20
"""Of the weights; a released checkpoint has gigabytes."""


def check_free(out_dir: str | Path) -> None:
    """Refuse to write a tiny checkpoint over anything else: a trained model, a released one, other files.

    Raises:
        ConfigError: the folder holds something that `build_tiny` did not write, or is a file.
    """
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give --out a folder")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    weights = folder / "model.safetensors"
    is_large = weights.is_file() and weights.stat().st_size > _MAX_BYTES
    if other := "model.safetensors" if is_large else min(found - _FILES, default=""):
        raise ConfigError(f"{folder} holds '{other}', which is no part of a tiny model; give --out a folder of its own")


def build_tiny(out_dir: str | Path, corpus: Iterable[str], shape: TinyShape | None = None, seed: int = 0) -> Path:
    """Write a tiny Qwen2.5-VL checkpoint (weights, tokenizer, processor, generation config) to `out_dir`.

    Args:
        corpus: texts the byte-level BPE is trained on, in order; the same corpus gives the same vocabulary.
        seed: initialises the weights.

    Returns:
        The folder, loadable with `Qwen2_5_VLForConditionalGeneration.from_pretrained` and `AutoProcessor`.
    """
    shape = shape or TinyShape()
    out_dir = Path(out_dir)
    processor = build_processor(train_tokenizer(corpus, shape.vocab_size))
    processor.save_pretrained(out_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(tiny_config(processor.tokenizer, shape))
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out_dir)
    return out_dir


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (its pre-tokenisation, byte-level BPE, single digits), its vocabulary learned from `corpus`."""
    blank = Qwen2Tokenizer()
    trainer_backend = Tokenizer(models.BPE())
    trainer_backend.normalizer = blank.backend_tokenizer.normalizer
    trainer_backend.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer_backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    trainer_backend.train_from_iterator(corpus, trainer)
    learned = json.loads(trainer_backend.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=merges, unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 32768
    return tokenizer


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """The official processor around a tokenizer, with Qwen2.5-VL's image constants."""
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    return Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(tokenizer: Qwen2Tokenizer, shape: TinyShape) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL configuration; the embedding has at least 64 spare rows, as the released checkpoints do."""
    token_id = tokenizer.convert_tokens_to_ids
    head_dim = shape.hidden_size // shape.num_heads
    temporal = head_dim // 8
    spatial = (head_dim // 2 - temporal) // 2
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64 * ((len(tokenizer) + 63) // 64 + 1),
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [temporal, spatial, head_dim // 2 - temporal - spatial],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": shape.tie_word_embeddings,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": shape.vision_intermediate_size,
            "num_heads": shape.vision_num_heads,
            "out_hidden_size": shape.hidden_size,
            "fullatt_block_indexes": list(shape.fullatt_block_indexes),
            "window_size": 112,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=shape.tie_word_embeddings,
    )
