"""What trains in every ready configuration, at the real sizes on the meta device, against golden lists.

`FORENSICS_WRITE_GOLDEN=1 pytest tests/models/test_adapters_golden.py` writes the lists anew; read the difference before
you commit it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from finetune.config import (
    HeadsConfig,
    LoraConfig,
    RunConfig,
    VisionLoraConfig,
    VisionTopConfig,
    load_config,
    stage_runs,
    to_dict,
)
from finetune.models.adapters import set_trainable
from finetune.models.groups import collapsed, parameter_groups, plain_name
from finetune.models.loading import Bundle
from finetune.models.qwen_forensics_model import QwenForensicsConfig, QwenForensicsForConditionalGeneration
from finetune.models.shapes import RELEASED, build_on_meta, released_shape
from finetune.models.vision_parts import BaseTower
from finetune.special_tokens import SpecialTokens

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "trainable"
FOUND: dict[str, list[str]] = {}
"""Lists that were made before."""
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))


@lru_cache(maxsize=1)
def tiny_settings() -> dict:
    """The configuration of `forensics tiny`'s model."""
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import TinyShape, tiny_config, train_tokenizer

    shape = TinyShape()
    return tiny_config(train_tokenizer(tokenizer_corpus(), shape.vocab_size), shape).to_dict()


def without_heads(size: str) -> Bundle:
    """A released checkpoint."""
    return Bundle(build_on_meta(size, HeadsConfig(enabled=False)), None, SpecialTokens())


def model_for(config: RunConfig) -> Bundle:
    """The configuration's model on the meta device; token ids are those the released tokenizer would give."""
    tokens = SpecialTokens(config.tokens.num_cls, config.tokens.num_mask)
    ids = list(range(500, 500 + tokens.num_cls)), list(range(600, 600 + tokens.num_mask))
    size = real_size(config)
    has_language = config.heads.source == "tokens"
    settings = {
        **(tiny_settings() if size is None else released_shape(size) or {}),
        "heads": to_dict(config.heads),
        "cls_token_ids": ids[0],
        "mask_token_ids": ids[1],
        "has_language": has_language,
        "region_features": config.model.region_features,
    }
    settings.pop("model_type", None)
    with torch.device("meta"):
        model = QwenForensicsForConditionalGeneration(QwenForensicsConfig(**settings))
    tower = None if has_language else BaseTower("base", "0" * 16)  # heads on the tower are saved without it
    return Bundle(model, None, tokens, tower=tower)


def real_size(config: RunConfig) -> str | None:
    """3B or 7B, of the model that a run starts from or of the base under it; None for the tiny one."""
    return next((size for size in RELEASED if size in f"{config.model.base} {config.model.path}"), None)


def trainable(bundle: Bundle, groups: Sequence[str]) -> list[str]:
    """A line per group and one per kind of tensor: how many, of which shape, how many parameters in all."""
    lines = []
    for group, members in parameter_groups(bundle.model, groups).items():
        lines.append(f"{group}: {len(members)} tensors, {sum(p.numel() for _, p in members):,} parameters")
        shapes = {plain_name(name): tuple(p.shape) for name, p in members}
        for key, count in collapsed(list(shapes)).items():
            own = {shape for name, shape in shapes.items() if collapsed([name]) == {key: 1}}
            lines.append(f"  {key} x{count} {' '.join(map(str, sorted(own)))}")
    return lines


def trainable_of(run: RunConfig) -> list[str]:
    """The list of one stage; many configurations share one."""
    tree = to_dict(run)
    size = real_size(run) or "tiny"
    keys = ("tokens", "heads", "lora", "vision_lora", "vision_top")
    key = json.dumps([size, run.model.region_features, run.train.trainable, *(tree[name] for name in keys)])
    if key not in FOUND:
        bundle = set_trainable(model_for(run), run.train.trainable, run.lora, run.vision_lora, run.vision_top)
        FOUND[key] = trainable(bundle, run.train.trainable)
    return FOUND[key]


def described(config: RunConfig) -> str:
    """The list of a run, or of each of its stages."""
    parts = []
    for name, run in [(r.name, r.config) for r in stage_runs(config)] or [("", config)]:
        lines = trainable_of(run)
        parts.append("\n".join([*([f"== {name}"] if name else []), *lines]))
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_trains_is_what_the_golden_list_says(path: Path) -> None:
    golden = GOLDEN / f"{path.stem}.txt"
    found = described(load_config(path))
    if os.environ.get("FORENSICS_WRITE_GOLDEN"):
        golden.write_text(found, encoding="utf-8")
    assert golden.is_file(), f"no golden list {golden.name}; write it with FORENSICS_WRITE_GOLDEN=1 and read it"
    assert found == golden.read_text(encoding="utf-8")


def test_no_golden_list_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {path.stem for path in CONFIGS}


VISION_CASES = {
    "3B vision_lora 15 23 31": ("3B", ["vision_lora"], [15, 23, 31], 15, 1_045_440),
    "7B vision_lora -2 -1": ("7B", ["vision_lora"], [-2, -1], 10, 696_960),
}


@pytest.mark.parametrize("case", VISION_CASES.values(), ids=VISION_CASES)
def test_vision_lora_at_the_real_size(case: tuple[str, list[str], list[int], int, int]) -> None:
    """Five linear layers of each block; parameters worked out by hand from the published sizes."""
    size, groups, blocks, layers, parameters = case
    shape = (1280, 3 * 1280), (1280, 1280), (1280, 3420), (1280, 3420), (3420, 1280)
    assert parameters == len(blocks) * 16 * sum(map(sum, shape))
    bundle = set_trainable(without_heads(size), groups, LoraConfig(), VisionLoraConfig(blocks=blocks))
    members = parameter_groups(bundle.model, groups)["vision_lora"]
    assert len(members) == 2 * layers
    assert sum(p.numel() for _, p in members) == parameters
    wanted = {block % 32 for block in blocks}
    assert {int(plain_name(name).split(".")[3]) for name, _ in members} == wanted


@pytest.mark.parametrize("size", RELEASED)
def test_vision_top_at_the_real_size(size: str) -> None:
    """Attention with biases, the gated MLP with biases, two norms; twice; and the projector where asked for."""
    block = 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    out = RELEASED[size]["hidden_size"]
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * out + out
    for has_merger in (False, True):
        top = VisionTopConfig(blocks=2, merger=has_merger)
        bundle = set_trainable(without_heads(size), ["vision_top"], LoraConfig(), None, top)
        members = parameter_groups(bundle.model, ["vision_top"])["vision_top"]
        assert sum(p.numel() for _, p in members) == 2 * block + has_merger * merger
