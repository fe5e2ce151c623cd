"""Configuration: dataclasses filled from YAML and `key.sub=value` overrides. No torch, no transformers.

Every key of every YAML is a field of a dataclass; an unknown key is an error that names the nearest known one.
"""

from finetune.config.conversion import build, to_dict
from finetune.config.loading import config_hash, load_config
from finetune.config.sections import (
    AdversarialConfig,
    DataConfig,
    GenerationConfig,
    HeadsConfig,
    ImagePadding,
    LoraConfig,
    LossConfig,
    ModelConfig,
    NoiseResidualConfig,
    RegionMaskingConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TestTimeAugmentation,
    TokensConfig,
    TrainConfig,
    VisionLoraConfig,
    VisionTopConfig,
)
from finetune.config.stages import StageRun, find_stage, stage_runs

__all__ = [
    "AdversarialConfig",
    "DataConfig",
    "GenerationConfig",
    "HeadsConfig",
    "ImagePadding",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "NoiseResidualConfig",
    "RegionMaskingConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "StageRun",
    "TestTimeAugmentation",
    "TokensConfig",
    "TrainConfig",
    "VisionLoraConfig",
    "VisionTopConfig",
    "build",
    "config_hash",
    "find_stage",
    "load_config",
    "stage_runs",
    "to_dict",
]
