"""Adversarial training: inputs changed within a radius so that the loss rises, then trained on as any other.

Source of the method: fast gradient sign (Goodfellow et al. 2015) and projected gradient descent (Madry et al. 2018), on
pixels or on the vision tower's features. The gradient is taken by `torch.autograd.grad` with respect to the change
alone, on the unwrapped model: no parameter's `.grad` is touched and no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.config import AdversarialConfig, RunConfig
from finetune.errors import ConfigError
from finetune.losses.criterion import total
from finetune.models.loading import Bundle
from finetune.models.perturbation import VisionOffsets
from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration
from finetune.training.evaluation import forward

ZERO_3 = (
    "adversarial training runs the model a second time outside DeepSpeed's engine, which ZeRO-3 cannot do; use ZeRO-2 "
    "or DDP, or set adversarial.share: 0"
)


def adversarial_problems(config: AdversarialConfig) -> list[str]:
    """What is wrong with the settings, one line each."""
    problems = []
    if not 0 <= config.share <= 1:
        problems.append(f"adversarial.share is {config.share}; expected a share of the micro-batches, 0 to 1")
    if not 0 < config.radius < float("inf"):
        problems.append(f"adversarial.radius is {config.radius}; expected a number above 0, or adversarial.share: 0")
    if config.steps < 1:
        problems.append(f"adversarial.steps is {config.steps}; expected at least 1")
    if config.step_size is not None and not config.step_size > 0:
        problems.append(f"adversarial.step_size is {config.step_size}; expected a number above 0, or null")
    return problems


def make_attack(config: RunConfig, bundle: Bundle, zero_stage: int = 0) -> Attack | None:
    """The attack of a run, None where it has none.

    Raises:
        ConfigError: wrong settings, features of a model without heads, or parameters that ZeRO-3 has shared out.
    """
    settings = config.adversarial
    if not settings.share:
        return None
    if settings.target == "features" and not bundle.base.has_heads:
        raise ConfigError("adversarial.target features needs heads.enabled; use adversarial.target: pixels")
    if zero_stage == 3:
        raise ConfigError(ZERO_3)
    return Attack(settings, bundle.base, config.seed)


def attacked(
    trainer: Any, inputs: dict[str, Any], normalizers: Mapping[str, int] | None
) -> tuple[dict[str, Any], float | None]:
    """A training micro-batch, changed where its turn has come, and then the loss that the search began with.

    Args:
        trainer: its `attack`, and `window_place`, the micro-batch's place in its accumulation window, counted up here.
        normalizers: of the step's loss, see `finetune.losses.criterion.total`.
    """
    if trainer.attack is None or not trainer.model.training:
        return inputs, None
    number = trainer.state.global_step * trainer.args.gradient_accumulation_steps + trainer.window_place
    trainer.window_place += 1
    if not trainer.attack.hits(number):
        return inputs, None

    def loss_of(batch: dict[str, Any]) -> Tensor:
        outputs = forward(trainer.model, batch)
        terms = trainer.criterion(outputs, batch)
        return total(terms, normalizers)[0] if terms else outputs.logits.float().sum() * 0

    changed, start = trainer.attack.perturb(inputs, loss_of, (number, trainer.args.process_index))
    return changed, start if start > 0 else None


class Attack:
    """Which micro-batches are attacked, and how.

    Args:
        base: the model itself, for the sizes of its vision tower and its normalisation of pixels.
        seed: with the number of a micro-batch and the rank, decides random starts.
    """

    def __init__(self, config: AdversarialConfig, base: QwenForensicsForConditionalGeneration, seed: int) -> None:
        for problem in adversarial_problems(config):
            raise ConfigError(problem)
        self.config, self.base, self.seed = config, base, seed

    def hits(self, number: int) -> bool:
        """Whether the micro-batch of this number (0 for the run's first) is attacked; evenly spread, by `share`."""
        share = self.config.share
        return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)

    def perturb(
        self, batch: dict[str, Any], loss_of: Callable[[dict[str, Any]], Tensor], key: Sequence[int] = ()
    ) -> tuple[dict[str, Any], float]:
        """The batch changed so that the loss rises, and the loss where the search began.

        Args:
            batch: a collator's batch on the device; one without images comes back unchanged.
            loss_of: scalar loss of a batch through the unwrapped model, with a graph.
            key: numbers that tell this micro-batch from others.

        Returns:
            A new batch with other `pixel_values`, or with `vision_offsets`; the search's first loss (that of the clean
            batch unless `random_start`), NaN without images.
        """
        if batch.get("pixel_values") is None:
            return batch, float("nan")
        config = self.config
        is_single = config.method == "fgsm"
        steps, size = (1, 1.0) if is_single else (config.steps, config.step_size or 1.5 / config.steps)
        changes = self._start(batch, key, is_random=config.random_start and not is_single)
        first = float("nan")
        for number in range(steps):
            leaves = [change.requires_grad_(True) for change in changes]
            loss = loss_of(self._changed(batch, leaves))
            if number == 0:
                first = float(loss.detach())
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            changes = [
                self._step(change.detach(), gradient, sizes, size)
                for change, gradient, sizes in zip(leaves, gradients, self._sizes(batch), strict=True)
            ]
        return self._changed(batch, changes), first

    # ---- the change, in units of the radius's unit ----

    def _start(self, batch: dict[str, Any], key: Sequence[int], *, is_random: bool) -> list[Tensor]:
        """Zero, or uniform within the radius, of the shape of what is attacked."""
        config = self.config
        generator = torch.Generator().manual_seed(_mixed(self.seed, *key))
        starts = []
        for shape in self._shapes(batch):
            values = torch.zeros(shape)
            if is_random:
                values.uniform_(-1, 1, generator=generator)
                values *= config.radius  # (rms of uniform values: 0.58 of the radius, so inside l2 as well)
            starts.append(values.to(batch["pixel_values"].device))
        return starts

    def _shapes(self, batch: dict[str, Any]) -> list[tuple[int, ...]]:
        num_patches = len(batch["pixel_values"])
        vision = self.base.config.vision_config
        if self.config.target == "pixels":
            return [(num_patches, 3, 1, vision.patch_size, vision.patch_size)]
        tokens = num_patches // vision.spatial_merge_size**2
        patches = [(num_patches, vision.hidden_size)] * len(self._blocks())
        return [(tokens, vision.out_hidden_size), *patches]

    def _sizes(self, batch: dict[str, Any]) -> list[list[int]]:
        """Rows of each image in every changed tensor."""
        sizes = batch["image_grid_thw"].prod(dim=1).tolist()
        if self.config.target == "pixels":
            return [sizes]
        tokens = [size // self.base.config.vision_config.spatial_merge_size**2 for size in sizes]
        return [tokens, *[sizes] * len(self._blocks())]

    def _blocks(self) -> list[int]:
        """Tower blocks whose patches the mask head decodes."""
        return self.base.heads_config.vision_layers if self.base.has_heads else []

    def _changed(self, batch: dict[str, Any], changes: Sequence[Tensor]) -> dict[str, Any]:
        if self.config.target == "features":
            return {**batch, "vision_offsets": VisionOffsets(changes[0], tuple(changes[1:]))}
        config, vision = self.base.config, self.base.config.vision_config
        clean = batch["pixel_values"]
        mean, std = (
            torch.tensor(x, device=clean.device).view(1, 3, 1, 1, 1) for x in (config.image_mean, config.image_std)
        )
        frames = clean.view(-1, 3, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        moved = frames + changes[0] / 255 / std  # both frames of a still image alike
        pixels = torch.minimum(torch.maximum(moved, -mean / std), (1 - mean) / std)  # still a picture
        return {**batch, "pixel_values": pixels.view_as(clean).to(clean.dtype)}

    def _step(self, change: Tensor, gradient: Tensor | None, sizes: Sequence[int], size: float) -> Tensor:
        """One step of `size` radii up the gradient, and back into the ball around the clean input."""
        radius, is_linf = self.config.radius, self.config.norm == "linf"
        if gradient is None:  # e.g. the tokens' path where only masks are trained on
            return change
        if is_linf:
            return (change + radius * size * gradient.sign()).clamp(-radius, radius)
        parts = []
        for now, slope in zip(change.split(list(sizes)), gradient.float().split(list(sizes)), strict=True):
            moved = now + radius * size * slope / slope.square().mean().sqrt().clamp(min=1e-30)
            parts.append(moved * (radius / moved.square().mean().sqrt().clamp(min=radius)))
        return torch.cat(parts)


def _mixed(*numbers: int) -> int:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return seed
