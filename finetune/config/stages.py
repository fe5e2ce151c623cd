"""`stages:` of a run resolved: each stage as a complete configuration of its own, and where it starts from.

Nothing is trained or opened here; `finetune.training.stages` runs them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from finetune.config.conversion import build, merge, to_dict
from finetune.config.model_folder import ADAPTER_CONFIG, MODEL_CONFIG, is_model_folder
from finetune.config.sections import RunConfig, StageConfig
from finetune.errors import ConfigError

BASE, PREVIOUS = "base", "previous"
_FIXED = ("path", "adapter")
"""Keys of `model` that a stage may not set: `init_from` says where it starts."""


@dataclass(frozen=True)
class StageRun:
    """One stage.

    name: as configured. number: 1 for the first. config: common part and stage merged, its `output_dir` is
    `stage<number>` inside the run's; `model` is still the common one.
    source: number of the stage it starts from, a folder, or None for `model` of the common part; `base` is an empty
    string: the common model without an adapter.
    """

    name: str
    number: int
    config: RunConfig
    source: int | str | None


def stage_runs(config: RunConfig, where: str = "stages") -> list[StageRun]:
    """Every stage of a run; [] where it has none.

    Raises:
        ConfigError: no name or one twice, an unknown key or value, a start that does not exist or is not earlier.
    """
    names = [stage.name for stage in config.stages]
    for number, stage in enumerate(config.stages, start=1):
        _check_name(stage, number, names, where)
    common = to_dict(dataclasses.replace(config, stages=[]))
    return [_resolve(config, common, number, where) for number in range(1, len(names) + 1)]


def find_stage(runs: list[StageRun], name: str) -> StageRun:
    """The stage of a name.

    Raises:
        ConfigError: there is none.
    """
    for run in runs:
        if run.name == name:
            return run
    if not runs:
        raise ConfigError(f"--stage {name}: this configuration has no stages; leave the option out")
    raise ConfigError(f"--stage {name}: there is no such stage; stages: {', '.join(run.name for run in runs)}")


def _check_name(stage: StageConfig, number: int, names: list[str], where: str) -> None:
    if not stage.name:
        raise ConfigError(f"{where}: stage {number} of {len(names)} has no name; give it one, e.g. name: stage{number}")
    if stage.name in (BASE, PREVIOUS) or "." in stage.name or "/" in stage.name:
        raise ConfigError(
            f"{where}: a stage cannot be called '{stage.name}'; use a word without dots and slashes, not "
            f"'{BASE}' or '{PREVIOUS}'"
        )
    if names.count(stage.name) > 1:
        raise ConfigError(f"{where}: two stages are called '{stage.name}'; give each a name of its own")


def _resolve(config: RunConfig, common: dict, number: int, where: str) -> StageRun:
    stage = config.stages[number - 1]
    place = f"{where}, stage '{stage.name}'"
    for key in _FIXED:
        if key in stage.model:
            raise ConfigError(f"{place}: a stage cannot set model.{key}; use init_from, or set it for the whole run")
    update = {
        key: value for key, value in vars(stage).items() if key not in ("name", "init_from") and value not in (None, {})
    }
    merged = build(RunConfig, merge(common, update), where=place)
    merged.output_dir = str(Path(config.output_dir) / f"stage{number}")
    return StageRun(stage.name, number, merged, _source(config, number, place))


def _source(config: RunConfig, number: int, place: str) -> int | str | None:
    start = config.stages[number - 1].init_from
    names = [stage.name for stage in config.stages]
    if start == BASE:
        return ""
    if start == PREVIOUS:
        return number - 1 if number > 1 else None
    if start in names:
        source = names.index(start) + 1
        if source == number:
            raise ConfigError(f"{place}: init_from names the stage itself; name an earlier one, or {BASE}")
        if source > number:
            raise ConfigError(
                f"{place}: init_from names '{start}', which comes later; name an earlier stage, or {BASE}"
            )
        return source
    if not Path(start).is_dir():
        raise ConfigError(
            f"{place}: init_from is '{start}', which is neither {PREVIOUS}, {BASE}, an earlier stage "
            f"({', '.join(names[: number - 1]) or 'none'}) nor an existing folder"
        )
    if not is_model_folder(start):
        raise ConfigError(
            f"{place}: init_from is '{start}', which holds neither a model ({MODEL_CONFIG}) nor an adapter "
            f"({ADAPTER_CONFIG}); give the folder that was saved, such as runs/NAME/best"
        )
    return start
