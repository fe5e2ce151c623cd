"""YAML files and `key.sub=value` overrides into a configuration, and a configuration back into plain values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.config.conversion import build
from finetune.config.sections import RunConfig
from finetune.errors import ConfigError, shorten

T = TypeVar("T")


def load_config(path: str | Path | None, overrides: Sequence[str] = (), schema: type[T] = RunConfig) -> T:  # type: ignore[assignment]
    """Read a YAML file and apply `key.sub=value` overrides (values in YAML syntax).

    A top-level `extends: other.yaml` (relative to the file) is read first; mappings merge, everything else replaces.
    Without a file (None) the overrides change the defaults.

    Raises:
        ConfigError: file missing or not YAML, unknown key (with the nearest known one), value of another type.
    """
    tree = {} if path is None else _read_tree(Path(path), seen=())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key.sub=value, e.g. train.max_steps=10")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML ({_one_line(error)})") from error
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: '{parent}' is {shorten(child)}, not a section")
            node = child
        node[leaf] = parsed
    return build(schema, tree, where="defaults" if path is None else str(path))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts and lists, for YAML, JSON and model configs."""
    return dataclasses.asdict(config)


def config_hash(config: Any) -> str:
    """Twelve hex digits that change when any value of the configuration changes."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: 'extends' forms a circle: {' -> '.join(str(p) for p in seen)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist; see configs/train/ for ready ones") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {_one_line(error)}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {shorten(tree)}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _merge(_read_tree(path.parent / str(parent), (*seen, path.resolve())), tree)


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
