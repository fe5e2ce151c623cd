"""What a table of inspection reports looks like and what is kept of it: columns, fields, risk levels. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.config import build, load_config
from finetune.data.preparation.config import SplitsConfig
from finetune.errors import ConfigError

DEFAULT_FIELDS = {
    "风险描述": "data_风险",
    "风险等级": "data_风险等级",
    "纠正和预防建议": "data_纠正和预防建议",
    "缺陷描述": "data_缺陷描述",
    "位置信息": "data_位置信息",
}


@dataclass
class ReportSettings:
    """Columns of a table and fields of a report; the options of format `reports`.

    Raises:
        ConfigError: names that contradict each other.
    """

    id_column: str | None = "image_id"  # null: rows are named by their line
    image_column: str = "image_path"
    group_column: str | None = None  # rows of one building, flat or visit, which stay on one side of a split
    fields: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_FIELDS))  # field of the report -> column
    optional: list[str] = field(default_factory=lambda: ["位置信息"])  # may be empty or have no column: "unknown"
    level_field: str | None = "风险等级"  # null: no field is graded
    levels: list[str] = field(default_factory=lambda: ["轻微", "中等", "严重"])  # from the least to the most severe
    level_map: dict[str, str] = field(default_factory=dict)  # other wordings of a level -> the level, e.g. {轻度: 轻微}
    template: str = "report_zh"  # built in, or the path of a YAML like finetune/data/templates/report_zh.yaml
    encoding: str = "auto"  # UTF-8 with or without BOM, GBK, UTF-16 with BOM are told apart
    delimiter: str = ""  # one character; "": recognised

    def __post_init__(self) -> None:
        for name in self.optional:
            if name not in self.fields:
                raise ConfigError(f"reports: optional names '{name}'; fields has {', '.join(self.fields)}")
        if self.level_field is None:
            return
        if self.level_field not in self.fields:
            raise ConfigError(f"reports: level_field is '{self.level_field}'; fields has {', '.join(self.fields)}")
        if len(self.levels) < 2 or len(set(self.levels)) != len(self.levels):
            raise ConfigError(f"reports: levels is {self.levels}; expected at least two different ones, least first")
        for wording, level in self.level_map.items():
            if level not in self.levels:
                raise ConfigError(f"reports: level_map sends '{wording}' to '{level}'; levels is {self.levels}")


@dataclass
class ReportSplits(SplitsConfig):
    """As of every preparation, but pictures that look alike in two splits are only warned of: walls do."""

    on_overlap: Literal["error", "warn"] = "warn"


@dataclass
class ReportsConfig:
    """`configs/data/reports.yaml`: how a table is read, divided and stored."""

    table: ReportSettings = field(default_factory=ReportSettings)
    seed: int = 0
    splits: ReportSplits = field(default_factory=ReportSplits)
    on_error: Literal["stop", "skip"] = "stop"  # at rows that cannot be used; skipped ones go to rejected.jsonl
    workers: int = 0  # processes; 0: one per core
    shard_megabytes: int = 256  # of Parquet files


def load_reports_config(path: str | None, overrides: list[str]) -> ReportsConfig:
    """The configuration of a YAML, or the defaults (None), with `key.sub=value` overrides.

    Raises:
        ConfigError: as `finetune.config.load_config`.
    """
    return load_config(path, overrides, ReportsConfig)


def report_settings(values: Mapping[str, Any], where: str) -> ReportSettings:
    """Settings from the options of a data source.

    Raises:
        ConfigError: unknown names or unusable values.
    """
    return build(ReportSettings, values, where=f"{where}: options")
