"""Types of values that a flag can hold, and the check that they are sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from pssl.core.errors import InputError


def _list_of(kind: type, metavar: str) -> PrimitiveConstructorSpec:
    """A flag that takes values separated by commas or blanks: ``--seeds 0,1,2``."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(kind(part) for w in words for part in w.split(",") if part),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(item) for item in value],
    )


Floats = Annotated[tuple[float, ...], _list_of(float, "X,Y,..")]
Integers = Annotated[tuple[int, ...], _list_of(int, "I,J,..")]
Names = Annotated[tuple[str, ...], _list_of(str, "A,B,..")]

PART = tyro.conf.arg(name="")
"""Marks a field that is a part of its configuration: ``folder: Annotated[FolderConfig, PART]``. The part's settings are
named like the configuration's own, on the command line (``--data.root``) and in files (``data: {root: ...}``)."""


def require(name: str, value: object, good: bool, expected: str) -> None:
    """Raise InputError unless `good`."""
    if not good:
        raise InputError(f"{name}: expected {expected}, got {value}")


def require_scales(scales: Sequence[float]) -> None:
    """Raise InputError unless these are scales."""
    require("scales", scales, len(scales) > 0 and min(scales) > 0, "one or more numbers above 0")
