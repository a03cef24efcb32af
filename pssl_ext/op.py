"""One description per operator: schema, reference, fake kernel, gradients, samples, bytes moved.

``define_op`` is all an operator needs in Python. From its schema and its reference it derives

* the dispatcher entry ``torch.ops.pssl.<op>`` with the reference as the kernel every device falls back to,
* ``torch.ops.pssl.<op>_backward``, an operator of its own, whose fallback differentiates the reference,
* the fake kernels and the autograd formula that ``torch.compile`` and ``torch.library.opcheck`` ask for,
* the class of its bound arguments, a named tuple: they are spelled in the schema, and from there on are one object.

Native kernels (C++, CUDA) register themselves for the same two names when ``pssl_ext._C`` is imported. Triton kernels
have names of their own, ``<op>_triton`` and ``<op>_triton_backward``: both may be there for one device, and a choice
made forward holds backward. They are in ``pssl_ext/triton/<op>.py``, imported at the first call.
"""

from __future__ import annotations

import importlib
import os
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pssl_ext import autograd, dispatch, fallback
from pssl_ext.torch_private import CAN_RUN_BELOW_AUTOGRAD, is_traced

NAMESPACE = "pssl"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

#: every operator by name, in the order of definition
OPS: dict[str, OpSpec] = {}

#: by the dispatcher's name, for those with a gradient: ``run(args)``, see `autograd.register`
_RECORDED: dict[str, Callable] = {}


@dataclass(frozen=True)
class Sample:
    """One call of an operator: the public function's arguments by name, and the name of the case."""

    id: str
    args: dict[str, Any]

    def __repr__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Approximation:
    """How far an operator's kernels may be from its reference by construction: bounds of the absolute error.

    For kernels that compute something near to the reference, and not the same in another order. That they compute it
    to the last digits is then for a test of the operator's own. The bounds hold for the operator's samples; ``reason``
    says what is approximated.
    """

    largest: float
    mean: float
    reason: str


@dataclass(frozen=True)
class OpSpec:
    """What the dispatcher, the tests and the benchmarks know of one operator.

    ``arguments`` is the named tuple of the schema's arguments, called a below: ``spec.arguments(features=…, …)``.

    ``reference(*a)`` is the specification. ``fake(a)`` makes empty outputs. ``differentiable`` names the arguments that
    have a gradient (a tensor or a list of tensors); an operator without any gets no backward. ``check_values(a)`` looks
    at the data (label ranges) and so runs on CPU, and on other devices only with ``PSSL_DEBUG=1``.
    ``samples(device, dtype)`` yields calls, ``bytes_moved(**public arguments)`` the compulsory traffic of
    (forward, backward): every input read once, every output written once. ``reference_bound`` says what the reference
    is limited to, where it is, and ``approximation`` how far kernels are from it, where they are. ``triton(a)`` says
    why the Triton kernels cannot take the arguments (None: they can); None where there are no such kernels.
    ``saves(a)`` is true where forward should keep an intermediate for backward. Devices that support it implement
    ``<name>_saving``, which has one more output, and ``<name>_backward_saved``, which takes it behind the outputs'
    gradients.
    """

    name: str
    schema: str
    function: Callable
    reference: Callable
    fake: Callable[[Any], Any]
    samples: Callable[..., Iterator[Sample]]
    bytes_moved: Callable[..., tuple[int, int]]
    differentiable: tuple[str, ...]
    check_values: Callable[[Any], None] | None
    reference_bound: str
    approximation: Approximation | None
    triton: Callable[[Any], str | None] | None
    saves: Callable[[Any], bool] | None
    arguments: type
    #: the arguments' types as the schema spells them, ``Tensor?`` say
    kinds: tuple[str, ...]
    output_count: int

    @property
    def argument_names(self) -> tuple[str, ...]:
        return self.arguments._fields

    @property
    def differentiable_indices(self) -> list[int]:
        return [self.argument_names.index(name) for name in self.differentiable]

    def entry(self, backend: str = "auto") -> str:
        """The name under which the dispatcher knows the operator as ``backend`` runs it."""
        return self.name + ("_triton" if backend == "triton" else "")

    def op_of(self, backend: str = "auto") -> Any:
        return _operator(self.entry(backend))

    def op_backward_of(self, backend: str = "auto") -> Any:
        return _operator(self.entry(backend) + "_backward")

    @property
    def op(self) -> Any:
        return self.op_of()

    @property
    def op_backward(self) -> Any:
        return self.op_backward_of()


def define_op(
    *,
    schema: str,
    reference: Callable,
    fake: Callable[[Any], Any],
    samples: Callable,
    bytes_moved: Callable,
    differentiable: tuple[str, ...] = (),
    check_values: Callable[[Any], None] | None = None,
    reference_bound: str = "",
    approximation: Approximation | None = None,
    triton: Callable[[Any], str | None] | None = None,
    saves: Callable[[Any], bool] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorate the public function: register ``pssl::<function name>`` and return the function unchanged."""

    def register(function: Callable) -> Callable:
        name = function.__name__
        if name in OPS:
            raise ValueError(f"define_op: {name} is defined twice")
        kinds, names, outputs = _parse(schema)
        unknown = set(differentiable) - set(names)
        if unknown:
            raise ValueError(f"define_op: {name} has no argument {sorted(unknown)}; it has {names}")
        spec = OpSpec(
            name=name,
            schema=schema,
            function=function,
            reference=reference,
            fake=fake,
            samples=samples,
            bytes_moved=bytes_moved,
            differentiable=differentiable,
            check_values=check_values,
            reference_bound=reference_bound,
            approximation=approximation,
            triton=triton,
            saves=saves,
            arguments=namedtuple(name, names),
            kinds=kinds,
            output_count=outputs,
        )
        indices = spec.differentiable_indices
        _register(
            spec,
            name,
            fallback.forward(reference, lambda args: _check_values(spec, args)),
            fallback.backward(reference, outputs, indices),
        )
        if saves is not None:
            _register_saving(spec)
        if triton is not None:
            _register(spec, spec.entry("triton"), *_triton_kernels(spec))
        OPS[name] = spec
        return function

    return register


def call(name: str, backend: str, /, **arguments: Any) -> Any:
    """Run operator ``name`` on the schema's ``arguments`` by the backend that ``backend`` chooses."""
    spec = OPS[name]
    args = spec.arguments(**arguments)
    device = fallback.device_of(args)
    chosen = dispatch.choose(spec, backend, device, args)
    traced = is_traced()
    # C++ kernels look for themselves, GPU kernels cannot raise: PSSL_DEBUG=1 looks for them
    if spec.check_values is not None and not traced and (chosen != "dispatcher" or _debug()):
        _check_values(spec, args)
    if chosen == "reference":
        return fallback.without_autocast(spec.reference)(*args)
    # what others transform or trace is the dispatcher's to call, as is what has no gradient
    if traced or not spec.differentiable:
        return spec.op_of(chosen)(*args)
    entry = spec.entry(chosen)
    if chosen == "dispatcher" and spec.saves is not None and spec.saves(args):
        saving = entry + "_saving"
        if saving in _RECORDED and dispatch.has_kernel(saving, device.type):
            entry = saving
    return _RECORDED[entry](args)


def explain(op: str, device: str | torch.device = "cpu") -> str:
    """One line: the backend ``auto`` takes for ``op`` on ``device``, and why not each faster one.

    >>> print(pssl_ext.explain("prototype_pool", "cuda"))
    prototype_pool on cuda: reference (native: this build ... ; triton: ...)
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    return dispatch.explain(OPS[op], device)


def _check_values(spec: OpSpec, args: tuple) -> None:
    """Reading values waits for the device, so only CPU tensors are looked at unless PSSL_DEBUG=1 asks for it."""
    if spec.check_values is not None and (fallback.device_of(args).type == "cpu" or _debug()):
        spec.check_values(spec.arguments(*args))


def _debug() -> bool:
    return os.environ.get("PSSL_DEBUG") == "1"


# -- registration ------------------------------------------------------------------------------------------------------


def _operator(entry: str) -> Any:
    return getattr(torch.ops.pssl, entry).default


def _parse(schema: str) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Return (types of the arguments, their names, number of outputs) of "(Tensor x, int n) -> Tensor"."""
    arguments, results = (part.strip() for part in schema.split("->"))
    kinds, names = zip(*(argument.split() for argument in arguments[1:-1].split(",")), strict=True)
    return kinds, names, results.count(",") + 1


def _backward_schema(spec: OpSpec, more: str = "") -> str:
    """Gradients of the outputs (None: zero), ``more``, the forward's arguments, and for each gradient whether it is
    wanted."""
    grads = ", ".join(f"Tensor? grad_{i}" for i in range(spec.output_count))
    forward = spec.schema[1 : spec.schema.rindex("->")].strip()[:-1]
    results = ", ".join(
        "Tensor[]" if spec.kinds[i] == "Tensor[]" else "Tensor" for i in spec.differentiable_indices
    )
    return f"({grads}, {more}{forward}, bool[] needs) -> ({results})"


def _register(spec: OpSpec, entry: str, forward: Callable, backward: Callable) -> None:
    """Define the dispatcher's ``entry`` and, for a differentiable operator, ``<entry>_backward``.

    ``backward`` returns one gradient for each entry of ``spec.differentiable``.
    """

    def fake(*args: Any, **named: Any) -> Any:
        return spec.fake(spec.arguments(*args, **named))

    _define(entry, spec.schema, forward, fake)
    if spec.differentiable:
        indices = spec.differentiable_indices
        kernels = backward, fallback.fake_backward(spec.output_count, indices)
        if len(indices) == 1:
            kernels = tuple(_single(kernel) for kernel in kernels)
        _define(entry + "_backward", _backward_schema(spec), *kernels)
        ops = _operator(entry), _operator(entry + "_backward")
        _RECORDED[entry] = autograd.register(_library, *ops, spec.kinds, indices)


def _define(entry: str, schema: str, kernel: Callable, fake: Callable) -> None:
    _library.define(entry + schema)
    _library.impl(entry, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{entry}", fake, lib=_library)


def _single(kernel: Callable) -> Callable:
    """An operator returns a tensor where its kernel returns a tuple of one."""
    return lambda *args: kernel(*args)[0]


def _register_saving(spec: OpSpec) -> None:
    """Define the pair that ``spec.saves`` chooses, see there; kernels of devices that have one implement it."""
    forward, backward = spec.name + "_saving", spec.name + "_backward_saved"
    _library.define(forward + spec.schema[:-1] + ", Tensor)")
    _library.define(backward + _backward_schema(spec, "Tensor saved, "))
    if CAN_RUN_BELOW_AUTOGRAD:
        ops = spec.op, _operator(backward)
        _RECORDED[forward] = autograd.formula(
            *ops, spec.kinds, spec.differentiable_indices, _operator(forward)
        )


def _triton_kernels(spec: OpSpec) -> tuple[Callable, Callable]:
    """``forward(a)`` and ``backward(*grads, a, needs)`` of ``pssl_ext/triton/<name>.py``, imported at the first call:
    it imports Triton."""

    def module() -> Any:
        return importlib.import_module(f"pssl_ext.triton.{spec.name}")

    def forward(*args: Any) -> Any:
        return module().forward(spec.arguments(*args))

    def backward(*all_args: Any) -> Any:
        grads, args, needs = fallback.split(all_args, spec.output_count)
        return module().backward(*grads, spec.arguments(*args), needs)

    return forward, backward
