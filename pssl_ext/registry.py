"""One description per operator: schema, reference, fake kernel, gradients, samples, bytes moved.

``define_op`` is all an operator needs in Python. From its schema and its reference it derives

* the dispatcher entry ``torch.ops.pssl.<op>`` with the reference as the kernel every device falls back to,
* ``torch.ops.pssl.<op>_backward``, an operator of its own, whose fallback differentiates the reference,
* the fake kernels and the autograd formula that ``torch.compile`` and ``torch.library.opcheck`` ask for.

Native kernels (C++, CUDA) register themselves for the same two names when ``pssl_ext._C`` is imported. Triton kernels
have names of their own, ``<op>_triton`` and ``<op>_triton_backward``: both may be there for one device, and a choice
made forward holds backward. They are in ``pssl_ext/triton/<op>.py``, imported at the first call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pssl_ext import backends
from pssl_ext.autograd import formula

NAMESPACE = "pssl"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

#: every operator by name, in the order of definition
OPS: dict[str, OpSpec] = {}

#: by the dispatcher's name, for those with a gradient: `formula`
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

    ``reference`` takes the schema's arguments in order. ``differentiable`` names the arguments that have a
    gradient (a tensor or a list of tensors); an operator without any gets no backward. ``check_values`` looks at
    the data (label ranges) and so runs on CPU, and on other devices only with ``PSSL_DEBUG=1``.
    ``samples(device, dtype)`` yields calls, ``bytes_moved(**public arguments)`` the compulsory traffic of
    (forward, backward): every input read once, every output written once. ``reference_bound`` says what the reference
    is limited to, where it is, and ``approximation`` how far kernels are from it, where they are. ``triton`` says why
    the Triton kernels cannot take the schema's arguments (None: they can); None where there are no such kernels.
    ``saves`` says whether the forward pass of the schema's arguments had better leave the backward pass something,
    where a device has kernels that do: ``<name>_saving``, which returns a tensor more, and ``<name>_backward_saved``,
    which takes it behind the outputs' gradients.
    """

    name: str
    schema: str
    function: Callable
    reference: Callable
    fake: Callable
    samples: Callable[..., Iterator[Sample]]
    bytes_moved: Callable[..., tuple[int, int]]
    differentiable: tuple[str, ...] = ()
    check_values: Callable | None = None
    reference_bound: str = ""
    approximation: Approximation | None = None
    triton: Callable[..., str | None] | None = None
    saves: Callable[..., bool] | None = None
    #: first argument of the schema that is a tensor or a list of tensors: its device is the call's device
    argument_names: tuple[str, ...] = field(default=())
    output_count: int = 1

    def entry(self, backend: str = "auto") -> str:
        """The name under which the dispatcher knows the operator as ``backend`` runs it."""
        return self.name + ("_triton" if backend == "triton" else "")

    def op_of(self, backend: str = "auto") -> Any:
        return getattr(torch.ops.pssl, self.entry(backend)).default

    def op_backward_of(self, backend: str = "auto") -> Any:
        return getattr(torch.ops.pssl, self.entry(backend) + "_backward").default

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
    fake: Callable,
    samples: Callable,
    bytes_moved: Callable,
    differentiable: tuple[str, ...] = (),
    check_values: Callable | None = None,
    reference_bound: str = "",
    approximation: Approximation | None = None,
    triton: Callable[..., str | None] | None = None,
    saves: Callable[..., bool] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorates the public function: registers ``pssl::<function name>`` and returns the function unchanged."""

    def register(function: Callable) -> Callable:
        name = function.__name__
        if name in OPS:
            raise ValueError(f"define_op: {name} is defined twice")
        parsed = torch._C.parse_schema(name + schema)
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
            argument_names=tuple(a.name for a in parsed.arguments),
            output_count=len(parsed.returns),
        )
        unknown = set(differentiable) - set(spec.argument_names)
        if unknown:
            raise ValueError(
                f"define_op: {name} has no argument {sorted(unknown)}; it has {spec.argument_names}"
            )
        _register(spec, parsed, name, _composite_forward(spec), _composite_backward(spec))
        if saves is not None:
            _register_saving(spec, parsed)
        if triton is not None:
            forward, backward = _triton_kernel(name, "forward"), _triton_kernel(name, "backward")
            _register(spec, parsed, spec.entry("triton"), forward, backward)
        OPS[name] = spec
        return function

    return register


def _register(spec: OpSpec, parsed: Any, entry: str, forward: Callable, backward: Callable) -> None:
    """Defines the dispatcher's ``entry`` and, for a differentiable operator, ``<entry>_backward``.

    ``backward`` returns one gradient for each entry of ``spec.differentiable``.
    """
    _library.define(entry + spec.schema)
    _library.impl(entry, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{entry}", spec.fake, lib=_library)
    if spec.differentiable:
        _register_backward(spec, parsed, entry, backward)


def _register_saving(spec: OpSpec, parsed: Any) -> None:
    """Defines the pair that ``spec.saves`` chooses, see there; kernels of devices that have one implement it."""
    forward, backward = spec.name + "_saving", spec.name + "_backward_saved"
    _library.define(forward + spec.schema[:-1] + ", Tensor)")
    _library.define(backward + _backward_schema(spec, parsed, "Tensor saved, "))
    op, op_backward = (getattr(torch.ops.pssl, name).default for name in (forward, backward))
    _RECORDED[forward] = formula(spec.op, op_backward, parsed, _differentiable_indices(spec), op)


def call(name: str, backend: str, *args: Any) -> Any:
    """Runs operator ``name`` on schema arguments ``args`` by the backend that ``backend`` chooses."""
    spec = OPS[name]
    device = _device_of(args)
    chosen = backends.choose(name, backend, device, args)
    traced = _traced()
    # C++ kernels look for themselves, GPU kernels cannot raise: PSSL_DEBUG=1 looks for them
    if spec.check_values is not None and not traced and (chosen != "dispatcher" or _debug()):
        _check_values(spec, device, args)
    if chosen == "reference":
        return _without_autocast(spec.reference)(*args)
    # what others transform or trace is the dispatcher's to call, as is what has no gradient
    if traced or not spec.differentiable:
        return spec.op_of(chosen)(*args)
    entry = spec.entry(chosen)
    if chosen == "dispatcher" and spec.saves is not None and spec.saves(*args):
        saving = entry + "_saving"
        if backends.has_kernel(saving, device.type):
            entry = saving
    return _RECORDED[entry](args)


def _traced() -> bool:
    """Whether a call is recorded, transformed or of tensors without values, which then cannot be looked at: by
    torch.compile, torch.jit.trace, functorch, make_fx or fake tensors."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    mode, kinds = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return mode(kinds.PROXY) is not None or mode(kinds.FAKE) is not None


def _triton_kernel(name: str, direction: str) -> Callable:
    """``forward`` or ``backward`` of ``pssl_ext/triton/<name>.py``, which imports Triton: at the first call."""

    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(f"pssl_ext.triton.{name}"), direction)(*args)

    return kernel


# -- the reference as a kernel -----------------------------------------------------------------------------------------


def _composite_forward(spec: OpSpec) -> Callable:
    def kernel(*args: Any) -> Any:
        _check_values(spec, _device_of(args), args)
        return _without_autocast(spec.reference)(*args)

    return kernel


def _composite_backward(spec: OpSpec) -> Callable:
    """The gradient of the reference by autograd."""

    def kernel(*all_args: Any) -> tuple:
        grads, args, needs = _split_backward_args(spec, all_args)
        indices = _differentiable_indices(spec)
        fixed = [tree_map_only(Tensor, Tensor.detach, a) for a in args]
        wanted = [i for i, needed in zip(indices, needs, strict=True) if needed]
        leaves, structure = tree_flatten([fixed[i] for i in wanted])
        found: dict[int, Any] = {}
        if leaves:
            with _autograd_in_kernel():
                for leaf in leaves:
                    leaf.requires_grad_()
                outputs = spec.reference(*fixed)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                pairs = [
                    (o, g.to(o.dtype))
                    for o, g in zip(outputs, grads, strict=True)
                    if g is not None and o.requires_grad
                ]
                if pairs:
                    sources, seeds = zip(*pairs, strict=True)
                    made = torch.autograd.grad(
                        sources, leaves, seeds, allow_unused=True, materialize_grads=True
                    )
                else:
                    made = [torch.zeros_like(leaf) for leaf in leaves]
            found = dict(zip(wanted, tree_unflatten(list(made), structure), strict=True))
        return tuple(_like(args[i], found.get(i)) for i in indices)

    # the whole of it: backward() may be called under autocast too, and matrix products are in the gradient as well
    return _without_autocast(kernel)


@contextlib.contextmanager
def _autograd_in_kernel() -> Iterator[None]:
    """Inside a kernel the dispatcher leaves autograd out; this lets it in again.

    ``torch.func.vjp`` would do without it, but its tensors have no storage, which every dispatch mode trips over
    (FlopCounterMode, opcheck's schema test).
    """
    c = torch._C
    excluded = c._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(c.DispatchKey, key))
    with torch.enable_grad(), c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded):
        yield


def _like(argument: Any, gradient: Any) -> Any:
    """``gradient`` in the layout of ``argument``; an empty tensor (a list of none) where none was asked for."""
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


def _without_autocast(function: Callable) -> Callable:
    """Inputs are taken as they are: under autocast a reference's matrix products would drop to half precision."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        device_type = _device_of(args).type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(*args)
        return function(*args)

    return wrapped


def _check_values(spec: OpSpec, device: torch.device, args: tuple) -> None:
    """Reading values waits for the device, so only CPU tensors are looked at unless PSSL_DEBUG=1 asks for it."""
    if spec.check_values is not None and (device.type == "cpu" or _debug()):
        spec.check_values(*args)


def _debug() -> bool:
    return os.environ.get("PSSL_DEBUG") == "1"


def _device_of(args: tuple) -> torch.device:
    for a in args:
        if isinstance(a, Tensor):
            return a.device
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device
    return torch.device("cpu")


# -- autograd ----------------------------------------------------------------------------------------------------------


def _differentiable_indices(spec: OpSpec) -> list[int]:
    return [spec.argument_names.index(n) for n in spec.differentiable]


def _split_backward_args(spec: OpSpec, all_args: tuple) -> tuple[tuple, tuple, Any]:
    """(gradients of the outputs, forward arguments, which gradients are wanted) of a backward call."""
    n = spec.output_count
    return all_args[:n], all_args[n:-1], all_args[-1]


def _backward_schema(spec: OpSpec, parsed: Any, more: str = "") -> str:
    """Gradients of the outputs (None: zero), ``more``, the forward's arguments, and for each gradient whether it is
    wanted."""
    grads = ", ".join(f"Tensor? grad_{i}" for i in range(spec.output_count))
    forward = spec.schema[1 : spec.schema.rindex("->")].strip()[:-1]
    results = ", ".join(
        "Tensor[]" if _is_list(parsed.arguments[i]) else "Tensor" for i in _differentiable_indices(spec)
    )
    return f"({grads}, {more}{forward}, bool[] needs) -> ({results})"


def _is_list(argument: Any) -> bool:
    return isinstance(argument.type, torch.ListType)


def _register_backward(spec: OpSpec, parsed: Any, entry: str, kernel: Callable) -> None:
    name = entry + "_backward"
    indices = _differentiable_indices(spec)
    single = len(indices) == 1

    def unwrap(results: tuple) -> Any:
        return results[0] if single else results

    _library.define(name + _backward_schema(spec, parsed))
    _library.impl(name, lambda *a: unwrap(kernel(*a)), "CompositeExplicitAutograd")

    def fake(*all_args: Any) -> Any:
        _, args, needs = _split_backward_args(spec, all_args)
        return unwrap(tuple(_fake_like(args[i], n) for i, n in zip(indices, needs, strict=True)))

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

    run = formula(
        getattr(torch.ops.pssl, entry).default, getattr(torch.ops.pssl, name).default, parsed, indices
    )
    _library.impl(entry, lambda keyset, *args: run(args, keyset), "Autograd", with_keyset=True)
    _RECORDED[entry] = run
