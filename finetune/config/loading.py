"""YAML files and `key.sub=value` overrides into a configuration, and a configuration back into plain values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.config.conversion import build, merge, to_dict
from finetune.config.region_yaml import RegionYaml, check_overrides, is_region_key, is_region_yaml, translate
from finetune.config.sections import RunConfig
from finetune.config.stages import stage_runs
from finetune.errors import ConfigError, shorten

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETIRED = {"generation": "thresholds and decoding are options of forensics predict, evaluate and chat"}
"""Sections of a run that earlier versions read, wrote into config.yaml and did nothing with; and what to use."""


def load_config(path: str | Path | None, overrides: Sequence[str] = (), schema: type[T] = RunConfig) -> T:  # type: ignore[assignment]
    """Read a YAML file and apply `key.sub=value` overrides (see `apply_override`).

    A top-level `extends: other.yaml` (relative to the file) is read first; mappings merge, everything else replaces.
    Without a file (None) the overrides change the defaults. In a run with `stages` an override also wins over what a
    stage says about the same key; `stages.NAME.key.sub=value` is for one stage alone. The region pipeline's own
    spelling (`finetune.config.region_yaml`) is recognised, and takes overrides in either spelling. A section that
    earlier versions had and did not use is passed over with a warning.

    Raises:
        ConfigError: file missing or not YAML, unknown key (with the nearest known one), value of another type.
    """
    tree = {} if path is None else read_tree(Path(path))
    if schema is RunConfig:
        for name in _RETIRED.keys() & tree.keys():
            logger.warning("%s: '%s' has no effect on training and is passed over; %s", path, name, _RETIRED[name])
            del tree[name]
    if schema is RunConfig and is_region_yaml(tree):
        tree, overrides = _of_regions(tree, overrides, str(path))
    for override in overrides:
        apply_override(tree, override, schema)
    where = "defaults" if path is None else str(path)
    config = build(schema, tree, where=where)
    if isinstance(config, RunConfig):
        stage_runs(config, where)
    return config


def _of_regions(tree: dict[str, Any], overrides: Sequence[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """The tree of the region pipeline's YAML as one of `RunConfig`, and the overrides that are still to be applied."""
    keys = [override.partition("=")[0] for override in overrides]
    check_overrides(keys)
    others = []
    for key, override in zip(keys, overrides, strict=True):
        if is_region_key(key):
            apply_override(tree, override, RegionYaml)
        else:
            others.append(override)
    return translate(tree, where), others


def config_hash(config: Any) -> str:
    """Twelve hex digits that change when any value of the configuration changes."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def apply_override(tree: dict[str, Any], override: str, schema: Any = None) -> None:
    """Set one `key.sub=value` in a tree, and in those of its stages that say something about the key.

    Args:
        schema: dataclass of the tree. The value of a key that is a text there is that text, whatever YAML would make of
            its braces, colons and digits: `user_prompt={evidence}`; quotes around all of it are YAML's, and `null` is
            none where that is allowed. Every other value is read as YAML.

    Raises:
        ConfigError: not of this form, a value that is not YAML, a path through something that is no section.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value, e.g. train.max_steps=10")
    parts = key.split(".")
    is_of_stage = parts[0] == "stages" and len(parts) > 2
    parsed = _value(value, _kind(schema, parts[2:] if is_of_stage else parts), override)
    stages = tree.get("stages")
    named = {}
    if isinstance(stages, list):
        named = {str(stage.get("name")): stage for stage in stages if isinstance(stage, dict)}
    if is_of_stage:
        if parts[1] not in named:
            raise ConfigError(f"override {override!r}: there is no stage '{parts[1]}'; stages: {', '.join(named)}")
        _set(named[parts[1]], parts[2:], parsed, override)
        return
    _set(tree, parts, parsed, override)
    for stage in named.values():
        if _says(stage, parts):
            _set(stage, parts, parsed, override)


def _kind(schema: Any, parts: Sequence[str]) -> Any:
    """The type that a path of keys has in a dataclass, None where it has none."""
    kind = schema
    for part in parts:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        elif typing.get_origin(kind) in (dict, Mapping):
            kind = typing.get_args(kind)[1]
        else:
            return None
    return kind


def _value(text: str, kind: Any, override: str) -> Any:
    """What the text after `=` means for a key of this type."""
    kinds = set(typing.get_args(kind)) if typing.get_origin(kind) in (typing.Union, types.UnionType) else {kind}
    problem, parsed = None, None
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = error
    if str in kinds and kinds <= {str, type(None), list[str]}:
        is_quoted = isinstance(parsed, str) and text.strip()[:1] in ("'", '"')
        is_none = type(None) in kinds and problem is None and parsed is None
        is_list = list[str] in kinds and isinstance(parsed, list)
        return parsed if is_quoted or is_none or is_list else text
    if problem is not None:
        raise ConfigError(f"override {override!r}: the value is not YAML ({_one_line(problem)})") from problem
    return parsed


def _set(tree: dict[str, Any], parts: Sequence[str], value: Any, override: str) -> None:
    node = tree
    *parents, leaf = parts
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: '{parent}' is {shorten(child)}, not a section")
        node = child
    node[leaf] = value


def _says(tree: Any, parts: Sequence[str]) -> bool:
    """Whether a tree has a value at a path of keys."""
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _repeated_key(node: yaml.Node | None, checked: set[int]) -> yaml.ScalarNode | None:
    """The first key that a mapping of a composed document holds twice; PyYAML would take the last one in silence."""
    if node is None or id(node) in checked:
        return None
    checked.add(id(node))
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    return key
                seen.add(key.value)
            children.append(value)
    return next((found for child in children if (found := _repeated_key(child, checked)) is not None), None)


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a YAML file, what it extends merged in; `seen` are the files that led here.

    Raises:
        ConfigError: file missing, not YAML or no mapping, or a circle of `extends`.
    """
    if path.resolve() in seen:
        raise ConfigError(f"{path}: 'extends' forms a circle: {' -> '.join(str(p) for p in seen)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist; see configs/ for ready ones") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 ({_one_line(error)}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {_one_line(error)}") from error
    try:
        twice = _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader), set())
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if twice is not None:
        raise ConfigError(
            f"{path}: the key '{twice.value}' stands there twice; keep one (line {twice.start_mark.line + 1})"
        )
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {shorten(tree)}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return merge(read_tree(path.parent / str(parent), (*seen, path.resolve())), tree)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
