"""Checkpoints on disk: written whole or not at all, checked before they are taken, and put back into a built model.

A checkpoint is prepared in `.saving/`, gets a list of its files with their sizes last of all, and is renamed into
place; so a folder `checkpoint-N` under that name is complete. Optimizer and schedule are the Trainer's own files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from finetune.errors import CheckpointError, ModelLoadError
from finetune.models.loading import Bundle, refuse_pickle
from finetune.models.plain import attach_heads
from finetune.models.vision_parts import LORA_DIR

logger = logging.getLogger(__name__)

STAGING = ".saving"
"""Folder under output_dir in which a checkpoint is prepared; whatever is in it is not complete."""
MANIFEST = "complete.json"
"""Written last: the files of a checkpoint with their sizes, when it was written, and what run it belongs to."""
STATE = "trainer_state.json"
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
"""In the text of the RuntimeError that `torch.save` raises when a file cannot be written."""


# ---- writing ----


def clear_staging(out_dir: str | Path) -> Path:
    """An empty staging folder; what a killed process left half-written or half-deleted goes."""
    staging = Path(out_dir) / STAGING
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(staged: Path, out_dir: str | Path, run: dict[str, Any], limit: int | None) -> Path:
    """Make a prepared checkpoint visible under its own name, then delete the oldest beyond `limit`.

    Args:
        staged: folder `checkpoint-N` inside the staging folder, its files complete.
        run: what the checkpoint belongs to; `differences` compares it on resuming.
        limit: how many checkpoints are kept, this one included; None or 0 keeps all.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file() and path.name != MANIFEST)
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    manifest = {"step": _number(staged), "written": time.time(), "run": run, "files": sizes}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in [*files, staged / MANIFEST, staged]:
        _flush(path)
    final = Path(out_dir) / staged.name
    if final.exists():  # of an earlier run, or of this one before it was resumed from further back
        final.rename(staged.parent / f"{staged.name}.replaced")
    staged.rename(final)
    _flush(final.parent)
    _rotate(final, limit)
    shutil.rmtree(staged.parent)
    return final


def _rotate(newest: Path, limit: int | None) -> None:
    """Delete the checkpoints written first. Each is moved away before, so that none is ever seen half deleted."""
    if not limit or limit < 1:
        return
    others = [folder for folder in checkpoints(newest.parent) if folder != newest]
    for folder in others[: max(len(others) - (limit - 1), 0)]:
        folder.rename(newest.parent / STAGING / f"{folder.name}.old")


def _flush(path: Path) -> None:
    """Hand a file or folder to the disk, so that a rename cannot overtake its content in a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_failure(error: BaseException, folder: str | Path) -> CheckpointError | None:
    """The error to show when writing under `folder` failed for want of space or rights; None: a bug of ours."""
    text = " ".join(str(error).split())
    is_writing = isinstance(error, OSError | SafetensorError) or any(part in text for part in _TORCH_WRITER)
    if not is_writing:
        return None
    place = Path(folder)
    free = shutil.disk_usage(place).free if place.exists() else 0
    kept = ", ".join(path.name for path in checkpoints(place)) or "none yet"
    return CheckpointError(
        f"{place}: a checkpoint could not be written ({text[:200]}); {free / 1e9:.2f} GB are free there; earlier "
        f"checkpoints are untouched: {kept}; make room and go on with --resume"
    )


# ---- choosing ----


def checkpoints(out_dir: str | Path) -> list[Path]:
    """Folders `checkpoint-N` of a run, in the order in which they were written; sound or not."""
    found = [path for path in Path(out_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: (_written(path), _number(path)))


def resume_point(out_dir: str | Path, resume: str | None) -> Path | None:
    """The folder to continue from, or None to start from the beginning. Called by one process only.

    `auto` takes the checkpoint written last that is sound; broken ones are named and moved out of the way. Without
    `resume`, checkpoints of an earlier run are moved to `earlier/`, so that the two runs do not mix.

    Raises:
        CheckpointError: a checkpoint named by its path is broken.
    """
    out_dir = Path(out_dir)
    if resume is None:
        _set_aside(out_dir)
        return None
    if resume != "auto":
        problem = checkpoint_problem(resume)
        if problem:
            raise CheckpointError(f"{resume}: cannot be resumed from: {problem}; name another one, or use 'auto'")
        return Path(resume)
    for folder in reversed(checkpoints(out_dir)):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        logger.warning("%s is passed over: %s; it is kept as %s.broken", folder, problem, folder.name)
        _move(folder, folder.with_name(f"{folder.name}.broken"))
    logger.warning("no checkpoint to resume from in %s: starting from the beginning", out_dir)
    return None


def checkpoint_problem(folder: str | Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None. Reads names, sizes and headers, not the weights."""
    folder = Path(folder)
    if not (folder / STATE).is_file():
        return f"no {STATE}"
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        manifest = read_manifest(folder)
    except ValueError as error:
        return f"a JSON file cannot be read ({' '.join(str(error).split())})"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"{STATE} names no global_step"
    for name, size in (manifest or {}).get("files", {}).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes, {size} were written"
    return _file_problem(folder)


def _file_problem(folder: Path) -> str | None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return "no safetensors file"
    for path in weights:
        try:
            with safe_open(path, "pt") as stored:
                stored.keys()
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({' '.join(str(error).split())})"
    if (folder / "latest").is_file():  # DeepSpeed keeps optimizer and schedule in a folder that this file names
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        return None if any((folder / tag).glob("*optim_states.pt")) else f"no optimizer states in {tag}"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (folder / name).is_file():
            return f"no {name}"
        if not zipfile.is_zipfile(folder / name):
            return f"{name} is truncated"
    return None


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What `publish` noted; None for a checkpoint of another origin."""
    path = Path(folder) / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def differences(folder: str | Path, run: dict[str, Any]) -> list[str]:
    """What has changed since a checkpoint was written, `name: then -> now`."""
    then = (read_manifest(folder) or {}).get("run", {})
    return [f"{name}: {then[name]} -> {run[name]}" for name in run if name in then and then[name] != run[name]]


def _set_aside(out_dir: Path) -> None:
    found = checkpoints(out_dir)
    if not found:
        return
    place = out_dir / "earlier"
    for folder in found:
        _move(folder, place / folder.name)
    names = ", ".join(folder.name for folder in found)
    logger.warning(
        "a new run starts in %s: %s of an earlier one moved to %s (--resume continues)", out_dir, names, place
    )


def _move(folder: Path, target: Path) -> None:
    """Rename to `target`, or to `target.2`, ... where that is taken."""
    target.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    free = target
    while free.exists():
        number += 1
        free = target.with_name(f"{target.name}.{number}")
    folder.rename(free)


def _written(folder: Path) -> float:
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError):
        manifest = None
    when = manifest.get("written") if isinstance(manifest, dict) else None
    return float(when) if isinstance(when, int | float) else folder.stat().st_mtime


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


# ---- reading ----


def load_weights(bundle: Bundle, folder: str | Path) -> None:
    """Copy a checkpoint's weights into a bundle's model, in place.

    Handing the file's tensors to `load_state_dict` would find nothing: names on disk are those of the released
    checkpoints, in memory they begin with `model.visual` and `model.language_model`.

    Raises:
        ModelLoadError: the folder is incomplete or belongs to another model or another choice of trained groups.
    """
    refuse_pickle(folder)
    if bundle.tower is not None:
        attach_heads(bundle.base, folder)
        if bundle.model is not bundle.base:
            _load_adapter(bundle, Path(folder) / LORA_DIR)
    elif bundle.model is bundle.base:
        _load_whole(bundle, Path(folder))
    else:
        _load_adapter(bundle, Path(folder))


def _load_whole(bundle: Bundle, folder: Path) -> None:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is an error below
    try:
        stored, info = type(bundle.base).from_pretrained(
            folder, dtype=bundle.base.dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{folder}: cannot be resumed from: {str(error).splitlines()[0][:300]}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    state = stored.state_dict()
    own = bundle.base.state_dict()
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"], *(set(own) ^ set(state))])
    odd += [name for name in own if name in state and own[name].shape != state[name].shape]
    if odd:
        raise ModelLoadError(f"{folder}: {len(odd)} weights do not fit the model of this run, e.g. '{odd[0]}'")
    bundle.base.load_state_dict(state)


def _load_adapter(bundle: Bundle, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelLoadError(f"{folder}: no adapter_model.safetensors, but this run trains an adapter; start a new run")
    state = load_file(file)
    own = get_peft_model_state_dict(bundle.model, save_embedding_layers=False)
    odd = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if odd:
        raise ModelLoadError(
            f"{folder}: {len(odd)} adapter tensors do not fit this run, e.g. '{odd[0]}'; resume with the same "
            "train.trainable, lora and heads"
        )
    with torch.no_grad():
        set_peft_model_state_dict(bundle.model, state)
