"""Module forms of the operators, made from their functions: tensors in ``forward``, settings in the constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pssl_ext.ops.cam_compare import cam_compare
from pssl_ext.ops.cam_regions import cam_regions
from pssl_ext.ops.dense_crf import dense_crf
from pssl_ext.ops.pixel_refine import pixel_refine
from pssl_ext.ops.prototype_contrast import prototype_contrast
from pssl_ext.ops.prototype_pool import prototype_pool
from pssl_ext.ops.random_walk import random_walk

__all__ = [
    "CamCompare",
    "CamRegions",
    "DenseCrf",
    "PixelRefine",
    "PrototypeContrast",
    "PrototypePool",
    "RandomWalk",
]

_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Operator(nn.Module):
    """Keeps the settings that an operator is called with, and prints them."""

    _names: tuple[str, ...] = ()

    def __init__(self, settings: dict[str, object]) -> None:
        super().__init__()
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            elif isinstance(value, Sequence) and not isinstance(value, str):
                setattr(self, name, tuple(value))  # a list would be the caller's, to change later
            else:
                setattr(self, name, value)

    def settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in self.settings().items()}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _in_forward(parameter: inspect.Parameter) -> bool:
    """Tell whether an argument changes from call to call: tensors, but for numbers that may be tensors, and sizes."""
    return parameter.name == "size" or (
        "Tensor" in parameter.annotation and "float" not in parameter.annotation
    )


def _module(function: Callable) -> Any:
    """Make the module form of ``function``: a class of its name in capitals, with its arguments and defaults."""
    name = "".join(map(str.capitalize, function.__name__.split("_")))
    signature = inspect.signature(function)
    given = [p for p in signature.parameters.values() if _in_forward(p)]
    kept = [p for p in signature.parameters.values() if not _in_forward(p)]
    constructor = inspect.Signature([_SELF, *kept], return_annotation="None")

    def __init__(self: _Operator, *args: Any, **settings: Any) -> None:
        try:
            bound = constructor.bind(self, *args, **settings)
        except TypeError as error:
            raise TypeError(f"{name}: {error}; its settings are {', '.join(self._names)}") from None
        bound.apply_defaults()
        _Operator.__init__(self, {n: v for n, v in bound.arguments.items() if n != "self"})

    def forward(self: _Operator, *args: Any, **tensors: Any) -> Any:
        return function(*args, **tensors, **self.settings())

    __init__.__signature__ = constructor
    __init__.__doc__ = "Keep the settings. A tensor is a buffer, an ``nn.Parameter`` is learned."
    forward.__signature__ = signature.replace(parameters=[_SELF, *given])
    forward.__doc__ = f"Call ``{function.__name__}`` on these arguments with the module's settings."
    doc = f"Module form of ``{function.__name__}``: settings in the constructor, tensors in ``forward``."
    members = dict(
        __init__=__init__,
        forward=forward,
        __doc__=f"{doc}\n\n{inspect.getdoc(function)}",
        _names=tuple(p.name for p in kept),
    )
    for method in (__init__, forward):
        method.__qualname__ = f"{name}.{method.__name__}"
    return type(name, (_Operator,), members)


CamCompare = _module(cam_compare)
CamRegions = _module(cam_regions)
DenseCrf = _module(dense_crf)
PixelRefine = _module(pixel_refine)
PrototypeContrast = _module(prototype_contrast)
PrototypePool = _module(prototype_pool)
RandomWalk = _module(random_walk)
