"""The Trainer's saving and resuming: whole checkpoints only, and what the base class forgets is put back.

The base class restores weights, optimizer, schedule, random numbers and its place in the epoch. Added here: the loss
sums since the last log, the time used up, and a stop at the next step when the system asks for one.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config import to_dict
from finetune.data.image_frame import frame_of
from finetune.errors import CheckpointError, TrainingDivergedError
from finetune.training.checkpoint import clear_staging, differences, publish, read_manifest, resume_point, write_failure
from finetune.training.denormals import denormals_dropped

logger = logging.getLogger(__name__)

_KEPT = ("learning_rate", "group_learning_rates", "weight_decay", "lr_scheduler")
"""What of `describe_run` the state of the optimizer and of the schedule holds."""


class CheckpointingTrainer(Trainer):
    """`Trainer` whose checkpoints appear complete or not at all and hold all that a resumed run needs."""

    bundle: Any
    run_config: Any
    budget: Any
    _term_sums: dict[str, Any]
    _term_steps: dict[str, int]
    _window_ids: list[str]
    _attack_gains: list[float]
    _staging: Path | None = None
    resumed_from: str | None = None

    def describe_run(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its continuation, for the same losses to follow."""
        args = self.args
        return {
            "world_size": args.world_size,
            "batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "max_steps": self.state.max_steps,
            "engine": self._engine(),
            "optimizer": [str(args.optim), *sorted(self.run_config.train.muon_groups)],
            "learning_rate": args.learning_rate,
            "group_learning_rates": self.run_config.train.group_learning_rates,
            "weight_decay": args.weight_decay,
            "lr_scheduler": self.run_config.train.lr_scheduler,
            **{f"loss.{name}": value for name, value in to_dict(self.run_config.loss).items()},
            "frame": frame_of(self.bundle.processor.image_processor),
            "records": len(self.train_dataset) if self.train_dataset is not None else 0,
        }

    def find_resume_point(self, resume: str | None) -> str | None:
        """The main process's choice, on every rank; see `checkpoint.resume_point`."""
        found: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                point = resume_point(self.args.output_dir, resume)
                if point is not None:
                    self._refuse_other_state(point)
                found = [None if point is None else str(point), None]
            except CheckpointError as error:
                found = [None, str(error)]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise CheckpointError(found[1])
        return found[0]

    def _engine(self) -> str:
        """What holds optimizer and weights; a checkpoint of DeepSpeed is divided among its ranks."""
        if not self.is_deepspeed_enabled:
            return "no DeepSpeed"
        return f"DeepSpeed ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage} on {self.args.world_size} ranks"

    def _refuse_other_state(self, point: Path) -> None:
        """Refuse a checkpoint whose optimizer state this run cannot take up.

        Raises:
            CheckpointError: another engine or another optimizer wrote it.
        """
        then = (read_manifest(point) or {}).get("run", {})
        now = self.describe_run()
        for name in ("engine", "optimizer"):
            if name in then and then[name] != now[name]:
                raise CheckpointError(
                    f"{point} was written with {name} {then[name]}, this run has {now[name]}: its optimizer state "
                    "cannot be taken up; go on as before, or start a new run from its weights (model.path or adapter)"
                )

    def take_up_finished(self, point: str, best: Any) -> bool:
        """Load a checkpoint behind which no step is to come, all steps done or patience used up; False where some are.

        The base class would train one more. A checkpoint of DeepSpeed is left to it.

        Args:
            best: the run's `BestModelCallback`, whose bookkeeping is restored; None without evaluation.
        """
        if self.is_deepspeed_enabled:
            return False
        state = TrainerState.load_from_json(str(Path(point) / "trainer_state.json"))
        state.is_world_process_zero = self.is_world_process_zero()
        state.is_local_process_zero = self.is_local_process_zero()
        last = self.args.max_steps
        if last <= 0 and state.num_train_epochs == self.args.num_train_epochs:
            last = state.max_steps
        if best is not None:
            best.on_train_begin(self.args, state, self.control)
        if not 0 < last <= state.global_step and not (best is not None and best.is_out_of_patience):
            return False
        self._load_from_checkpoint(point)
        self.state, self.resumed_from = state, point
        return True

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **keywords: Any) -> Any:
        """As the base class, without denormal numbers; where the run diverges, the records of that step are saved.

        Raises:
            TrainingDivergedError: a loss or gradient is not finite; names the file with the records.
        """
        self.resumed_from = resume_from_checkpoint
        try:
            with denormals_dropped(self.args.device):
                return super().train(resume_from_checkpoint, *arguments, **keywords)
        except TrainingDivergedError as error:
            file = Path(self.args.output_dir) / f"diverged_rank{self.args.process_index}.json"
            found = {"step": self.state.global_step + 1, "records": self._window_ids, "reason": str(error)}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
            raise TrainingDivergedError(f"{error}; the records of the step are in {file}") from error

    # ---- writing ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the base class, in a staging folder that becomes visible under its name when everything is written.

        Raises:
            CheckpointError: no room or no right to write; earlier checkpoints are as they were.
        """
        out_dir = Path(self.args.output_dir)
        try:
            if self.args.should_save:
                clear_staging(out_dir)
            self._wait_for_all()
            self._staging = out_dir / ".saving"
            super()._save_checkpoint(model, trial)
            staged = self._staging / f"checkpoint-{self.state.global_step}"
            self._write_progress(staged)
            self._wait_for_all()
            if self.args.should_save:
                publish(staged, out_dir, self.describe_run(), self.args.save_total_limit)
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = write_failure(error, out_dir)
            if failure is None:
                raise
            raise failure from error
        finally:
            self._staging = None
        self._wait_for_all()

    def _write_progress(self, folder: Path) -> None:
        progress = {
            "seconds": self.budget.elapsed(),
            "loss": float(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "term_sums": {name: float(value) for name, value in self._term_sums.items()},
            "term_steps": self._term_steps,
            "attack_gains": self._attack_gains,
        }
        self._progress_file(folder).write_text(json.dumps(progress, indent=2), encoding="utf-8")

    def _progress_file(self, folder: str | Path) -> Path:
        return Path(folder) / f"progress_{self.args.process_index}.json"

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()

    # ---- reading ----

    def restore_progress(self) -> None:
        """Called when the base class has set up its counters, before the first step."""
        elapsed = 0.0
        if self.resumed_from is not None:
            for changed in differences(self.resumed_from, self.describe_run()):
                is_kept = changed.split(":")[0] in _KEPT
                effect = "the checkpoint's holds on" if is_kept else "the losses will not be those of one run"
                logger.warning("resumed with another %s: %s", changed, effect)
            file = self._progress_file(self.resumed_from)
            if file.is_file():
                saved = json.loads(file.read_text(encoding="utf-8"))
                elapsed = saved["seconds"]
                self._tr_loss += saved["loss"]
                self._total_loss_scalar = saved["total_loss"]
                self._globalstep_last_logged = saved["last_logged"]
                device = self.args.device
                self._term_sums = {name: torch.tensor(v, device=device) for name, v in saved["term_sums"].items()}
                self._term_steps = dict(saved["term_steps"])
                self._attack_gains = list(saved["attack_gains"])
            elif self.is_world_process_zero():
                logger.warning("%s holds no %s: averages begin anew", self.resumed_from, file.name)
        self.budget.start(elapsed)


class StopSignals(TrainerCallback):
    """SIGTERM (a shutdown, `kill`) and SIGUSR1 (SLURM before its time limit): checkpoint at the next step, then stop.

    Every rank stops at the same step, whichever of them was told. Repeated signals change nothing: launchers pass
    SIGTERM on to processes that have had it already.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, _frame: Any) -> None:
        self.received = self.received or number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            seen = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
            self.received = int(seen)
        if self.received:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
