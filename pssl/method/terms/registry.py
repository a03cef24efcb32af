"""The table of terms, and the configuration that has a section for each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from pssl.config.values import Floats, require_scales
from pssl.method.terms.base import Term

TERMS: dict[str, type[Term]] = {}
"""All terms by name, in the order in which they were registered."""


@dataclass
class SupportConfig:
    """SupportNet, the source of pixel-level targets (paper, section 3)."""

    mode: Literal["ema", "frozen", "shared"] = "ema"
    """"ema": moving average of MainNet; "frozen": MainNet as it was when the arm started; "shared": MainNet's own
    weights, in eval mode and without gradient."""
    momentum: float = 0.996
    """support <- momentum * support + (1 - momentum) * main, after each step. 0.996: as BYOL (Grill et al. 2020)."""
    scales: Floats = (0.5, 1.0, 1.5, 2.0)
    """Scales of SupportNet's CAMs (paper)."""

    def __post_init__(self) -> None:
        require_scales(self.scales)


@dataclass
class MethodConfig:
    """SupportNet and the terms of the arms; every registered term has a section of its name."""

    support: SupportConfig = field(default_factory=SupportConfig)


def register(kind: type[Term]) -> type[Term]:
    """Add a term to the table, and its configuration to :class:`MethodConfig`; a decorator of the term's class."""
    if kind.name in TERMS:
        raise ValueError(f"term {kind.name!r} is registered twice")
    TERMS[kind.name] = kind
    _add_section(kind.name, kind.Config)
    return kind


def _add_section(name: str, section: type) -> None:
    """Make the dataclass anew, in place, with a further field: what refers to it sees the new one.

    Only what the decorator wrote is taken away first, since it leaves alone what is there.
    """
    known = dataclasses.fields(MethodConfig)
    for written in ("__init__", "__repr__", "__eq__", "__match_args__"):
        delattr(MethodConfig, written)
    for item in known:
        setattr(MethodConfig, item.name, field(default_factory=item.default_factory))
    MethodConfig.__annotations__[name] = section
    setattr(MethodConfig, name, field(default_factory=section))
    dataclass(MethodConfig)
