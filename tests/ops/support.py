"""What several of the tests need beside ``pssl_ext.testing``."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import pssl_ext
from pssl_ext.op import NAMESPACE, OPS
from pssl_ext.testing import Case, assert_same_bits, check_args, run


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


# -- for the files in cases/ -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A kernel with a planted fault: registered as a compiled one is, it must fail ``pssl_ext.testing.check``.

    ``kernel`` takes the schema's arguments of the operator, or of its backward where ``entry`` is "_backward".
    ``words`` stand in the message of each of ``samples``; on ``unseen`` the kernel is right.
    """

    kernel: Callable
    samples: tuple[str, ...]
    words: str
    entry: str = ""
    unseen: tuple[str, ...] = ()


def reference_gradients(op: str, *args: Any) -> tuple:
    """The gradients that the reference gives for the arguments of the backward, whatever kernel is registered."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return OPS[op].op_backward._op_dk(key, *args)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])

#: cells of the features and pixels of the labels: equal, multiples, odd, labels coarser, and one of either
ORACLE_GRIDS = [
    ((3, 4), (3, 4)),
    ((2, 3), (8, 12)),
    ((3, 2), (7, 5)),
    ((5, 4), (2, 3)),
    ((1, 1), (3, 2)),
    ((2, 5), (1, 1)),
]


def prototype_inputs(
    grid: tuple[int, int], size: tuple[int, int], b: int = 2, d: int = 4, c: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """(features [B,D,h,w], regions [B,H,W] with a fifth ignored, weights [B,H,W]), float64"""
    g = torch.Generator().manual_seed(29)
    features = torch.randn(b, d, *grid, generator=g, dtype=torch.float64)
    regions = torch.randint(0, c, (b, *size), generator=g)
    regions[torch.rand(b, *size, generator=g) < 0.2] = 255
    return features, regions, torch.rand(b, *size, generator=g, dtype=torch.float64)


#: image labels of two images and three classes
TWO_IMAGES = torch.tensor([[1, 0, 1], [0, 1, 1]])


def normal_maps(*shapes: tuple[int, ...], seed: int = 41) -> list[Tensor]:
    """float64"""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def uniform(*shape: int, seed: int = 61) -> Tensor:
    """float64 in 0..1"""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(got: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    """Relative to the largest magnitude."""
    error = float((got - torch.as_tensor(expected)).abs().max())
    assert error <= tolerance * float(abs(expected).max()), error


def check_shared_by_threads(op: str, args: dict[str, Any]) -> None:
    """The result is accurate, and the same bits whatever the number of threads."""
    args = {n: v.float() if isinstance(v, Tensor) else v for n, v in args.items()}
    spec, threads, found = OPS[op], torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(spec, args, "auto"))
    finally:
        torch.set_num_threads(threads)
    check_args(spec, args, "auto", op)
    if pssl_ext.explain(op) == f"{op} on cpu: native":
        assert_same_bits(found[0], found[1], f"{op}, 1 and 2 threads")
        assert_same_bits(found[0], found[2], f"{op}, 1 and 3 threads")
