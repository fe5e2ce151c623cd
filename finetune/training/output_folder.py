"""A run's output folder is one run's: a folder that holds another is refused, or what that one wrote is moved aside.

Only what a training run writes is looked at and moved. Data, a tiny model, cached features and an evaluation's results
that lie in the same folder stay where they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from finetune.config import ModelConfig, RunConfig
from finetune.errors import ConfigError

RUN_RECORD = "run_record.json"
"""Written when a run begins: a folder with it holds a run."""
STAGE_RECORD = "stage.json"
"""The same in the folder of a stage."""
EARLIER = "earlier"
"""Folder in the output folder that receives what an earlier run left."""
_WRITTEN = (
    *("config.yaml", RUN_RECORD, STAGE_RECORD, "trainable.txt", "history.json", "log.csv", "calibration.json"),
    *("warnings.jsonl", "text_retention.json", "tensorboard", "heatmaps", ".saving", "best", "best_*", "best.*"),
    *("checkpoint-*", "diverged_rank*.json", "stage[0-9]*"),
)
"""Names, some with a `*`, of everything that a run or a run of stages writes into its folder."""


def take_folder(config: RunConfig, *, overwrite: bool) -> str | None:
    """Make `output_dir` free for a new run; called by one process, before anything is written there.

    A run that resumes takes the folder as it is.

    Args:
        overwrite: move what an earlier run wrote to `earlier/run-N` instead of refusing.

    Returns:
        A line for the user where something was moved, else None.

    Raises:
        ConfigError: the folder holds a run, and neither `train.resume` nor `overwrite` says what to do; the model to
            start from is among what would be moved.
    """
    out_dir = Path(config.output_dir)
    if config.train.resume is not None or not holds_run(out_dir):
        return None
    if not overwrite:
        raise ConfigError(
            f"{out_dir} holds a run already; add --resume to go on with it, --overwrite to start anew (what it wrote "
            f"is kept in {out_dir / EARLIER}), or give another output_dir"
        )
    return _move_aside(out_dir, config.model)


def take_folder_of_stages(config: RunConfig, stage_dirs: Sequence[str], *, overwrite: bool) -> str | None:
    """`take_folder` for a run of stages, which go on by themselves; each stage's own folder is the stage's part.

    Raises:
        ConfigError: the folder holds a run without stages, which the stages' `best` would replace; as `take_folder`.
    """
    out_dir = Path(config.output_dir)
    if overwrite and (holds_run(out_dir) or any(holds_run(Path(folder)) for folder in stage_dirs)):
        return _move_aside(out_dir, config.model)
    if (out_dir / RUN_RECORD).is_file():
        raise ConfigError(
            f"{out_dir} holds a run without stages; add --overwrite to start anew (what it wrote is kept in "
            f"{out_dir / EARLIER}), or give another output_dir"
        )
    return None


def holds_run(out_dir: Path) -> bool:
    """Whether a run was begun in a folder, or stages of one."""
    return (out_dir / RUN_RECORD).is_file() or any(out_dir.glob(f"stage[0-9]*/{STAGE_RECORD}"))


def _move_aside(out_dir: Path, model: ModelConfig) -> str:
    found = sorted({path for name in _WRITTEN for path in out_dir.glob(name)})
    starts: dict[str, str | None] = {"path": model.path, "adapter": model.adapter, "base": model.base}
    for key, start in starts.items():
        for path in found:
            if start and os.path.exists(start) and Path(os.path.abspath(start)).is_relative_to(path.absolute()):
                raise ConfigError(
                    f"model.{key} is {start}, which --overwrite would move aside with the run in {out_dir}; give "
                    "another output_dir"
                )
    number = 1
    while (place := out_dir / EARLIER / f"run-{number}").exists():
        number += 1
    place.mkdir(parents=True)
    for path in found:
        path.rename(place / path.name)
    return f"the run in {out_dir} is now in {place}"
