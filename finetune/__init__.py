"""Fine-tune Qwen2.5-VL into an image-forensics inspector: real or tampered, where, and why."""

import os

# No telemetry and no surprise downloads: models and data are local folders or explicit hub names.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
