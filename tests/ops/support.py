"""What several of the tests need beside ``pssl_ext.testing``."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pssl_ext.op import NAMESPACE
from pssl_ext.testing import Case


def schema_args(case: Case, *, requires_grad: bool = False) -> tuple:
    """What the public function hands to the dispatcher: the schema's arguments in order, as opcheck takes
    them."""
    found: list[tuple] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if func is case.spec.op:
                found.append(args)
            return func(*args, **(kwargs or {}))

    with Recorder(), torch.no_grad():
        case.spec.function(**case.sample.args, backend="auto")
    # defaults that equal the schema's are dropped by the dispatcher; ours have none
    assert len(found) == 1 and len(found[0]) == len(case.spec.argument_names)
    args = tree_map_only(Tensor, lambda t: t.detach(), found[0])
    if requires_grad:
        for name, value in zip(case.spec.argument_names, args, strict=True):
            if name in case.spec.differentiable:
                tree_map_only(Tensor, lambda t: t.requires_grad_() if t.is_floating_point() else t, value)
    return args


def prototype_args(
    op: str,
    features: Tensor,  # [B,D,h,w]
    regions: Tensor,  # [B,H,W]
    classes: int,
    generator: torch.Generator,
    device: str | torch.device,
    *,
    weighted: bool = True,
) -> dict[str, Any]:
    """Arguments of prototype_pool or prototype_contrast over the same features and regions."""
    args: dict[str, Any] = dict(features=features, regions=regions)
    if weighted:
        args["weights"] = torch.rand(regions.shape, generator=generator)
    if op == "prototype_contrast":
        args["prototypes"] = torch.randn(classes, features.shape[1], generator=generator)
    args = {name: tensor.to(device) for name, tensor in args.items()}
    if op == "prototype_pool":
        args["num_regions"] = classes
    return args


@contextlib.contextmanager
def planted(name: str, kernel: Callable, key: str = "CPU") -> Iterator[None]:
    """Registers ``kernel`` for the operator ``name``, as a compiled one is, for as long as the context
    lasts."""
    with torch.library._scoped_library(NAMESPACE, "IMPL") as library:
        library.impl(name, kernel, key, allow_override=True)
        yield
