"""Between a typed configuration and the plain values of YAML and JSON.

A key that no field has is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pssl.core.errors import InputError

T = TypeVar("T")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-3, which YAML 1.1 reads as a text


class ConfigError(InputError):
    """A configuration that cannot be understood; the text says which file and key."""


def known_keys(config: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration, sections included."""
    keys = []
    for item in dataclasses.fields(config):
        keys.append(prefix + item.name)
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            keys += known_keys(value, prefix + item.name + ".")
    return keys


def overlay(config: T, *sources: tuple[str, dict]) -> T:
    """A copy of `config` with each source's values in place of its own."""
    for name, values in sources:
        config = _overlay(config, values, name, "", known_keys(config))
    return config


def _overlay(config: Any, values: dict, source: str, prefix: str, known: list[str]) -> Any:
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            by_leaf = {item.rpartition(".")[2]: item for item in reversed(known)}
            near = difflib.get_close_matches(dotted, known, 1, 0.6)
            near = near or [by_leaf[leaf] for leaf in difflib.get_close_matches(str(key), by_leaf, 1, 0.5)]
            hint = f"; the nearest known key is {near[0]!r}" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {dotted!r}{hint}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {dotted} expected a mapping, got {value!r}")
            changes[key] = _overlay(current, value, source, dotted + ".", known)
        else:
            changes[key] = _convert(value, hints[key], source, dotted)
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise ConfigError(f"{source}: {prefix}{error}") from None


def _convert(value: Any, hint: Any, source: str, key: str) -> Any:
    """`value` as YAML gave it, as the field's type; an error names file and key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [item for item in arguments if item is not type(None)]
        return _convert(value, hint, source, key)
    if origin is typing.Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, arguments[0], source, key) for item in value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint))
    if origin is typing.Literal:
        expected = f"one of {arguments}"
    elif origin is tuple:
        expected = f"a list of {arguments[0].__name__}"
    raise ConfigError(f"{source}: {key} expected {expected}, got {value!r}")


def to_dict(config: Any) -> dict:
    """The configuration as plain YAML and JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(kind: type[T], values: dict, source: str) -> T:
    """The inverse of :func:`to_dict`; `source` names the origin in messages."""
    return overlay(kind(), (source, values))


def to_yaml(config: Any) -> str:
    """The configuration as YAML, in the order of the fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=110)
