"""The models of one `forensics chat`: base, adapters on it, whole models; named, and loaded when they are asked."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config import GenerationConfig, ModelConfig
from finetune.config.model_folder import ADAPTER_CONFIG
from finetune.data.template import Template, load_template
from finetune.errors import ConfigError
from finetune.inference.calibrating import calibration_of
from finetune.inference.chat.dialogue import Speaker
from finetune.inference.commands import check_device
from finetune.models.loading import base_model_path, load_bundle
from finetune.models.shared_base import SharedBase

Kind = Literal["base", "adapter", "merged"]


@dataclass(frozen=True)
class Contestant:
    """A named model: the base itself, an adapter on it, or a whole model of its own."""

    name: str
    kind: Kind
    path: str


class Contestants:
    """What --model, --adapter and --merged name, as speakers.

    Args:
        base_path: base model of the adapters; None where only whole models take part.
        models: at least one, names unique.
        calibration: `auto` or `off`, see `calibrating.calibration_of`.
    """

    def __init__(
        self,
        base_path: str | None,
        models: list[Contestant],
        *,
        generation: GenerationConfig,
        model_config: ModelConfig,
        device: str,
        template: Template | None,
        calibration: str = "auto",
    ) -> None:
        self.models = {model.name: model for model in models}
        self.generation = generation
        self._base_path, self._config, self._device, self._template = base_path, model_config, device, template
        self._calibration = calibration
        self._shared: SharedBase | None = None
        self._speakers: dict[str, Speaker] = {}

    @property
    def names(self) -> list[str]:
        """In the order given: base, adapters, whole models."""
        return list(self.models)

    @property
    def default(self) -> str:
        """Who answers first: the first adapter, else the first model."""
        return next((model.name for model in self.models.values() if model.kind == "adapter"), self.names[0])

    def speaker(self, name: str) -> Speaker:
        """The model of that name, loaded at its first use.

        Raises:
            ConfigError: no such name, or a model without a language model.
            ModelLoadError: as `load_bundle`.
        """
        if name not in self.models:
            raise ConfigError(f"no model is called {name!r}; there are: {', '.join(self.names)}")
        if name not in self._speakers:
            self._speakers[name] = self._load(self.models[name])
        return self._speakers[name]

    def release(self, name: str) -> None:
        """Forget a loaded model; a base stays while it is shared."""
        self._speakers.pop(name, None)

    def _load(self, model: Contestant) -> Speaker:
        if model.kind == "merged":
            if all(self.models[name].kind == "merged" for name in self._speakers):
                self._shared = None  # nobody speaks with it now: two large models need not be in memory at once
            bundle = load_bundle(self._model_config(model.path))
        else:
            if self._shared is None:
                assert self._base_path is not None
                self._shared = SharedBase(self._model_config(self._base_path))
            bundle = self._shared.base() if model.kind == "base" else self._shared.adapter(model.path)
        if not bundle.base.config.has_language:
            raise ConfigError(
                f"{model.path}: heads on the vision tower alone, which cannot talk; forensics vision infer IMAGE "
                "--chat talks about what they found, forensics predict gives their verdict"
            )
        calibration = calibration_of(bundle, model.path, self._calibration)
        return Speaker(bundle, self.generation, template=self._template, device=self._device, calibration=calibration)

    def _model_config(self, path: str) -> ModelConfig:
        return ModelConfig(path=path, dtype=self._config.dtype, quantization=self._config.quantization)


def contestants(arguments: argparse.Namespace) -> Contestants:
    """The models that the arguments name; nothing is loaded yet.

    Raises:
        ConfigError: no model, a name used twice, or adapters of different bases.
    """
    given = [_named(text) for text in ([arguments.model] if arguments.model else [])]
    adapters = [_named(text) for text in arguments.adapter]
    merged = [Contestant(name, "merged", path) for name, path in map(_named, arguments.merged)]
    models: list[Contestant] = []
    base_path = None
    if given and _is_adapter(given[0][1]):
        adapters, given = given + adapters, []
    if given:
        name, base_path = given[0]
        models.append(Contestant(name, "base", base_path))
    elif adapters:
        base_path = _common_base([path for _, path in adapters])
        models.append(Contestant("base", "base", base_path))
    for name, path in adapters:
        if not _is_adapter(path):
            raise ConfigError(f"--adapter {path}: no {ADAPTER_CONFIG} in it; give a whole model with --merged")
        models.append(Contestant(name, "adapter", path))
    models += merged
    if not models:
        raise ConfigError("no model: give --model DIR, --adapter DIR or --merged DIR")
    names = [model.name for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called {twice[0]!r}; name them, e.g. --adapter {twice[0]}-2=DIR")
    return Contestants(
        base_path,
        models,
        generation=GenerationConfig(
            score_threshold=arguments.threshold,
            mask_threshold=arguments.mask_threshold,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.temperature > 0,
            temperature=arguments.temperature or 1.0,
            top_p=arguments.top_p,
            batch_size=arguments.batch_size,
        ),
        model_config=ModelConfig(dtype=arguments.dtype, quantization=arguments.quantization),
        device=check_device(arguments.device),
        template=load_template(arguments.template) if arguments.template else None,
        calibration="off" if arguments.no_calibration else "auto",
    )


def _named(text: str) -> tuple[str, str]:
    """`NAME=DIR`, or a folder named after itself (`best` and checkpoints after their run as well)."""
    name, separator, path = text.partition("=")
    if separator and not Path(text).exists() and re.fullmatch(r"[^/\\\s]+", name):
        if not path:
            raise ConfigError(f"{text!r} names no folder; give NAME=DIR")
        return name, path
    parts = Path(text).resolve().parts if Path(text).exists() else Path(text).parts
    is_general = re.fullmatch(r"best|final|merged|checkpoint-\d+", parts[-1]) and len(parts) > 1
    return ("/".join(parts[-2:]) if is_general else parts[-1]), text


def _is_adapter(path: str) -> bool:
    return (Path(path) / ADAPTER_CONFIG).is_file()


def _common_base(paths: list[str]) -> str:
    for path in paths:
        if not Path(path).is_dir():
            raise ConfigError(f"--adapter {path}: no such folder")
        if not _is_adapter(path):
            raise ConfigError(f"--adapter {path}: no {ADAPTER_CONFIG} in it; give a whole model with --merged")
    bases = {path: base_model_path(path) for path in paths}
    if len(set(bases.values())) > 1:
        raise ConfigError(
            f"the adapters name different base models: {', '.join(f'{p} {b}' for p, b in bases.items())}; give --model "
            "for one of them, and the others merged, with --merged"
        )
    return bases[paths[0]]
