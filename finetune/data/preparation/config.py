"""What `forensics prepare` reads from a YAML: sources, checks, splits and storage of one data set. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.config import build
from finetune.data.splits import check_ratios
from finetune.data.storage import ImageOptions
from finetune.errors import ConfigError


@dataclass
class PrepareSource:
    """One source of records: any format of data/README.md."""

    path: str = ""
    name: str | None = None  # begins the ids of its records where there are several sources; default: the path's stem
    format: str = "auto"
    root: str | None = None  # image paths are relative to it; default: the file's own folder
    options: dict[str, Any] = field(default_factory=dict)  # of the reader
    split: str | None = None  # all records go here, for sets that come with their own division
    own_groups: bool = False  # a group here and one of the same name in another source are different ones


@dataclass
class SplitsConfig:
    """How groups of records are divided."""

    ratios: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    group_by: str = "group"  # group, parent, path:REGEX (first capture), provenance.KEY
    holdout_list: str | None = None  # text file: one group, path or glob per line
    holdout_split: str = "test"
    max_hash_distance: int = 4  # bits of 64 up to which two images of different splits are "the same"
    on_overlap: Literal["error", "warn"] = "error"  # the same image in two splits


@dataclass
class PrepareConfig:
    """One prepared data set."""

    out_dir: str = ""
    seed: int = 0
    sources: list[PrepareSource] = field(default_factory=list)
    synth: dict[str, Any] | None = None  # a section of finetune.data.synthesis.SynthConfig: made first, used as source
    storage: Literal["jsonl", "parquet"] = "jsonl"
    shard_megabytes: int = 256  # of Parquet files
    images: ImageOptions = field(default_factory=ImageOptions)
    splits: SplitsConfig = field(default_factory=SplitsConfig)
    on_error: Literal["stop", "skip"] = "stop"  # at a record that cannot be used; skipped ones go to rejected.jsonl
    workers: int = 0  # processes; 0: one per core
    audit: bool = True  # run `forensics audit` on the result


def check(config: PrepareConfig) -> None:
    """Everything about the configuration that can be wrong without looking at the data.

    Raises:
        ConfigError: names the key, the value found and what is expected.
    """
    if not config.out_dir:
        raise ConfigError("prepare: out_dir is empty; give the folder to write to")
    if not config.sources and config.synth is None:
        raise ConfigError("prepare: no sources; give 'sources: [{path: FILE or FOLDER}]' or a 'synth' section")
    for index, source in enumerate(config.sources):
        if not source.path:
            raise ConfigError(f"prepare: sources[{index}].path is empty; give a file or folder")
        if source.split is not None and source.split not in config.splits.ratios:
            known = ", ".join(config.splits.ratios)
            raise ConfigError(f"prepare: sources[{index}].split is '{source.split}'; splits.ratios has {known}")
    if config.synth is not None:
        from finetune.data.synthesis.config import SynthConfig

        build(SynthConfig, config.synth, where="prepare: synth")
    ratios = config.splits.ratios
    check_ratios(ratios)
    if config.splits.holdout_list and config.splits.holdout_split not in ratios:
        raise ConfigError(
            f"prepare: splits.holdout_split is '{config.splits.holdout_split}'; splits.ratios has {', '.join(ratios)}"
        )
    if not 0 <= config.splits.max_hash_distance <= 16:
        raise ConfigError(f"prepare: splits.max_hash_distance is {config.splits.max_hash_distance}; expected 0..16")
    if config.images.mode == "reference" and config.storage == "parquet":
        raise ConfigError("prepare: Parquet holds the images inside; images.mode 'reference' is for storage: jsonl")
    if config.workers < 0 or config.shard_megabytes < 1:
        raise ConfigError("prepare: workers and shard_megabytes must not be negative (workers 0: one per core)")
