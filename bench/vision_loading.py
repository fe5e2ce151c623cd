"""Start-up of a model whose heads read the vision tower alone, with the language model left out and with it.

    python bench/vision_loading.py [--language-gb 0.5 2] [--tower 3b] [--out FILE.json]

Prints JSON lines. Sharded bfloat16 checkpoints with random weights: the tower of Qwen2.5-VL-3B (or a small one) and
language models of growing size. Every load runs in a process of its own and ends with one value read on every page of
every weight, since safetensors are mapped, not copied, on a CPU. Peak: the kernel's high-water mark of resident memory
(VmHWM) less what the process held after its imports. Bytes: of the tensors taken from the files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, __version__  # noqa: E402

from finetune.data.corpus import tokenizer_corpus  # noqa: E402
from finetune.models.shapes import RELEASED, VISION  # noqa: E402
from finetune.models.tiny import TinyShape, build_processor, tiny_config, train_tokenizer  # noqa: E402

TOWERS: dict[str, dict[str, Any]] = {
    "3b": VISION,
    "small": {"depth": 3, "hidden_size": 320, "num_heads": 4, "intermediate_size": 856, "patch_size": 14,
              "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [2]},
}  # fmt: skip


def build(folder: Path, tower: str, language_gb: float) -> int:
    """Write a checkpoint in shards of 500 MB; returns the bytes of its language model.

    The language model has the width and layers of the 3B's; as many layers as fit `language_gb`.
    """
    processor = build_processor(train_tokenizer(tokenizer_corpus(), 600))
    processor.save_pretrained(folder)
    shape = RELEASED["3B"]
    hidden, shared = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    per_layer = 2 * (2 * hidden**2 * (1 + shared) + 3 * hidden * shape["intermediate_size"])
    tree = tiny_config(processor.tokenizer, TinyShape()).to_dict()
    tree["text_config"] |= {
        **{
            name: shape[name]
            for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        },
        "num_hidden_layers": max(1, round(language_gb * 1e9 / per_layer)),
        "layer_types": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    tree["vision_config"] = {**TOWERS[tower], "out_hidden_size": hidden}
    tree.pop("model_type")
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tree))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(2 * p.numel() for name, p in model.named_parameters() if ".visual." not in name)


CHILD = """
import json, re, sys, time
from pathlib import Path
from finetune.config import HeadsConfig, ModelConfig
from finetune.models import vision_loading
from finetune.models.loading import load_bundle
import transformers.modeling_utils as reading
import bitsandbytes, peft

class Slice:
    def __init__(self, inner): self.inner = inner
    def __getitem__(self, key):
        value = self.inner[key]
        count[0] += value.numel() * value.element_size()
        return value
    def __getattr__(self, name): return getattr(self.inner, name)

class File:
    def __init__(self, *arguments, **more): self.inner = original(*arguments, **more)
    def get_slice(self, name): return Slice(self.inner.get_slice(name))
    def __getattr__(self, name): return getattr(self.inner, name)

def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

count, original = [0], reading.safe_open
reading.safe_open = File
path, language, depth = sys.argv[1], sys.argv[2], int(sys.argv[3])
heads = HeadsConfig(source="vision", vision_layers=sorted({depth // 2 - 1, 3 * depth // 4 - 1, depth - 1} - {-1}))
before, start, cpu = peak(), time.perf_counter(), time.process_time()
bundle = load_bundle(ModelConfig(path=path, language=language), heads=heads)
touched = sum(float(p.detach().flatten()[::2048].float().sum()) for p in bundle.model.parameters())
seconds, used = time.perf_counter() - start, time.process_time() - cpu
numbers = {"seconds": round(seconds, 2), "cpu_seconds": round(used, 2), "peak_gb": round((peak() - before) / 1e9, 3)}
numbers |= {"read_gb": round(count[0] / 1e9, 3), "parameters": sum(p.numel() for p in bundle.model.parameters())}
print("RESULT " + json.dumps(numbers))
"""


def measure(folder: Path, language: str, depth: int) -> dict[str, Any]:
    """Load in a new process; what `CHILD` found."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", CHILD, str(folder), language, str(depth)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    match = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"loading failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(match[1])
    return found


def main() -> None:
    """Build, load without and with the language model, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-gb", type=float, nargs="+", default=[0.5, 2.0])
    parser.add_argument("--tower", choices=sorted(TOWERS), default="3b")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    arguments = parser.parse_args()
    results = []
    for language_gb in arguments.language_gb:
        with tempfile.TemporaryDirectory(prefix="forensics-bench-") as place:
            language_bytes = build(Path(place), arguments.tower, language_gb)
            for language in ("skip", "load"):
                found = measure(Path(place), language, TOWERS[arguments.tower]["depth"])
                row = {"tower": arguments.tower, "language_gb": round(language_bytes / 1e9, 3), "language": language}
                results.append({**row, **found})
                print(json.dumps(results[-1]), flush=True)
    if arguments.out:
        report = {
            "command": "python bench/vision_loading.py " + " ".join(sys.argv[1:]),
            "hardware": f"{os.cpu_count()} CPU cores, no GPU; load average {os.getloadavg()[0]:.1f}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": __version__},
            "written": time.strftime("%Y-%m-%d"),
            "results": results,
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
