"""Training. Importing it prepares the libraries that every module here uses."""

import os

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()  # transformers imports torchvision

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which PEFT imports, warns that it found no GPU
