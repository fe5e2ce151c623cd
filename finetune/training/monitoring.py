"""What is watched while a run trains: throughput and memory, collapse, text retention, and pictures of a fixed set.

Numbers go into the ordinary log (TensorBoard, W&B, history.json); warnings into the log and `warnings.jsonl`.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.data.images import load_image
from finetune.data.sources import spread
from finetune.training.evaluation import forward
from finetune.training.retention import WARN_ABOVE, TextRetention

logger = logging.getLogger(__name__)

COLLAPSE_RECALL = 0.1
"""Recall of a class below which an evaluation warns that the model gives every image the other verdict."""
NUM_PICTURES = 4


class Throughput:
    """Images and text tokens of this rank since the last log, per second of training."""

    def __init__(self) -> None:
        self.images = self.tokens = 0
        self._start = time.monotonic()

    def count(self, batch: Mapping[str, Any]) -> None:
        """Take a batch in."""
        self.images += len(batch["cls_labels"])
        if "attention_mask" in batch:  # not in a run without text
            self.tokens += int(batch["attention_mask"].sum())

    def pause(self, seconds: float) -> None:
        """Time that was not training."""
        self._start += seconds

    def take(self, world_size: int) -> dict[str, float]:
        """Numbers for the log, over all ranks by this rank's share; counting begins anew."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        found = {
            "images_per_second": self.images * world_size / seconds,
            "tokens_per_second": self.tokens * world_size / seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
        self.images = self.tokens = 0
        self._start = now
        return found


def peak_memory_gb() -> float:
    """Highest memory so far in 1e9 bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Watch(TrainerCallback):
    """Warns of collapse and of lost text at evaluations, and shows the first records in TensorBoard and W&B."""

    def __init__(self, out_dir: str | Path, retention: TextRetention | None) -> None:
        self.out_dir = Path(out_dir)
        self.retention = retention
        self.trainer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.retention is not None:
            self.retention.prepare(self.trainer.model, self.trainer.resumed_from, state.is_world_process_zero)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self.trainer.throughput.pause((metrics or {}).get("eval_runtime", 0.0))
        if state.is_world_process_zero:
            for message in evaluation_warnings(metrics or {}):
                self._warn(state.global_step, message)
        self._show(args, state)

    def _warn(self, step: int, message: str) -> None:
        logger.warning("step %d: %s", step, message)
        with (self.out_dir / "warnings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "warning": message}, ensure_ascii=False) + "\n")

    def _show(self, args: TrainingArguments, state: TrainerState) -> None:
        """On every rank, since a forward pass may be a step of all of them; only the main one writes."""
        if not {"tensorboard", "wandb"} & set(args.report_to) or self.trainer.eval_dataset is None:
            return
        shown = pictures(self.trainer, shown_records(self.trainer.eval_dataset)[:NUM_PICTURES])
        writer = next((c.tb_writer for c in self.trainer.callback_handler.callbacks if hasattr(c, "tb_writer")), None)
        if state.is_world_process_zero and writer is not None:
            for name, picture in shown.items():
                writer.add_image(f"eval/{name}", picture, state.global_step, dataformats="HWC")
        if state.is_world_process_zero and "wandb" in args.report_to:
            import wandb

            images = {f"eval/{name}": wandb.Image(picture) for name, picture in shown.items()}
            wandb.log({**images, "train/global_step": state.global_step})


def evaluation_warnings(metrics: Mapping[str, float]) -> list[str]:
    """What an evaluation's numbers say has gone wrong, one line each."""
    found = []
    names = {"eval_recall_real": ("authentic", "tampered"), "eval_recall_fake": ("tampered", "authentic")}
    if all(name in metrics for name in names):
        for name, (missed, given) in names.items():
            if metrics[name] < COLLAPSE_RECALL:
                found.append(
                    f"only {metrics[name]:.0%} of the {missed} images are recognised: the model is collapsing to 'all "
                    f"{given}'; balance the classes (data.class_balanced), lower the learning rate or stop earlier"
                )
    drift = metrics.get("eval_text_drift")
    if drift is not None and drift > WARN_ABOVE:
        found.append(
            f"the text has moved {drift:.2f} nats per token from the base model's (warning above {WARN_ABOVE}): the "
            "language is being lost; fewer epochs, a lower rate for the language model, or general chat data mixed in"
        )
    return found


def shown_records(dataset: Any) -> list[int]:
    """Numbers of the records that have an image."""
    return [index for index, record in enumerate(dataset.records) if record.images]


class HeatmapSnapshots(TrainerCallback):
    """Draws the same evaluation images at every evaluation: `heatmaps/step-N/ID.png`, see `pictures`.

    Args:
        count: how many, at even distances over the evaluation set.
    """

    def __init__(self, out_dir: str | Path, count: int) -> None:
        self.folder, self.count = Path(out_dir) / "heatmaps", count
        self.trainer: Any = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """On every rank, as `Watch._show`; only the main one writes."""
        candidates = shown_records(self.trainer.eval_dataset)
        drawn = pictures(self.trainer, spread(candidates, self.count))
        if not state.is_world_process_zero or not drawn:
            return
        folder = self.folder / f"step-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in drawn.items():
            Image.fromarray(picture).save(folder / (re.sub(r"[^\w.-]+", "_", name)[:100] + ".png"))


@torch.no_grad()
def pictures(trainer: Any, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Of evaluation records with an image: the first image, its target and its predicted mask side by side.

    Returns:
        Name by record id -> (H, 3 W, 3) uint8; the tampered area is tinted red.
    """
    dataset, found = trainer.eval_dataset, {}
    was_training = trainer.model.training
    trainer.model.eval()
    for index in indices:
        batch = trainer._prepare_inputs(trainer.data_collator(dataset.without_answers_at([index])))
        outputs = forward(trainer.model, batch)
        if outputs.mask_logits is None:
            continue
        scores = outputs.mask_logits[0].float().sigmoid().cpu().numpy()
        record, target = dataset.records[index], batch["mask_targets"][0]
        opened = load_image(record.images[0], record.id, record.source)
        image = np.asarray(opened.resize(scores.shape[::-1]))
        truth = np.zeros_like(scores) if target is None else _resized(target.cpu().numpy(), scores.shape)
        found[f"{index}_{record.id}"] = np.concatenate([image, tinted(image, truth), tinted(image, scores)], 1)
    trainer.model.train(was_training)
    return found


def tinted(image: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Image (H, W, 3) uint8 with red laid over it in proportion to scores (H, W) in [0, 1]."""
    share = 0.6 * scores[..., None]
    return (image * (1 - share) + np.array([255.0, 0.0, 0.0]) * share).astype(np.uint8)


def _resized(mask: np.ndarray, size_hw: tuple[int, ...]) -> np.ndarray:
    rows = np.arange(size_hw[0]) * mask.shape[0] // size_hw[0]
    columns = np.arange(size_hw[1]) * mask.shape[1] // size_hw[1]
    return mask[rows][:, columns].astype(np.float32)
