"""Makes the published torchvision wheel importable beside a CPU-only torch; does nothing where it loads by itself.

qwen_vl_utils and the Qwen2.5-VL processors import torchvision. Its wheels are built against CUDA torch; on a CPU build
the compiled operators fail to load and the Python side stops at registering fake kernels for two operators that do not
exist. Declaring their schemas first is enough: nothing here calls them.
"""

from __future__ import annotations

import importlib
import sys

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def ensure_torchvision() -> None:
    """Import torchvision, declaring its missing operators if its own library cannot be loaded."""
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    import torch

    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
    importlib.import_module("torchvision")
