"""`transformers.Trainer` with per-term losses that are normalised over the whole accumulated, distributed batch.

Source of the method: the Trainer hands every step the item counts of its accumulation window; here they are counts per
loss term, summed over ranks, so that 4x1, 1x4 and 2 ranks x 2 give one gradient. Saving goes through `save_bundle`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from finetune.config import RunConfig
from finetune.data.collator import ForensicCollator
from finetune.data.dataset import ForensicDataset
from finetune.errors import ConfigError, TrainingDivergedError
from finetune.losses.criterion import Criterion, total
from finetune.metrics.calibration import Calibration
from finetune.models.groups import group_of
from finetune.models.loading import Bundle, save_bundle
from finetune.training.adversarial import attacked, make_attack
from finetune.training.callbacks import SamplerEpochCallback
from finetune.training.checkpoint import load_weights
from finetune.training.evaluation import EvaluationState, collect_heads, evaluate_losses, forward
from finetune.training.feature_cache import FeatureCache
from finetune.training.monitoring import Throughput
from finetune.training.muon import MuonAdamW, is_matrix
from finetune.training.progress import ProgressLines
from finetune.training.region_masking import NumberedSampler, RegionMaskingCallback, shuffled
from finetune.training.retention import TextRetention
from finetune.training.sampling import ClassBalancedSampler, evaluation_batches
from finetune.training.saving import CheckpointingTrainer, StopSignals
from finetune.training.schedule import TimeBudget, make_scheduler
from finetune.training.sharding import unhook_heads, zero_stage

logger = logging.getLogger(__name__)

_NO_DECAY = ("bias", "norm", "trainable_tokens", "layer_mix")


class ForensicTrainer(CheckpointingTrainer):
    """Trainer of one run.

    Args:
        bundle: model (already restricted to what trains), processor and vocabulary.
        config: the run; loss weights, learning rates and the sampler are read from it.
        args: `training_arguments(config)`.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any
    loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole accumulation window

    def __init__(
        self,
        bundle: Bundle,
        config: RunConfig,
        args: Any,
        train_dataset: ForensicDataset | None = None,
        eval_dataset: ForensicDataset | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        self.bundle = bundle
        self.run_config = config
        self.criterion = Criterion(config.loss)
        self.budget = TimeBudget(config.train.max_seconds)
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps: dict[str, int] = {}
        self._window_ids: list[str] = []
        self._rates: dict[str, float] = {}
        self.throughput = Throughput()
        self.retention: TextRetention | None = None
        self.features: FeatureCache | None = None
        self.last_evaluation: EvaluationState | None = None  # over all ranks
        self.window_place = 0  # of the next micro-batch in its accumulation window
        self._attack_gains: list[float] = []
        self.attack = make_attack(config, bundle, zero_stage(args))
        super().__init__(
            model=bundle.model,
            args=args,
            data_collator=ForensicCollator(bundle.processor, bundle.tokens, heads_source=config.heads.source),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # hands `num_items_in_batch` over; the base model declares False
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressLines())
        self.stop_signals = StopSignals()
        self.add_callback(self.stop_signals)

    # ---- data ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        sampler: Any = None
        if self.run_config.data.class_balanced and isinstance(dataset, ForensicDataset):
            labels = dataset.class_labels
            if {0, 1} <= set(labels):
                sampler = ClassBalancedSampler(labels, dataset.pairs, seed=self.args.seed)
        is_masked = self.run_config.region_masking.enabled
        is_varied = self.run_config.data.mirror_regions != "none" or self.run_config.data.shuffle_regions
        if (is_masked or is_varied) and isinstance(dataset, ForensicDataset):
            is_sequential = self.args.train_sampling_strategy == "sequential"
            plain = SequentialSampler(dataset) if is_sequential else shuffled(len(dataset), self.args.seed)
            sampler = NumberedSampler(sampler or plain)
            dataset.draw_seed = self.args.seed
            self.remove_callback(RegionMaskingCallback)
            if is_masked:
                self.add_callback(RegionMaskingCallback(dataset, self.run_config))
        if sampler is None:
            return super()._get_train_sampler(dataset)
        self.remove_callback(SamplerEpochCallback)
        self.add_callback(SamplerEpochCallback(sampler))
        return sampler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count of every loss term over the accumulation window and all ranks: {term: int}."""
        counts: dict[str, int] = dict.fromkeys(self.criterion.weights, 0)
        self._window_ids, self.window_place = [], 0
        for batch in batch_samples:
            self._window_ids += batch["record_ids"]
            self.throughput.count(batch)
            for name, count in self.criterion.counts(batch).items():
                counts[name] += count
        if self.args.world_size > 1:
            summed = torch.tensor(list(counts.values()), device=device, dtype=torch.float64)
            summed = self.accelerator.reduce(summed, reduction="sum")
            counts = {name: int(value) for name, value in zip(counts, summed.tolist(), strict=True)}
        for name, count in counts.items():
            self._term_steps[name] = self._term_steps.get(name, 0) + (count > 0)
        return counts

    def _prepare_input(self, data: Any) -> Any:
        """To the device, nothing else.

        Under DeepSpeed the base class would round pixel values to half precision as well, and with them the noise that
        the residual stream reads. The vision tower casts for itself.
        """
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, and with the frozen tower's features where they are cached."""
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.features is None else self.features.complete(inputs)

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> Any:
        """This micro-batch's share of the loss of the whole batch, times the world size (ranks average gradients)."""
        inputs, start = attacked(self, inputs, num_items_in_batch)
        outputs = forward(model, inputs)
        terms = self.criterion(outputs, inputs)
        if terms:
            loss, means = total(terms, num_items_in_batch)
        else:  # e.g. a text-only batch where the text weight is 0
            anything = outputs.cls_logits if outputs.logits is None else outputs.logits
            loss, means = anything.float().sum() * 0, {}
        if not bool(torch.isfinite(loss.detach())):
            values = ", ".join(f"{name} {float(value):g}" for name, value in means.items())
            raise TrainingDivergedError(
                f"the loss is not finite at step {self.state.global_step + 1} ({values}) on records "
                f"{inputs.get('record_ids')}; lower the learning rate, or check these records with forensics doctor"
            )
        if start is not None:
            self._attack_gains.append(float(loss.detach()) / start - 1)
        if outputs.branch_anchor is not None:
            loss = loss + outputs.branch_anchor
        if self.model.training:
            for name, value in means.items():
                self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach()
        loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every loss term: over all ranks, averaged over the steps since the last log that had something to count.

        A step without a tampered image has no Dice; averaging zeros in would show half the true value. `loss` itself
        is the mean over all steps.
        """
        if "loss" in logs and "eval_loss" not in logs and any(self._term_steps.values()):
            names = sorted(self.criterion.weights)
            values = torch.tensor(
                [float(self._term_sums.get(name, 0.0)) for name in names], device=self.args.device, dtype=torch.float32
            )
            if self.args.world_size > 1:
                values = self.accelerator.reduce(values, reduction="sum")
            for name, value in zip(names, values.tolist(), strict=True):
                if self._term_steps.get(name):
                    logs[f"loss_{name}"] = value / self._term_steps[name]
            self._term_sums, self._term_steps = {}, {}
            logs |= self._rates | self.throughput.take(self.args.world_size)
            if self._attack_gains:  # of this rank
                logs["adversarial_gain"] = sum(self._attack_gains) / len(self._attack_gains)
                self._attack_gains = []
        if "train_loss" in logs:  # the base class divides by the steps since a resumption
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the base class; stops at a gradient that is not finite before it ruins the weights."""
        norm = super()._clip_grad_norm(model)
        is_scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: skipped steps are part of the method
        if norm is not None and not is_scaled and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise TrainingDivergedError(
                f"the gradient is not finite at step {self.state.global_step + 1} on records {self._window_ids}; lower "
                "the learning rate, or check these records with forensics doctor"
            )
        return norm

    # ---- optimiser ----

    def _prepare_for_training(self, *arguments: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments)
        unhook_heads(self.bundle, self.args)
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One parameter group per trainable group and decay setting, each with its own learning rate."""
        if self.optimizer is None:
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if self.run_config.train.muon_groups:
                if self.is_deepspeed_enabled:
                    raise ConfigError("train.muon_groups needs whole gradients, which DeepSpeed cuts up; set it to []")
                if not issubclass(optimizer_class, AdamW):
                    raise ConfigError(f"train.muon_groups needs AdamW for the rest, not {optimizer_class.__name__}")
                optimizer_class = MuonAdamW
            self.optimizer = optimizer_class(self._parameter_groups(), **arguments)
        return self.optimizer

    def _parameter_groups(self) -> list[dict[str, Any]]:
        train = self.run_config.train
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            group = group_of(name, train.trainable) or "other"
            decays = parameter.ndim > 1 and not any(part in name for part in _NO_DECAY)
            muon = decays and group in train.muon_groups and is_matrix(name, parameter)
            label = f"{group}{'' if decays else ' (no decay)'}{' (Muon)' if muon else ''}"
            rate = train.group_learning_rates.get(group, train.learning_rate)
            entry = groups.setdefault(
                label,
                {
                    "params": [],
                    "lr": train.muon_learning_rate if muon else rate,
                    "weight_decay": train.weight_decay if decays else 0.0,
                    "name": label,
                },
            )
            if muon:
                entry["muon"] = True
            entry["params"].append(parameter)
        return list(groups.values())

    def _get_learning_rate(self) -> float:
        """As the base class, which asks before the schedule moves on; the rate of each group is noted for the log."""
        groups = [group for group in self.optimizer.param_groups if "name" in group]
        self._rates = {f"lr_{group['name'].split(' ')[0]}": float(group["lr"]) for group in groups}
        return super()._get_learning_rate()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our schedule, which a time budget can compress."""
        if self.lr_scheduler is None:
            train = self.run_config.train
            warmup = train.warmup_ratio
            if train.warmup_steps is not None:
                warmup = min(train.warmup_steps / max(num_training_steps, 1), 1.0)
            self.lr_scheduler = make_scheduler(
                optimizer or self.optimizer, train.lr_scheduler, num_training_steps, warmup, self.budget
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's share. Not prepared by accelerate, which would repeat records to fill the last batches."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            dataset,
            batch_sampler=self._evaluation_batches(dataset)[0],
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _evaluation_batches(self, dataset: Any) -> tuple[list[list[int]], int]:
        return evaluation_batches(
            len(dataset), self.args.eval_batch_size, self.args.world_size, self.args.process_index
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss terms and head metrics over the images of all ranks, each counted once.

        Losses are teacher-forced. Heads are scored without any reference answer: where the tokens come first the same
        forward pass serves; where an answer may precede them, a second pass sees the question and the tokens only.
        """
        model = self._wrap_model(self.model, training=False, dataloader=dataloader)
        model.eval()
        dataset = dataloader.dataset
        batches, num_counted = self._evaluation_batches(dataset)
        state = EvaluationState()
        for number, batch in enumerate(dataloader):
            batch = self._prepare_inputs(batch)
            batch_state = EvaluationState()
            outputs = evaluate_losses(model, self.criterion, batch, batch_state)
            if isinstance(dataset, ForensicDataset) and dataset.heads_may_read_answers:
                batch = self._prepare_inputs(self.data_collator(dataset.without_answers_at(batches[number])))
                with torch.no_grad():
                    outputs = forward(model, batch)
            groups = dataset.groups_of_images(batches[number]) if isinstance(dataset, ForensicDataset) else None
            collect_heads(outputs, batch, batch_state, groups)
            if number < num_counted:
                state.add(batch_state)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.args.world_size > 1:
            gathered: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(gathered, state)
            state = EvaluationState()
            for other in gathered:
                state.add(other)
        self.last_evaluation = state
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in state.metrics(self.criterion.weights).items()}
        if self.retention is not None and self.retention.rows:
            metrics[f"{metric_key_prefix}_text_drift"] = self.retention.drift(model)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(state.labels))

    def last_calibration(self) -> Calibration | None:
        """Fitted on the images of the last evaluation; None where there is nothing to fit, and for heads on tokens,
        whose scores are used as they are."""
        if self.last_evaluation is None or not self.bundle.base.reads_tower:
            return None
        return self.last_evaluation.calibration()

    # ---- saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_bundle(self.bundle, output_dir or str(self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Every weight, or an error: the base class loads by name in memory, and a checkpoint's names are others."""
        load_weights(self.bundle, resume_from_checkpoint)
