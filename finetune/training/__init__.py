"""Training. Every module here may import transformers, which imports torchvision: see `torchvision_compat`."""

from finetune.torchvision_compat import ensure_torchvision

ensure_torchvision()
