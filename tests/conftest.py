"""Shared by all tests: no network, few threads, and the folder of real data where there is one.

Markers (`slow`, `real_data`, `distributed`, `gpu`) are declared in pyproject.toml.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]


def real_data_dir() -> Path | None:
    """FORENSICS_REAL_DATA, or `../shared/data` beside the repository; None where that is no folder."""
    folder = Path(os.environ.get("FORENSICS_REAL_DATA") or REPO_ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has no data or device for, with the reason."""
    has_data = real_data_dir() is not None
    for item in items:
        if "real_data" in item.keywords and not has_data:
            item.add_marker(pytest.mark.skip(reason="no real data: set FORENSICS_REAL_DATA to its folder"))
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """OMP_NUM_THREADS threads for torch, set only once a test has imported it, so that torch-free tests stay quick."""
    torch = sys.modules.get("torch")
    count = int(os.environ["OMP_NUM_THREADS"])
    if torch is not None and hasattr(torch, "set_num_threads") and torch.get_num_threads() != count:
        torch.set_num_threads(count)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data (photographs, the real tokenizer); skips the test where it is absent."""
    folder = real_data_dir()
    if folder is None:
        pytest.skip("no real data: set FORENSICS_REAL_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL checkpoint with tied embeddings, built once; read only."""
    return _build_tiny(tmp_path_factory.mktemp("tiny") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL checkpoint whose lm_head is a matrix of its own; read only."""
    return _build_tiny(tmp_path_factory.mktemp("tiny") / "untied", tie_word_embeddings=False)


def _build_tiny(folder: Path, *, tie_word_embeddings: bool) -> Path:
    from finetune.data.corpus import tokenizer_corpus
    from finetune.models.tiny import TinyShape, build_tiny

    shape = TinyShape(
        hidden_size=64,
        num_layers=2,
        intermediate_size=128,
        vision_hidden_size=32,
        vision_depth=3,
        vision_intermediate_size=64,
        fullatt_block_indexes=(2,),
        vocab_size=600,
        tie_word_embeddings=tie_word_embeddings,
    )
    return build_tiny(folder, tokenizer_corpus(), shape)


@pytest.fixture(scope="session")
def vision_parts(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as stage C leaves it, on `tiny_dir`: heads on the tower with noise for training, LoRA; read only."""
    import torch

    from finetune.config import HeadsConfig, LoraConfig, ModelConfig, VisionLoraConfig
    from finetune.models.adapters import set_trainable
    from finetune.models.loading import load_bundle, save_bundle

    heads = HeadsConfig(
        source="vision", vision_layers=[0, 2], hidden_size=16, num_layers=1, num_heads=2, num_queries=3
    )  # fmt: skip
    bundle = load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32"), heads=heads)
    groups = ["neck", "cls_head", "mask_head", "vision_lora"]
    bundle = set_trainable(bundle, groups, LoraConfig(), VisionLoraConfig(blocks=[0, 2], r=4, alpha=8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("vision") / "c"
    save_bundle(bundle, folder)
    return folder


@pytest.fixture(scope="session")
def photo_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native JSONL of small generated images of odd sizes, with their files beside it; read only.

    Ids: tampered_224x196, real_112x252 (no mask file), tampered_150x211 (no multiple of 28), real_84x140 (`HxW` mask),
    unmasked_140x84 (tampered, no pixel target), pair (two images), text (no image). Names say HxW.
    """
    import json

    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")

    def picture(name: str, height: int, width: int, box_xyxy: tuple[int, int, int, int] | None = None) -> str:
        rng = np.random.default_rng(height * width)
        rows, columns = np.mgrid[:height, :width]
        smooth = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], axis=-1) * 200 + 20
        pixels = smooth + rng.normal(0, 4, smooth.shape)
        if box_xyxy is not None:
            x0, y0, x1, y1 = box_xyxy
            pixels[y0:y1, x0:x1] = rng.uniform(0, 255, (y1 - y0, x1 - x0, 3))
            mask = np.zeros((height, width), np.uint8)
            mask[y0:y1, x0:x1] = 255
            Image.fromarray(mask).save(folder / f"{name}_mask.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
        return f"{name}.png"

    a = picture("a", 224, 196, (30, 40, 100, 120))
    b = picture("b", 112, 252)
    c = picture("c", 150, 211, (100, 20, 180, 90))
    d = picture("d", 84, 140)
    e = picture("e", 140, 84, (10, 10, 50, 60))
    chat = [
        {"role": "user", "content": "Which image metadata are worth reading?"},
        {"role": "assistant", "content": "The camera, the date and the software."},
    ]
    records = [
        {"id": "tampered_224x196", "images": [a], "labels": [1], "masks": ["a_mask.png"]},
        {"id": "real_112x252", "images": [b], "labels": [0]},
        {"id": "tampered_150x211", "images": [c], "labels": [1], "masks": ["c_mask.png"]},
        {"id": "real_84x140", "images": [d], "labels": [0], "masks": ["84x140"]},
        {"id": "unmasked_140x84", "images": [e], "labels": [1], "polygons": [None]},
        {"id": "pair", "images": [d, c], "labels": [0, 1], "masks": [None, "c_mask.png"]},
        {"id": "text", "messages": chat},
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def saved_model(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder saved by this project: tiny base, seeded heads, settings as training writes them; read only."""
    from finetune.config import HeadsConfig, ModelConfig, NoiseResidualConfig
    from finetune.data.template import load_template
    from finetune.models.loading import load_bundle, save_bundle
    from finetune.special_tokens import SpecialTokens

    heads = HeadsConfig(hidden_size=16, num_layers=1, num_heads=2)
    heads.noise_residual = NoiseResidualConfig(enabled=True)
    bundle = load_bundle(ModelConfig(path=str(tiny_dir)), SpecialTokens(1, 4), heads)
    bundle.settings = {"template": load_template("en").to_dict(), "layout": "tokens_first", "trained": {"seed": 7}}
    out_dir = tmp_path_factory.mktemp("saved") / "best"
    save_bundle(bundle, out_dir)
    return out_dir


@pytest.fixture(scope="session")
def bundle(saved_model: Path) -> object:
    """The saved folder, loaded."""
    from finetune.config import ModelConfig
    from finetune.models.loading import load_bundle

    return load_bundle(ModelConfig(path=str(saved_model)))
