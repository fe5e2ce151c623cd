"""A tree of plain YAML values into dataclasses; every key and type is checked, errors name the key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from finetune.config.sections import SourceConfig
from finetune.errors import ConfigError, shorten

T = TypeVar("T")


def build(schema: type[T], tree: Mapping[str, Any], where: str = "config") -> T:
    """Fill a dataclass from a mapping, checking every key and type.

    Raises:
        ConfigError: see `load_config`.
    """
    return _convert(schema, dict(tree), where, "")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts and lists, for YAML, JSON and model configs."""
    return dataclasses.asdict(config)


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """`update` over `base`: mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    """`value` as `kind`, a type annotation made of dataclasses, list, dict, Literal, unions and scalars."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(kind, value, where, key)
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(kind), value, where, key)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(f"{where}: '{key}' is {shorten(value)}; choose one of {', '.join(map(str, choices))}")
        return value
    if origin is list:
        if isinstance(value, str) and typing.get_args(kind)[0] is SourceConfig:
            value = [value]  # data.train=train.jsonl
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: '{key}' is {shorten(value)}; expected a list")
        return [_convert(typing.get_args(kind)[0], item, where, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), value, where, key)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: '{key}' is {shorten(value)}; expected a mapping")
        item_kind = typing.get_args(kind)[1]
        return {str(k): _convert(item_kind, v, where, f"{key}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    return _convert_scalar(kind, value, where, key)


def _convert_dataclass(kind: type, value: Any, where: str, key: str) -> Any:
    if kind is SourceConfig and isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: '{key}' is {shorten(value)}; expected a section with keys {_field_names(kind)}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, item in value.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known keys: {_field_names(kind)}"
            raise ConfigError(f"{where}: unknown key '{dotted}' (value {shorten(item)}); {advice}")
        arguments[name] = _convert(hints[name], item, where, dotted)
    return kind(**arguments)


def _convert_tuple(kinds: tuple[Any, ...], value: Any, where: str, key: str) -> tuple[Any, ...]:
    """`tuple[int, int]` from a list of two, `tuple[X, ...]` from a list of any length."""
    is_open = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, (list, tuple)) or not (is_open or len(value) == len(kinds)):
        raise ConfigError(
            f"{where}: '{key}' is {shorten(value)}; expected a list{'' if is_open else f' of {len(kinds)}'}"
        )
    item_kinds = [kinds[0]] * len(value) if is_open else list(kinds)
    return tuple(
        _convert(kind, item, where, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(item_kinds, value, strict=True))
    )


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in sorted((k for k in kinds if k is not type(None)), key=lambda k: k is str):  # str last: it is greedy
        try:
            return _convert(kind, value, where, key)
        except ConfigError as error:
            errors.append(error)
    names = [_simple_name(kind) for kind in kinds if kind is not type(None)]
    if len(names) > 1 and all(names):
        found = f"{shorten(value)} ({type(value).__name__})"
        raise ConfigError(f"{where}: '{key}' is {found}; expected {' or '.join(map(str, names))}")
    raise errors[0]


def _simple_name(kind: Any) -> str | None:
    """A scalar type or a choice of words as an error names it."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(str(choice).lower() if choice is False else str(choice) for choice in typing.get_args(kind))
    return {int: "int", float: "float", bool: "bool", str: "a text"}.get(kind)


def _convert_scalar(kind: Any, value: Any, where: str, key: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 (no dot) as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: '{key}' is {shorten(value)} ({type(value).__name__}); expected {kind.__name__}")


def _field_names(kind: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))
