"""A computation with several providers, and whether these agree."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import pssl_ext
from pssl_ext import dispatch
from pssl_ext.op import OPS

Provider = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """``id``: what goals and baselines call it, of this script's choosing and stable. ``providers``: name to a function
    of ``inputs`` that returns one scalar loss, whose gradient is taken to the ``inputs`` named in ``wanted``; where
    there are none, any tensor, and there is no backward pass. ``ours``: the provider that the ratios refer to.
    ``bytes_moved``: compulsory bytes of (forward, backward). ``left_out``: providers that are not here, and why.
    ``in_numpy``: the providers whose memory is numpy's; ``own_memory``: those, besides ours, that take theirs from
    malloc. ``tolerance`` and ``exceptions``: see ``disagreement``. ``estimates``: of providers too slow to be run, the
    seconds of a call from a part that was timed, and how. ``size``: what a sweep varies.
    """

    id: str
    title: str
    inputs: dict[str, Tensor]
    wanted: tuple[str, ...]
    providers: dict[str, Provider]
    ours: str
    bytes_moved: tuple[int, int]
    left_out: dict[str, str] = field(default_factory=dict)
    in_numpy: tuple[str, ...] = ()
    own_memory: tuple[str, ...] = ()
    tolerance: float = 1e-4
    exceptions: float = 0.0
    estimates: dict[str, Callable[[dict[str, Tensor]], tuple[float, str]]] = field(default_factory=dict)
    size: int | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    def call(
        self, provider: str, inputs: dict[str, Tensor], forward_done: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """[loss, gradients …] of one call; ``forward_done`` is called between the two passes.

        The forward pass is a training step's: it keeps what the backward pass needs.
        """
        inputs = {n: t.detach() for n, t in inputs.items()}
        leaves = [inputs[n].requires_grad_() for n in self.wanted]
        loss = self.providers[provider](**inputs)
        forward_done()
        grads = torch.autograd.grad(loss, leaves) if leaves else ()
        return [loss.detach(), *grads]


def disagreement(
    problem: Problem, found: list[Tensor], expected: list[Tensor], who: str, whom: str
) -> str | None:
    """How ``found`` differs from ``expected``; None when it does not.

    The tolerance is relative to the largest value: loose enough for float32 sums in any order, far below any mistake;
    ``exceptions`` is the share of values that may be further off (labels, where a last bit decides on a pixel).
    How near each is to the truth in float64 is the tests' business.
    """
    names = ["result", *(f"gradient of {n}" for n in problem.wanted)]
    for name, got, other in zip(names, found, expected, strict=True):
        if got.shape != other.shape:
            shapes = f"{list(got.shape)}, not {list(other.shape)}"
            return f"{problem.title}: {who} disagrees with {whom}: {name} is {shapes}"
        got, other = got.double().cpu(), other.double().cpu()
        largest = float(other.abs().max()) if other.numel() else 0.0
        error = (got - other).abs()
        far = ~(error <= problem.tolerance * largest)  # a NaN is far
        if far.numel() and float(far.double().mean()) > problem.exceptions:
            return (
                f"{problem.title}: {who} disagrees with {whom}: {name} is up to {float(error.max()):.3g} away in "
                f"{int(far.sum())} of {far.numel()} values, largest value {largest:.3g}"
            )
    return None


class Lineup:
    """Gathers a problem's providers in the order of the table, and the reasons of those left out."""

    def __init__(self, compiled: bool = True) -> None:
        self.providers: dict[str, Provider] = {}
        self.left_out: dict[str, str] = {}
        self.compiled = compiled

    def add(
        self, name: str, function: Provider, why_not: str | None = None, compiled: bool = False
    ) -> Lineup:
        """``compiled``: the function through torch.compile stands beside it."""
        if why_not is not None:
            self.left_out[name] = why_not
            return self
        self.providers[name] = function
        if compiled and self.compiled:
            self.providers[f"{name}+compile"] = torch.compile(function, dynamic=False, fullgraph=True)
        return self

    def own(self, op: str, device: str | torch.device, make: Callable[[str], Provider]) -> str:
        """Adds ``make(backend)`` for each backend of ``op`` that runs there, the chosen one last; returns its name."""
        chosen = chosen_backend(op, device)
        others = [b for b in dispatch.BACKENDS if b not in ("auto", "reference", chosen)]
        for backend in others:
            self.add(backend, make(backend), dispatch.why_not(OPS[op], backend, device))
        self.add(chosen, make(chosen))
        return chosen


def chosen_backend(op: str, device: str | torch.device) -> str:
    """The backend that ``auto`` takes."""
    return pssl_ext.explain(op, device).split(": ", 1)[1].split(" ")[0].rstrip(",")


def missing(module: str, package: str) -> str | None:
    """Why ``module`` cannot be imported; None when it is installed."""
    return None if importlib.util.find_spec(module) else f"not installed: pip install {package}"
