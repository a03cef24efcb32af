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

from pssl.config.values import PART
from pssl.core.errors import InputError

T = TypeVar("T")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-3, which YAML 1.1 reads as a text


class ConfigError(InputError):
    """A configuration that cannot be understood; the text says which file and key."""


def parts(kind: type) -> dict[str, type]:
    """Return the fields of a configuration that are parts of it (:data:`pssl.config.values.PART`), and their types."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        item.name: typing.get_args(hints[item.name])[0]
        for item in dataclasses.fields(kind)
        if any(mark is PART for mark in getattr(hints[item.name], "__metadata__", ()))
    }


def setting(config: Any, name: str) -> Any:
    """Return a setting of a configuration or of a part of it; None where there is none of that name."""
    if name in {item.name for item in dataclasses.fields(config)}:
        return getattr(config, name)
    found = (setting(getattr(config, part), name) for part in parts(type(config)))
    return next((value for value in found if value is not None), None)


def known_keys(config: Any, prefix: str = "") -> list[str]:
    """Return all dotted keys of a configuration, sections included."""
    keys = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in parts(type(config)):
            keys += known_keys(value, prefix)
            continue
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(value):
            keys += known_keys(value, prefix + item.name + ".")
    return keys


def overlay(config: T, *sources: tuple[str, dict]) -> T:
    """Return a copy of `config` with each source's values in place of its own; a source is its name and its values."""
    for name, values in sources:
        config = _overlay(config, values, name, "", known_keys(config))
    return config


def _overlay(config: Any, values: dict, source: str, prefix: str, known: list[str]) -> Any:
    hints = typing.get_type_hints(type(config))
    changes = {}
    for name in parts(type(config)):
        part = getattr(config, name)
        own = {key: value for key, value in values.items() if key in known_keys(part)}
        values = {key: value for key, value in values.items() if key not in own}
        changes[name] = _overlay(part, own, source, prefix, known)
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in hints or key in changes:
            raise ConfigError(f"{source}: unknown key {dotted!r}{_nearest(dotted, known)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {dotted} expected a mapping, got {value!r}")
            changes[key] = _overlay(current, value, source, dotted + ".", known)
        else:
            changes[key] = _convert(value, hints[key], source, dotted)
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {prefix}{error}") from None


def _nearest(dotted: str, known: list[str]) -> str:
    """Return a hint that names the known key most like an unknown one, or all of them where none is like it."""
    by_leaf = {item.rpartition(".")[2]: item for item in reversed(known)}
    near = difflib.get_close_matches(dotted, known, 1, 0.6)
    leaf = dotted.rpartition(".")[2]
    near = near or [by_leaf[found] for found in difflib.get_close_matches(leaf, by_leaf, 1, 0.5)]
    return f"; the nearest known key is {near[0]!r}" if near else f"; known: {', '.join(known)}"


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
    """Return the configuration as plain YAML and JSON values; the settings of parts stand among its own."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in parts(type(config)):
            found |= to_dict(value)
        else:
            found[item.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def changed(config: Any) -> dict:
    """Return, as :func:`to_dict` does, the settings alone that differ from the defaults of the configuration's type."""
    return _changed(to_dict(config), to_dict(type(config)()))


def _changed(values: dict, defaults: dict) -> dict:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _changed(value, defaults[key])
            if not value:
                continue
        elif value == defaults[key]:
            continue
        found[key] = value
    return found


def from_dict(kind: type[T], values: dict, source: str) -> T:
    """The inverse of :func:`to_dict`; `source` names the origin in messages."""
    return overlay(kind(), (source, values))


def to_yaml(config: Any) -> str:
    """The configuration as YAML, in the order of the fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=110)
