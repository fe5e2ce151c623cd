"""The stages of a run, one after the other, each in processes of its own; finished ones are passed over.

A process per stage is what survives every launcher: no model, optimizer, DeepSpeed engine or process group of one
stage is left when the next one begins. Under `accelerate launch` each rank's driver starts its own rank of the stage.
What a stage trains is `finetune.training.run`'s part; resolving the YAML is `finetune.config.stages`'.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from finetune.config import RunConfig, StageRun, find_stage, load_config, stage_runs, to_dict
from finetune.config.model_folder import ADAPTER_CONFIG, MODEL_CONFIG, is_model_folder
from finetune.errors import ConfigError
from finetune.training.adversarial import ZERO_3
from finetune.training.checks import run_problems
from finetune.training.output_folder import STAGE_RECORD, take_folder_of_stages
from finetune.training.stage_data import check_later_data

MARKER = STAGE_RECORD
"""In every stage's folder: what it was made from, and whether it is finished."""
_DRIVEN = "FORENSICS_STAGE_DRIVER"


def run_stages(config: RunConfig, *, overwrite: bool = False) -> int:
    """Run every stage that is not finished, each in a new process; link the last one's `best` as the run's.

    Args:
        overwrite: all of them anew; what an earlier run left in the folder is moved aside.

    Returns:
        0, or the exit status of the stage that failed or was stopped; the same command then goes on there.

    Raises:
        ConfigError, DataFormatError: anything wrong with any stage or its data, as far as files' headers tell, before
            the first one starts.
    """
    runs = stage_runs(config)
    for problem in run_problems(config):
        raise ConfigError(problem)
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        for run in runs:
            if run.config.adversarial.share:  # known now, not after the stages before it
                raise ConfigError(f"stage '{run.name}': {ZERO_3}")
    is_main = _rank() == 0
    if is_main:
        check_later_data(_waiting(runs, overwrite))
        moved = take_folder_of_stages(config, [run.config.output_dir for run in runs], overwrite=overwrite)
        _say(moved is not None, str(moved))
    # With `overwrite` other ranks may come here before rank 0 has moved anything; all of them begin with stage 1.
    waiting = _waiting(runs, overwrite)
    with _written(config) as path:
        for run in runs:
            if run not in waiting:
                _say(is_main, f"stage {run.number}/{len(runs)} '{run.name}' is finished: {run.config.output_dir}")
                continue
            _say(is_main, f"stage {run.number}/{len(runs)} '{run.name}': {run.config.output_dir}")
            status = _launch(path, run)
            if status:
                return status
    if is_main:
        _link_best(Path(config.output_dir), runs[-1])
        print(_summary(runs))
    return 0


def _waiting(runs: Sequence[StageRun], overwrite: bool) -> list[StageRun]:
    return list(runs) if overwrite else [run for run in runs if not _is_finished(runs, run)]


def run_stage(config: RunConfig, name: str) -> int:
    """Run one stage in this process, unless it is finished; an interrupted one is resumed.

    Returns:
        0, or the status to exit with where a signal stopped the run.

    Raises:
        ConfigError: no such stage, the one it starts from is not finished, or its folder was made from another
            configuration.
    """
    from finetune.training.run import train

    runs = stage_runs(config)
    run = find_stage(runs, name)
    if os.environ.pop(_DRIVEN, None):
        threading.Thread(target=_end_with_driver, daemon=True).start()
    if _is_finished(runs, run):
        _say(_rank() == 0, f"stage '{name}' is finished: {run.config.output_dir}")
        return 0
    own = started_from(runs, run)
    folder = Path(run.config.output_dir)
    digest = stage_hash(runs, run)
    marker = {"name": run.name, "hash": digest, "starts_from": own.model.adapter or own.model.path, "finished": False}
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _write_marker(folder, marker)
    record = train(own)
    status: int = record.get("exit_status", 0)
    if status == 0 and _rank() == 0:
        numbers = {key: record[key] for key in ("seconds", "steps", "best")}
        _write_marker(folder, {**marker, **numbers, "finished": True})
    return status


def started_from(runs: Sequence[StageRun], run: StageRun) -> RunConfig:
    """A stage's configuration with the model and adapter it starts from; it resumes where it has a checkpoint.

    Raises:
        ConfigError: the stage it starts from is not finished, or a folder is neither model nor adapter.
    """
    model = run.config.model
    if run.source == "":
        model = replace(model, adapter=None)
    elif isinstance(run.source, int):
        source = runs[run.source - 1]
        if not _is_finished(runs, source):
            raise ConfigError(
                f"stage '{run.name}' starts from stage '{source.name}', which is not finished in "
                f"{source.config.output_dir}; run that one first, or all of them without --stage"
            )
        folder = Path(source.config.output_dir) / "best"
        earlier: RunConfig = load_config(Path(source.config.output_dir) / "config.yaml")
        model = _from_folder(model, folder, earlier.model.path)
    elif run.source is not None:
        model = _from_folder(model, Path(run.source), model.path)
    train = run.config.train if run.config.train.resume else replace(run.config.train, resume="auto")
    return replace(run.config, model=model, train=train)


_EARLIER_SECTION = {
    "score_threshold": 0.5, "mask_threshold": 0.5, "max_new_tokens": 256,
    "do_sample": False, "temperature": 1.0, "top_p": 1.0, "batch_size": 8,
}  # fmt: skip
"""A section without effect that configurations had: still hashed, so that stages of that time are known again."""


def stage_hash(runs: Sequence[StageRun], run: StageRun) -> str:
    """Changes with the configuration of a stage and of those it starts from; not with the place of the run's folder."""
    tree = to_dict(run.config)
    tree.pop("output_dir")
    tree["train"].pop("resume")
    tree["generation"] = _EARLIER_SECTION
    if tree["data"]["image_padding"] == "none":  # younger than stages that must be known again
        del tree["data"]["image_padding"]
    source = stage_hash(runs, runs[run.source - 1]) if isinstance(run.source, int) else run.source
    return hashlib.sha256(json.dumps([tree, source], sort_keys=True).encode()).hexdigest()[:12]


# ---- finished or not ----


def _is_finished(runs: Sequence[StageRun], run: StageRun) -> bool:
    """Whether a stage is done.

    Raises:
        ConfigError: its folder was made from another configuration.
    """
    folder = Path(run.config.output_dir)
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise ConfigError(f"{folder / MARKER} is not valid JSON; remove {folder} to run the stage again") from error
    if marker.get("hash") != stage_hash(runs, run):
        raise ConfigError(
            f"{folder} holds stage '{marker.get('name')}' of another configuration (hash {marker.get('hash')}, now "
            f"{stage_hash(runs, run)}); give another output_dir, add --overwrite to start all stages anew, or remove "
            "that folder and those of later stages"
        )
    return bool(marker.get("finished"))


def _write_marker(folder: Path, marker: dict[str, Any]) -> None:
    fresh = folder / f"{MARKER}.writing"
    fresh.write_text(json.dumps(marker, indent=2, ensure_ascii=False), encoding="utf-8")
    fresh.replace(folder / MARKER)


def _from_folder(model: Any, folder: Path, base: str) -> Any:
    """`model` reading a saved folder: an adapter on its base, or a whole model."""
    if not is_model_folder(folder):
        raise ConfigError(f"{folder} holds neither a model ({MODEL_CONFIG}) nor an adapter ({ADAPTER_CONFIG})")
    if (folder / ADAPTER_CONFIG).is_file():
        return replace(model, path=base, adapter=str(folder))
    return replace(model, path=str(folder), adapter=None)


# ---- processes ----


def _launch(path: Path, run: StageRun) -> int:
    """One stage in a new process, which ends when this one does; its exit status."""
    command = [sys.executable, "-m", "finetune.cli", "train", "--config", str(path), "--stage", run.name]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=_environment(run.number))
    signals = [signal.SIGTERM, signal.SIGUSR1]
    before = {number: signal.signal(number, lambda received, _: child.send_signal(received)) for number in signals}
    try:
        while True:
            try:
                status = child.wait()
                break
            except KeyboardInterrupt:  # the terminal has sent it to the child as well, which ends on its own
                continue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status < 0:
        name = signal.Signals(-status).name
        print(f"stage '{run.name}' was ended by {name}; the same command goes on from its last checkpoint")
        return 128 - status
    return status


def _environment(number: int) -> dict[str, str]:
    """This process's variables; with several ranks a rendezvous of the stage's own.

    The launcher's store still holds what the ranks of an earlier stage wrote, so each stage meets at a new port, which
    rank 0 chooses and the others read from that store.
    """
    environment = {**os.environ, _DRIVEN: "1"}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"forensics/stage{number}/attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if _rank() == 0:
            with socket.socket() as free:
                free.bind(("", 0))
                store.set(key, str(free.getsockname()[1]))
        environment["MASTER_PORT"] = store.get(key).decode()
        environment.pop("TORCHELASTIC_USE_AGENT_STORE")
    return environment


def _end_with_driver() -> None:
    """A killed driver cannot end its stage, which would train on unseen; its end closes our standard input."""
    while os.read(0, 1024):  # not through sys.stdin, whose lock a waiting thread would hold at our own end
        pass
    os._exit(1)


@contextmanager
def _written(config: RunConfig) -> Iterator[Path]:
    """The resolved configuration as a file, so that a YAML edited meanwhile does not change later stages."""
    with tempfile.TemporaryDirectory(prefix="forensics-stages-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(to_dict(config), allow_unicode=True, sort_keys=False), encoding="utf-8")
        yield path


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


# ---- the run's folder ----


def _link_best(out_dir: Path, last: StageRun) -> None:
    """`best` of the run: a relative link to the last stage's, a copy where the file system has no links."""
    best, target = out_dir / "best", Path(last.config.output_dir).name + "/best"
    fresh = out_dir / "best.linking"
    if fresh.is_symlink() or fresh.exists():
        _remove(fresh)
    try:
        fresh.symlink_to(target, target_is_directory=True)
    except OSError:
        shutil.copytree(out_dir / target, fresh)
    if best.is_dir() and not best.is_symlink():
        _remove(best)
    fresh.replace(best)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _summary(runs: Sequence[StageRun]) -> str:
    """A line per stage: steps, seconds, best value."""
    rows = [("stage", "steps", "seconds", "best", "folder")]
    for run in runs:
        marker = json.loads((Path(run.config.output_dir) / MARKER).read_text(encoding="utf-8"))
        best = marker.get("best")
        shown = "-" if best is None else f"{best:.4f}"
        rows.append((run.name, str(marker["steps"]), str(marker["seconds"]), shown, run.config.output_dir))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _say(is_main: bool, text: str) -> None:
    if is_main:
        print(text, flush=True)
