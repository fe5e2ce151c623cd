"""Configuration: dataclasses filled from YAML and `key.sub=value` overrides. No torch, no transformers.

Every key of every YAML is a field of a dataclass; an unknown key is an error that names the nearest known one.
"""

from finetune.config.conversion import build
from finetune.config.loading import config_hash, load_config, to_dict
from finetune.config.sections import (
    DataConfig,
    GenerationConfig,
    HeadsConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    NoiseResidualConfig,
    RunConfig,
    SourceConfig,
    TokensConfig,
    TrainConfig,
    VisionLoraConfig,
    VisionTopConfig,
)

__all__ = [
    "DataConfig",
    "GenerationConfig",
    "HeadsConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "NoiseResidualConfig",
    "RunConfig",
    "SourceConfig",
    "TokensConfig",
    "TrainConfig",
    "VisionLoraConfig",
    "VisionTopConfig",
    "build",
    "config_hash",
    "load_config",
    "to_dict",
]
