"""One training run from a configuration: load, check, train, keep the best. `sft_llm.py` is a thin door to this."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from finetune.config import ModelConfig, RunConfig, to_dict
from finetune.config.model_folder import CALIBRATION
from finetune.data.dataset import ForensicDataset, checked_dataset
from finetune.data.edit_operations import unused_operations
from finetune.data.image_frame import frame_of, set_frame
from finetune.data.locking import locked
from finetune.data.pictures import PictureDataset
from finetune.data.regions.limit import fitted_records, limit_regions
from finetune.data.sources import begin_sources, read_and_hold_back, read_sources, shared_warning
from finetune.errors import ConfigError
from finetune.losses.criterion import TERMS
from finetune.metrics.calibration import Calibration
from finetune.models.adapters import set_trainable
from finetune.models.groups import trainable_table
from finetune.models.loading import Bundle, load_bundle
from finetune.models.vocabulary import check_folder
from finetune.schema import Record
from finetune.special_tokens import SpecialTokens
from finetune.training.arguments import training_arguments
from finetune.training.callbacks import BestFolders, BestModelCallback, TimeBudgetCallback
from finetune.training.checks import check_best, check_run
from finetune.training.evaluation_table import EvaluationTable
from finetune.training.feature_cache import FeatureCache, cache_folder
from finetune.training.monitoring import HeatmapSnapshots, Watch
from finetune.training.output_folder import RUN_RECORD, take_folder
from finetune.training.precision import whole_dtype
from finetune.training.reproducibility import run_record, seen_before
from finetune.training.retention import TextRetention
from finetune.training.search_cache import use_search_cache
from finetune.training.sharding import built_whole, check_sharding, keep_heads_whole, zero_stage
from finetune.training.trainer import ForensicTrainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Run the training a configuration describes.

    Writes to `output_dir`: `config.yaml`, `run_record.json`, `trainable.txt`, checkpoints, `best/`, `tensorboard/`,
    `history.json` (every logged number).

    Args:
        overwrite: start anew in a folder that holds a run; see `output_folder.take_folder`.

    Returns:
        The run record with seconds, steps and the best evaluation; with `exit_status` where a signal stopped the run
        after a checkpoint (143 for SIGTERM, 138 for SIGUSR1).

    Raises:
        ForensicsError: anything wrong with configuration, model or data, before the first step where it can be known.
    """
    check_run(config)  # before an earlier run is moved
    with _alone_in(Path(config.output_dir)):
        return _train(config, overwrite)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Rank 0 keeps other runs out of a folder.

    Raises:
        ForensicsError: another process trains in it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is training in {folder}; wait for it, or give another output_dir"
    with locked(folder.with_name(f".{folder.name}.lock"), refusal):
        yield


def _train(config: RunConfig, overwrite: bool) -> dict[str, Any]:
    """`train`, once the folder is this process's own."""
    if os.environ.get("RANK", "0") == "0" and (moved := take_folder(config, overwrite=overwrite)):
        print(moved)
    trainer, best, record = build_trainer(config)
    out_dir = Path(config.output_dir)
    start = time.monotonic()
    point = trainer.find_resume_point(config.train.resume)
    if point is not None:
        _say(trainer.is_world_process_zero(), f"resuming from {point}")
    if point is not None and trainer.take_up_finished(point, best):
        _say(trainer.is_world_process_zero(), "it is the run's last one: nothing is left to train")
        _keep_history(trainer, out_dir / "history.json")
    else:
        trainer.train(resume_from_checkpoint=point)
    stopped = trainer.stop_signals.received
    if stopped:
        record["exit_status"] = 128 + stopped  # as the shell reports a process that a signal ended
    elif best is None:
        trainer.save_model(str(out_dir / "best"))
    elif not _has_just_evaluated(trainer):
        trainer.evaluate()
    record |= {
        "seconds": round(time.monotonic() - start, 1),
        "steps": trainer.state.global_step,
        "best": None if best is None else best.best,
    }
    if trainer.is_world_process_zero():
        _keep_calibration(out_dir)
        _write_json(out_dir / RUN_RECORD, record)
        _write_json(out_dir / "history.json", trainer.state.log_history)
        if stopped:
            is_saved = (out_dir / f"checkpoint-{record['steps']}").is_dir()
            told = f"checkpoint-{record['steps']} is complete" if is_saved else "no checkpoint of this step was written"
            print(f"stopped by {signal.Signals(stopped).name} at step {record['steps']}; {told}, go on with --resume")
            return record
        print(f"trained {record['steps']} steps in {record['seconds']} s; the best model is in {out_dir / 'best'}")
    return record


def build_trainer(config: RunConfig) -> tuple[ForensicTrainer, BestModelCallback | None, dict[str, Any]]:
    """Check, load, choose what trains and say so; nothing is trained yet.

    Returns:
        The trainer, the keeper of `best/` (None without evaluation data), and the record of what the run is made of.

    Raises:
        ForensicsError: as `train`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.stages:
        raise ConfigError("this configuration has stages, which run one by one: finetune.training.stages.run_stages")
    check_run(config)
    args = training_arguments(config)  # first: it starts the distributed backend that model loading may need
    is_main = args.process_index == 0
    _show_messages(logging.INFO if is_main else logging.ERROR)
    if _is_small(config.model.path) or not is_main:
        transformers_logging.disable_progress_bar()  # a bar for ten milliseconds of reading is only noise
    set_seed(config.seed)  # new LoRA matrices are drawn before the Trainer seeds anything
    tokens = SpecialTokens(config.tokens.num_cls, config.tokens.num_mask)
    check_folder(config.model.adapter or config.model.path)
    begin_sources([*config.data.train, *config.data.eval])  # a wrong path is known before a model is loaded
    _say(is_main, f"model {config.model.path}")
    with built_whole(args):
        bundle = load_bundle(
            _model_config(config),
            tokens,
            config.heads,
            min_pixels=config.data.min_pixels,
            max_pixels=config.data.max_pixels,
        )
    before = frame_of(bundle.processor.image_processor)
    set_frame(bundle.processor.image_processor, config.data.image_short_side, config.data.image_padding)
    if before and before != (now := frame_of(bundle.processor.image_processor)):
        logger.warning(
            "the model was trained with %s and goes on with %s: it sees images otherwise than before; repeat "
            "data.image_short_side and data.image_padding of the earlier run, unless this is meant",
            before, now or "neither",
        )  # fmt: skip
    with args.main_process_first(local=False, desc="checking data"):
        train_set, eval_set = _load_data(config, bundle)
    labels = train_set.class_labels
    _say(
        is_main,
        f"data: {len(train_set)} records to train on ({labels.count(0)} real, {labels.count(1)} tampered, "
        f"{labels.count(None)} unlabelled), {len(eval_set) if eval_set else 0} to evaluate on",
    )
    if eval_set is not None:
        check_best(config, eval_set.records)
    check_sharding(config, args, train_set, eval_set)
    with built_whole(args):
        bundle = set_trainable(
            bundle, config.train.trainable, config.lora, config.vision_lora, config.vision_top, whole_dtype(args)
        )
    keep_heads_whole(bundle, args)
    if not any(parameter.requires_grad for parameter in bundle.model.parameters()):
        names = ", ".join(config.train.trainable)
        raise ConfigError(f"train.trainable ({names}) matches no parameter of this model; switch the heads on")
    table = trainable_table(bundle.model, config.train.trainable, _learning_rates(config))
    _say(is_main, table)
    record = run_record(config)
    earlier = seen_before(bundle.settings)
    bundle.settings = {
        "template": train_set.template.to_dict(),
        "layout": config.data.layout,
        "polygon_coordinates": config.data.polygon_coordinates,
        "trained": {
            **{key: record[key] for key in ("seed", "config_hash", "commit", "data_hash")},
            "earlier_data": earlier,
        },
    }
    if is_main:
        _write_start(config, table, record)
    callbacks: list[Any] = [TimeBudgetCallback()]
    best = None
    if eval_set is not None:
        callbacks += _evaluation_callbacks(config, bundle)
        best = next(callback for callback in callbacks if isinstance(callback, BestModelCallback))
    trainer = ForensicTrainer(bundle, config, args, train_set, eval_set, callbacks)
    if eval_set is not None:
        trainer.retention = next(callback.retention for callback in callbacks if isinstance(callback, Watch))
    for callback in callbacks:
        callback.trainer = trainer
    _use_feature_cache(config, trainer)
    use_search_cache(trainer.bundle.model, config)
    return trainer, best, record


def _keep_calibration(out_dir: Path) -> None:
    """The best model's calibration also beside the run's other results, and a line about it."""
    file = out_dir / "best" / CALIBRATION
    if not file.is_file():
        return
    shutil.copyfile(file, out_dir / CALIBRATION)
    found = Calibration.load(file)
    if found.ece:
        print(
            f"calibration: {found.method}; expected calibration error {found.ece['none']:.3f} -> "
            f"{found.ece[found.method]:.3f}, cross-fitted on {found.num_images} images"
        )


def _retention(config: RunConfig, bundle: Bundle) -> TextRetention | None:
    """Where the language can move at all: frozen, its drift is zero."""
    moves = {"lm_lora", "lm_full"} & set(config.train.trainable)
    if not moves or not config.train.text_retention:
        return None
    return TextRetention(bundle, config.output_dir, config.model.path)


def _show_messages(level: int) -> None:
    """What the package reports, from this level on; to standard error where nobody has decided where messages go."""
    package = logging.getLogger("finetune")
    package.setLevel(level)
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())
        package.propagate = False  # or each message comes twice where somebody sets up logging later


def _model_config(config: RunConfig) -> ModelConfig:
    """`model` with its `language` decided."""
    return replace(config.model, language="load" if config.loads_language else "skip")


def _load_data(config: RunConfig, bundle: Bundle) -> tuple[ForensicDataset, ForensicDataset | None]:
    """Training and evaluation data.

    Raises:
        DataFormatError, ConfigError: as `checked_dataset` and `read_and_hold_back`.
    """
    data = config.data
    held: list[Record] | None
    if data.val_ratio and not data.eval:
        records, held = read_and_hold_back(data.train, "train", data.val_ratio, data.val_seed)
    else:
        records = read_sources(data.train, "train")
        held = read_sources(data.eval, "eval") if data.eval else None
        if warning := shared_warning(records, held or []):
            logger.warning("%s", warning)
    records, held = _about_few_regions(records, held, data.max_regions)
    kind = PictureDataset if config.reads_pictures_only else ForensicDataset
    found = []
    for what, own in (("train", records), ("eval", held)):
        if own is not None:
            looks = bundle.base.config.region_features
            found.append(checked_dataset(own, what, bundle.processor, bundle.tokens, data, kind, region_features=looks))
            found[-1].heads_read_text = config.heads.source != "vision"
            found[-1].operations = config.heads.operations if config.loss.operation else ()
            if bundle.base.has_heads:
                found[-1].warn_of_leaks()
    _warn_of_operations(config, bundle, records)
    return found[0], found[1] if held is not None else None


def _warn_of_operations(config: RunConfig, bundle: Bundle, records: list[Record]) -> None:
    """Say where `heads.operations` would learn nothing: names that label no image, or no loss on new ones."""
    names = config.heads.operations
    if config.loss.operation:
        unused = unused_operations(records, names)
        if unused:
            logger.warning("%s", unused)
    elif names and config.heads.mask != "none" and bundle.has_new_heads:
        logger.warning(
            "heads.operations names %s, but loss.operation is 0: nothing trains that head, and what it says of an "
            "image would be chance; set loss.operation (1.5 in the quick start), or remove the names", ", ".join(names),
        )  # fmt: skip


def _about_few_regions(
    records: list[Record], held: list[Record] | None, max_regions: int | None
) -> tuple[list[Record], list[Record] | None]:
    """Records with at most `max_regions` candidates: training ones shortened, those to evaluate on in several parts."""
    limited = limit_regions(records, max_regions)
    if limited.shortened:
        logger.warning(
            "%d of %d training records have more than data.max_regions = %d candidate regions: %d candidates are left "
            "out", limited.shortened, len(records), max_regions, limited.left_out,
        )  # fmt: skip
    return limited.records, None if held is None else fitted_records(held, "eval", max_regions)


def _evaluation_callbacks(config: RunConfig, bundle: Bundle) -> list[Any]:
    """What follows every evaluation; the keeper of `best/` comes first."""
    train, out_dir = config.train, Path(config.output_dir)
    terms = [name for name in TERMS if getattr(config.loss, name)]
    callbacks: list[Any] = [
        BestModelCallback(out_dir / "best", train.metric_for_best, train.early_stopping_patience),
        EvaluationTable(out_dir, terms),
        Watch(out_dir, _retention(config, bundle)),
    ]
    if train.best_folders:
        callbacks.append(BestFolders(out_dir, train.best_folders))
    if train.heatmap_snapshots:
        callbacks.append(HeatmapSnapshots(out_dir, train.heatmap_snapshots))
    return callbacks


def _use_feature_cache(config: RunConfig, trainer: ForensicTrainer) -> None:
    """Let the trainer keep the frozen tower's features where the run asks for it.

    Raises:
        ConfigError: no room, or weights that are spread over the ranks.
    """
    folder = cache_folder(config)
    if folder is None:
        return
    if zero_stage(trainer.args) == 3:
        raise ConfigError("train.feature_cache needs whole weights on every rank, which ZeRO-3 cuts up; use ZeRO-2")
    precision = trainer.accelerator.mixed_precision
    trainer.features = FeatureCache(
        trainer.bundle.base, trainer.bundle.processor, folder, trainer.accelerator.autocast, precision
    )
    line = trainer.features.prepare([trainer.train_dataset, trainer.eval_dataset])
    _say(trainer.is_world_process_zero(), line)


def _write_start(config: RunConfig, table: str, record: dict[str, Any]) -> None:
    out_dir = Path(config.output_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    written = yaml.safe_dump(to_dict(config), allow_unicode=True, sort_keys=False)
    (out_dir / "config.yaml").write_text(written, encoding="utf-8")
    (out_dir / "trainable.txt").write_text(table + "\n", encoding="utf-8")
    _write_json(out_dir / RUN_RECORD, record)


def _keep_history(trainer: ForensicTrainer, file: Path) -> None:
    """What was logged behind the last checkpoint of a finished run, where its file holds on to it."""
    logged = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if logged[: len(trainer.state.log_history)] == trainer.state.log_history:
        trainer.state.log_history = logged


def _has_just_evaluated(trainer: ForensicTrainer) -> bool:
    evaluations = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(evaluations) and evaluations[-1] == trainer.state.global_step


def _is_small(path: str, limit_bytes: int = 1 << 30) -> bool:
    """Whether a local checkpoint's weights are below the limit."""
    weights = list(Path(path).glob("*.safetensors"))
    return bool(weights) and sum(file.stat().st_size for file in weights) < limit_bytes


def _learning_rates(config: RunConfig) -> dict[str, str]:
    train = config.train
    rates = {group: f"{train.group_learning_rates.get(group, train.learning_rate):g}" for group in train.trainable}
    return rates | {group: f"{rates[group]} (Muon {train.muon_learning_rate:g})" for group in train.muon_groups}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _say(is_main: bool, text: str) -> None:
    if is_main:
        print(text, file=sys.stdout, flush=True)
