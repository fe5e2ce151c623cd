"""The train YAML of the region pipeline (`model_name`, `peft`, `freeze`, `optim`, `trainer`, ...) as a run's own keys.

Such a file is recognised by its keys. It trains on text alone, the forensic heads are off, and the best model goes by
`eval_loss`. Sections of `RunConfig` may stand beside its keys; what is said twice is an error. `trainer` is
`region_trainer`'s part. Nothing is opened here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.config.conversion import build, merge
from finetune.config.region_trainer import TRAINER_KEYS, trainer_settings
from finetune.config.sections import DataConfig, LoraConfig, RunConfig
from finetune.errors import ConfigError, shorten

LANGUAGE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names that `peft.target_modules` may list: the linear layers of each language-model layer."""


@dataclass
class PeftKeys:
    """LoRA; the same rank and alpha on the language model and on vision blocks."""

    enable: bool | None = None  # null: where `freeze` asks for LoRA
    qlora: bool = False  # hold the language model in 4 bits (nf4)
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | str = field(default_factory=lambda: list(LANGUAGE_LAYERS))


@dataclass
class FreezeKeys:
    """What stays as it is: true frozen, false trained whole."""

    vision_tower: bool | str = True  # also lora_top_N: LoRA on the last N blocks; top_N: the last N blocks whole
    projector: bool = False
    language: bool | str = "lora_only"  # lora_only: LoRA on `peft.target_modules`


@dataclass
class OptimKeys:
    """Rates, batches and length."""

    lr_lm: float = 1e-4
    lr_proj: float | None = None  # null: lr_lm
    lr_vision: float | None = None  # null: lr_lm
    batch_size: int = 1  # per device
    grad_accum: int = 1
    epochs: float = 1.0
    warmup_steps: int | None = None  # null: the share trainer.warmup_ratio, or 0.03
    weight_decay: float = 0.0
    grad_checkpointing: bool = False


@dataclass
class DataKeys:
    """Files written by `forensics regions build`; other keys of `data` are those of every run."""

    train_jsonl: list[str] | str = field(default_factory=list)
    val_jsonl: list[str] | str | None = None


@dataclass
class RegionYaml:
    """Every key of the file; `output_dir` and `data` it shares with every run."""

    model_name: str = ""
    precision: Literal["auto", "fp32", "float32", "bf16", "bfloat16", "fp16", "float16"] = "auto"
    image_short_side: int | None = None
    max_regions_per_image: int | None = None
    peft: PeftKeys = field(default_factory=PeftKeys)
    freeze: FreezeKeys = field(default_factory=FreezeKeys)
    optim: OptimKeys = field(default_factory=OptimKeys)
    data: DataKeys = field(default_factory=DataKeys)
    trainer: dict[str, Any] = field(default_factory=dict)


MARKS = frozenset(field.name for field in dataclasses.fields(RegionYaml)) - {"data"}
_DATA = ("train_jsonl", "val_jsonl")
REGION_FEATURES = "model.region_features"
"""A run's key beside these: the features train where they are switched on."""
_SECTIONS = ("peft", "freeze", "optim", "trainer")
NATIVE = {
    "model_name": "model.path", "precision": "train.precision", "image_short_side": "data.image_short_side",
    "max_regions_per_image": "data.max_regions", "peft.qlora": "model.quantization", "peft.r": "lora.r",
    "peft.alpha": "lora.alpha", "peft.dropout": "lora.dropout", "peft.target_modules": "lora.target_modules",
    "freeze.vision_tower": "train.trainable", "freeze.projector": "train.trainable",
    "freeze.language": "train.trainable", "optim.lr_lm": "train.learning_rate",
    "optim.lr_proj": "train.group_learning_rates", "optim.lr_vision": "train.group_learning_rates",
    "optim.batch_size": "train.batch_size", "optim.grad_accum": "train.gradient_accumulation_steps",
    "optim.epochs": "train.epochs", "optim.warmup_steps": "train.warmup_steps",
    "optim.weight_decay": "train.weight_decay", "optim.grad_checkpointing": "train.gradient_checkpointing",
    "data.train_jsonl": "data.train", "data.val_jsonl": "data.eval",
    **{f"trainer.{name}": path for name, path in TRAINER_KEYS.items()},
}  # fmt: skip
"""Key of the file -> key of `RunConfig` that it sets. `peft.enable` is checked only."""
_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/regions",
    "heads": {"enabled": False},
    "loss": {"text": 1.0, "focal": 0.0, "dice": 0.0, "boundary": 0.0, "authentic": 0.0, "contrast_region": 0.0},
    "data": {"class_balanced": False},
    "train": {"metric_for_best": "eval_loss"},
}


def is_region_yaml(tree: Mapping[str, Any]) -> bool:
    """Whether a file is written in this spelling: at least two of its own keys, so that a slip is not taken for it."""
    return len(MARKS & set(tree)) >= 2


def is_region_key(key: str) -> bool:
    """Whether `translate` needs an override's key: one of this spelling, one that decides what trains, or one of
    neither spelling, so that it says which is nearest."""
    first, _, rest = key.partition(".")
    if key == REGION_FEATURES:
        return True
    if first == "data":
        return rest.split(".")[0] not in _fields(DataConfig)
    return first in MARKS or first not in _fields(RunConfig)


def check_overrides(keys: Sequence[str]) -> None:
    """Overrides do not say one thing in both spellings.

    Raises:
        ConfigError: they do.
    """
    for key in keys:
        native = NATIVE.get(key)
        twin = next((other for other in keys if other == native), None)
        if twin is not None:
            raise ConfigError(f"the overrides '{key}' and '{twin}' say the same thing; keep one")


def translate(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The file's tree as one for `RunConfig`.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of another type, something said twice, a
            contradiction.
    """
    if "stages" in tree:
        raise ConfigError(f"{where}: 'stages' cannot stand beside peft, freeze and optim; give each phase its own file")
    _check_keys(tree, where)
    data = dict(tree.get("data") or {})
    own = {name: {} if value is None and name in _SECTIONS else value for name, value in tree.items() if name in MARKS}
    own["data"] = {name: data.pop(name) for name in _DATA if name in data}
    keys = build(RegionYaml, own, where)
    beside = {name: value for name, value in tree.items() if name not in MARKS and name != "data"}
    beside["data"] = data
    if not keys.model_name and not (beside.get("model") or {}).get("path"):
        raise ConfigError(f"{where}: 'model_name' is missing; give a Qwen2.5-VL folder or hub name")
    settings, said = _settings(keys, own, where)
    if (beside.get("model") or {}).get("region_features") is True:
        settings["train"]["trainable"].append("region_features")
    _check_twice(said, beside, where)
    return merge(merge(_DEFAULTS, settings), beside)


def _check_keys(tree: Mapping[str, Any], where: str) -> None:
    known = {"": [*MARKS, *_fields(RunConfig)], "data": [*_DATA, *_fields(DataConfig)]}
    for section, names in known.items():
        found = tree.get(section, {}) if section else tree
        if found is None:
            continue
        if not isinstance(found, dict):
            raise ConfigError(
                f"{where}: '{section}' is {shorten(found)}; expected a section with keys {', '.join(names)}"
            )
        for name in found:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                advice = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(names))}"
                key = f"{section}.{name}" if section else name
                raise ConfigError(f"{where}: unknown key '{key}' (value {shorten(found[name])}); {advice}")


def _settings(keys: RegionYaml, own: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree that the keys make, and native key -> key of the file for all that the file says."""
    groups, towers = _trainable(keys, where)
    optim, peft = keys.optim, keys.peft
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(keys.precision, keys.precision)
    values: dict[str, Any] = {
        "model_name": keys.model_name, "precision": precision, "image_short_side": keys.image_short_side,
        "max_regions_per_image": keys.max_regions_per_image, "peft.qlora": "nf4" if peft.qlora else "none",
        "peft.r": peft.r, "peft.alpha": peft.alpha, "peft.dropout": peft.dropout,
        "peft.target_modules": _target_modules(peft.target_modules, where), "optim.lr_lm": optim.lr_lm,
        "optim.batch_size": optim.batch_size, "optim.grad_accum": optim.grad_accum, "optim.epochs": optim.epochs,
        "optim.warmup_steps": optim.warmup_steps, "optim.weight_decay": optim.weight_decay,
        "optim.grad_checkpointing": optim.grad_checkpointing, "data.train_jsonl": _listed(keys.data.train_jsonl),
        "data.val_jsonl": _listed(keys.data.val_jsonl),
    }  # fmt: skip
    given = {f"{name}.{sub}" for name, value in own.items() if isinstance(value, dict) for sub in value} | set(own)
    tree: dict[str, Any] = {
        "vision_lora": {"r": peft.r, "alpha": peft.alpha, **towers.get("vision_lora", {})},
        "vision_top": towers.get("vision_top", {}),
        "train": {
            "trainable": groups,
            "group_learning_rates": _rates(optim, groups),
            "eval_batch_size": optim.batch_size,
        },
    }
    for key, value in values.items():
        _put(tree, NATIVE[key], value)
    said: dict[str, str] = {}
    for key in sorted(given & set(NATIVE)):
        if not key.startswith("trainer."):
            said.setdefault(NATIVE[key], key)
    if "freeze.vision_tower" in given:
        said |= {f"{section}.blocks": "freeze.vision_tower" for section in towers}
    if optim.warmup_steps is not None:
        said["train.warmup_ratio"] = "optim.warmup_steps"
    for name, path, value in trainer_settings(keys.trainer, precision if "precision" in given else None, where):
        key = f"trainer.{name}"
        if path in said:
            raise ConfigError(f"{where}: '{said[path]}' and '{key}' say the same thing; keep one")
        said[path] = key
        _put(tree, path, value)
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    _put(tree, "model.dtype", dtypes.get(tree["train"]["precision"], "auto"))
    return tree, said


def _trainable(keys: RegionYaml, where: str) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Groups that train, and the section `vision_lora` or `vision_top` they need."""
    freeze, peft = keys.freeze, keys.peft
    tower, count = _tower(freeze.vision_tower, where)
    if freeze.language not in (True, False, "lora_only"):
        raise ConfigError(f"{where}: 'freeze.language' is {shorten(freeze.language)}; choose lora_only, true or false")
    if tower == "vision_full" and freeze.projector:
        raise ConfigError(
            f"{where}: 'freeze.vision_tower' is false, which trains the projector too, and 'freeze.projector' is true; "
            "use top_N to train blocks of the tower without it"
        )
    _check_peft(freeze, peft, tower, where)
    language = {True: "", False: "lm_full", "lora_only": "lm_lora"}[freeze.language]
    groups = [group for group in (language, "" if freeze.projector else "projector", tower) if group]
    if not groups:
        raise ConfigError(f"{where}: 'freeze' freezes everything, so nothing would train; set one of its keys to false")
    sections: dict[str, dict[str, Any]] = {"vision_lora": {"blocks": list(range(-count, 0))}}
    sections["vision_top"] = {"blocks": count}
    return groups, {tower: sections[tower]} if tower in sections else {}


def _tower(value: bool | str, where: str) -> tuple[str, int]:
    """Group of the vision tower that trains ("" none) and its number of blocks."""
    if isinstance(value, bool):
        return ("" if value else "vision_full"), 0
    match = re.fullmatch(r"(lora_)?top_(\d+)", value)
    if match is None or int(match[2]) == 0:
        raise ConfigError(
            f"{where}: 'freeze.vision_tower' is {shorten(value)}; choose true, false, lora_top_N (LoRA on the last N "
            "blocks) or top_N (the last N blocks whole), e.g. lora_top_4"
        )
    return ("vision_lora" if match[1] else "vision_top"), int(match[2])


def _check_peft(freeze: FreezeKeys, peft: PeftKeys, tower: str, where: str) -> None:
    wanted = {"freeze.language": freeze.language == "lora_only", "freeze.vision_tower": tower == "vision_lora"}
    asking = [name for name, is_wanted in wanted.items() if is_wanted]
    if peft.enable is False and asking:
        value = getattr(freeze, asking[0].split(".")[1])
        raise ConfigError(
            f"{where}: 'peft.enable' is false and '{asking[0]}' is {value}; set peft.enable to true, or {asking[0]} to "
            "true (frozen) or false (trained whole)"
        )
    if peft.enable is False and peft.qlora:
        raise ConfigError(f"{where}: 'peft.qlora' is true and 'peft.enable' is false; set both alike")
    if peft.enable and not asking:
        raise ConfigError(
            f"{where}: 'peft.enable' is true and 'freeze' asks for no LoRA; set freeze.language to lora_only or "
            "freeze.vision_tower to lora_top_N, or peft.enable to false"
        )
    if freeze.language is False and peft.qlora:
        raise ConfigError(
            f"{where}: 'peft.qlora' is true and 'freeze.language' is false: a model in 4 bits cannot train whole; set "
            "freeze.language to lora_only, or peft.qlora to false"
        )
    if freeze.language is False and tower == "vision_lora":
        raise ConfigError(
            f"{where}: 'freeze.language' is false and 'freeze.vision_tower' is {freeze.vision_tower}: an adapter "
            "folder would have to hold the whole language model; use freeze.language: lora_only, or "
            "freeze.vision_tower: top_N"
        )


def _target_modules(value: list[str] | str, where: str) -> str:
    """A regular expression over full module names, of the language model's layers where names are listed."""
    if isinstance(value, str) and value not in LANGUAGE_LAYERS:
        return LoraConfig().target_modules if value == "all-linear" else value
    names = [value] if isinstance(value, str) else value
    for name in names or [""]:
        if name not in LANGUAGE_LAYERS:
            near = difflib.get_close_matches(name, LANGUAGE_LAYERS, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(LANGUAGE_LAYERS)}"
            raise ConfigError(
                f"{where}: 'peft.target_modules' lists {shorten(name)}; {advice} Or give one regular expression over "
                "full module names in place of the list"
            )
    if set(names) == set(LANGUAGE_LAYERS):
        return LoraConfig().target_modules
    return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(names)})"


def _rates(optim: OptimKeys, groups: Sequence[str]) -> dict[str, float]:
    """Rates of their own for projector and tower, where they train."""
    own = {"projector": optim.lr_proj}
    own |= dict.fromkeys(("vision_lora", "vision_top", "vision_full"), optim.lr_vision)
    return {group: rate for group, rate in own.items() if group in groups and rate is not None}


def _fields(kind: type) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]


def _listed(value: list[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def _check_twice(said: Mapping[str, str], beside: Mapping[str, Any], where: str) -> None:
    for path, key in said.items():
        node: Any = beside
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) and part in node else _NOTHING
        if node is not _NOTHING:
            raise ConfigError(f"{where}: '{key}' and '{path}' say the same thing; keep one")


_NOTHING = object()
