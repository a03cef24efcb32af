"""Which kernels there are for the GPU; and a call of an operator, forward and backward, whose tensors stay where they
are: for streams and for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from pssl_ext import dispatch
from pssl_ext.op import OPS
from pssl_ext.testing import leaves


def kernels() -> list[tuple[str, str]]:
    """Each operator with each backend of compiled kernels; native ones there have to be."""
    return [
        (op, backend)
        for op in OPS
        for backend in ("native", "triton")
        if backend == "native" or dispatch.why_not(OPS[op], backend, "cuda") is None
    ]


class Call:
    """The arguments as copies of its own, and the gradients of the outputs, all made before anything runs."""

    def __init__(self, op: str, args: dict[str, Any], backend: str = "native") -> None:
        self.spec, self.backend = OPS[op], backend
        self.args = tree_map_only(Tensor, lambda t: t.detach().clone(), args)
        self.wanted = list(leaves(self.spec, self.args).values())
        for tensor in self.wanted:
            tensor.requires_grad_()
        self.seeds = [torch.randn_like(o) for o in self._forward() if o.requires_grad]

    def given(self) -> list[Tensor]:
        """Every tensor that the call reads."""
        return [x for x in tree_leaves(self.args) if isinstance(x, Tensor)] + self.seeds

    def run(self, before_backward: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Outputs and gradients."""
        outputs = self._forward()
        sources = [o for o in outputs if o.requires_grad]
        before_backward()
        grads = torch.autograd.grad(sources, self.wanted, self.seeds, allow_unused=True) if sources else ()
        return [o.detach() for o in outputs] + [g for g in grads if g is not None]

    def _forward(self) -> list[Tensor]:
        return tree_flatten(self.spec.function(**self.args, backend=self.backend))[0]


def put(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Writes over the tensors where they are."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def assert_equal(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        same = (a == b) | ((a != a) & (b != b))
        assert bool(same.all()), f"{what}: result {i}: {int((~same).sum())} of {same.numel()} values differ"
