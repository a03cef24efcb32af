"""Backbones: from images to activations on a coarse grid.

A backbone is one file of this package: a :class:`Backbone`, and a function that :func:`register` gives a name. Files
are found by themselves.
"""

from __future__ import annotations

import importlib
import pkgutil

from pssl.models.backbones.base import Backbone, Pyramid
from pssl.models.backbones.registry import (
    BackboneEntry,
    WeightsPackage,
    backbone_names,
    build_backbone,
    find_backbone,
    register,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Backbone",
    "BackboneEntry",
    "Pyramid",
    "WeightsPackage",
    "backbone_names",
    "build_backbone",
    "find_backbone",
    "register",
]
