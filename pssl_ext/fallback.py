"""An operator's reference as the kernel of every device that has no other, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pssl_ext.torch_private import run_with_autograd


def forward(reference: Callable, check: Callable[[tuple], None]) -> Callable:
    """Return the reference as a kernel that runs ``check`` on its arguments first."""
    run = without_autocast(reference)

    def kernel(*args: Any) -> Any:
        check(args)
        return run(*args)

    return kernel


def backward(reference: Callable, outputs: int, differentiable: list[int]) -> Callable:
    """Return the gradient of the reference by autograd, as a kernel of the schema of ``<op>_backward``."""

    def kernel(*all_args: Any) -> tuple:
        grads, args, needs = split(all_args, outputs)
        fixed = [tree_map_only(Tensor, Tensor.detach, a) for a in args]
        wanted = [i for i, needed in zip(differentiable, needs, strict=True) if needed]
        leaves, structure = tree_flatten([fixed[i] for i in wanted])
        found: dict[int, Any] = {}
        if leaves:
            made = run_with_autograd(lambda: _gradients(reference, fixed, leaves, grads))
            found = dict(zip(wanted, tree_unflatten(made, structure), strict=True))
        return tuple(_like(args[i], found.get(i)) for i in differentiable)

    # the whole of it: backward() may be called under autocast too, and matrix products are in the gradient as well
    return without_autocast(kernel)


def fake_backward(outputs: int, differentiable: list[int]) -> Callable:
    """Return the fake kernel of ``<op>_backward``."""

    def kernel(*all_args: Any) -> tuple:
        _, args, needs = split(all_args, outputs)
        return tuple(_fake_like(args[i], n) for i, n in zip(differentiable, needs, strict=True))

    return kernel


def split(all_args: tuple, outputs: int) -> tuple[tuple, tuple, Any]:
    """Return (gradients of the outputs, forward arguments, which gradients are wanted) of a backward call."""
    return all_args[:outputs], all_args[outputs:-1], all_args[-1]


def _gradients(reference: Callable, args: list[Any], leaves: list[Tensor], grads: tuple) -> list[Tensor]:
    """Return the gradients of ``leaves``, which are among the arguments, for the outputs' gradients ``grads``."""
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = reference(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    sources, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(sources, leaves, seeds, allow_unused=True, materialize_grads=True))


def _like(argument: Any, gradient: Any) -> Any:
    """Return ``gradient`` in the layout of ``argument``; an empty tensor (a list of none) where none was asked for."""
    if isinstance(argument, (list, tuple)):
        return [] if gradient is None else [_like(a, g) for a, g in zip(argument, gradient, strict=True)]
    if gradient is None:
        return argument.new_empty(0) if argument is not None else torch.empty(0)
    return torch.empty_like(argument).copy_(gradient)


def _fake_like(argument: Any, needed: bool) -> Any:
    if isinstance(argument, (list, tuple)):
        return [torch.empty_like(a) for a in argument] if needed else []
    if argument is None:
        return torch.empty(0)
    return torch.empty_like(argument) if needed else argument.new_empty(0)


def without_autocast(function: Callable) -> Callable:
    """Take inputs as they are: under autocast a reference's matrix products would drop to half precision."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        device_type = device_of(args).type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(*args)
        return function(*args)

    return wrapped


def device_of(args: tuple) -> torch.device:
    """Return the device of the first tensor among ``args`` and their lists; the CPU where there is none."""
    for a in args:
        if isinstance(a, Tensor):
            return a.device
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device
    return torch.device("cpu")
