"""Tolerances and assertions that the tests and the benchmarks share.

Truth is the reference in float64 on the same inputs. A kernel may err twice as much as the reference does in the
kernel's own types, plus one rounding of the result and a few of the accumulation: the bound is the same for every
operator, and `allowed` is the one place it is written, but for kernels that approximate (`OpSpec.approximation`, for
which `assert_near` stands in). Gradients must also have the right direction (cosine) and be
neither shrunk nor shifted (signed bias), which shows a factor that hides below a half-precision rounding error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from pssl_ext.op import OPS, Approximation, OpSpec, Sample
from pssl_ext.ops._reference import accumulation_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

ACCUMULATION_ROUNDINGS = 16  # that a result may be away, relative to its largest magnitude
# In float64 the truth is a computation of the same precision: its own error reads 0, and how much a sum with
# cancellation loses depends on the order in which the processor's matrix product takes it.
FLOAT64_ROUNDINGS = 64


# -- layouts -------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim >= 2 else x


def _sliced(x: Tensor) -> Tensor:
    """Every second element of a buffer whose gaps hold what would show if it were read."""
    if x.ndim == 0:
        return x
    gaps = torch.nan if x.is_floating_point() else 99
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), gaps, device=x.device).to(x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _offset(x: Tensor) -> Tensor:
    """One element into its storage: not aligned to a vector register."""
    buffer = torch.full((x.numel() + 1,), 0, dtype=x.dtype, device=x.device)
    return buffer[1:].copy_(x.reshape(-1)).view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    """Stride 0 along the batch, with the values of its first entry.

    Matrices stay as they are: with equal prototypes every gradient is 0 but for rounding, which compares with nothing.
    """
    return x[:1].expand(x.shape) if x.ndim >= 3 and x.shape[0] > 1 else x


#: the layout of every tensor argument; where a layout does not apply to a tensor, that one stays contiguous
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
}


# -- cases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operator on one sample: which backend, where, in which type and layout."""

    op: str
    sample_id: str
    backend: str = "auto"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def spec(self) -> OpSpec:
        return OPS[self.op]

    @property
    def sample(self) -> Sample:
        return next(
            s for s in samples(self.op, self.device, self.dtype, self.layout) if s.id == self.sample_id
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join((self.op, self.sample_id, self.backend, self.device, dtype, self.layout))


@functools.lru_cache(maxsize=64)
def samples(op: str, device: str, dtype: torch.dtype, layout: str) -> tuple[Sample, ...]:
    """The operator's samples with every tensor in ``layout``. Shared between tests: not to be written to."""
    lay_out = LAYOUTS[layout]
    return tuple(
        replace(s, args=tree_map_only(Tensor, lay_out, s.args))
        for s in OPS[op].samples(torch.device(device), dtype)
    )


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# -- running -------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Outputs in order, and by argument name the gradients (one tensor for each entry of a list argument)."""

    outputs: list[Tensor]
    grads: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        return {**{f"output {i}": o for i, o in enumerate(self.outputs)}, **self.grads}


def leaves(spec: OpSpec, args: dict[str, Any]) -> dict[str, Tensor]:
    """``args``' floating tensors that ``spec`` has gradients for: {"features": …, "main[0]": …}."""
    found = {}
    for name in spec.differentiable:
        value = args.get(name)
        entries = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for i, tensor in entries:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                found[name if i is None else f"{name}[{i}]"] = tensor
    return found


def run(
    spec: OpSpec,
    args: dict[str, Any],
    backend: str = "auto",
    *,
    function: Callable | None = None,
    cotangent: str = "random",
    only: str | None = None,
) -> Results:
    """Forward, and the gradient of every differentiable argument (``only``: of that one).

    ``cotangent`` "random": the same random float32 values for every caller; "sum": what ``.sum().backward()`` sends, a
    stride-0 gradient. ``function`` stands in for the public function (a compiled one, say).
    """
    args = tree_map_only(Tensor, lambda t: t.detach(), args)
    inputs = {n: t for n, t in leaves(spec, args).items() if only in (None, n)}
    for tensor in inputs.values():
        tensor.requires_grad_()
    outputs = tree_flatten((function or spec.function)(**args, backend=backend))[0]
    results = Results([o.detach() for o in outputs])
    sources = [o for o in outputs if o.requires_grad]
    seeds = _cotangents(outputs)
    if cotangent == "sum" and sources:
        sources, seeds = [sum(o.sum() for o in sources)], [None]
    grads = torch.autograd.grad(sources, list(inputs.values()), seeds, allow_unused=True) if sources else ()
    for (name, tensor), grad in zip_longest(inputs.items(), grads):
        results.grads[f"grad {name}"] = torch.zeros_like(tensor) if grad is None else grad
    return results


def _cotangents(outputs: list[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(23)
    made = [torch.randn(o.shape, generator=g, dtype=torch.float32).to(o.device, o.dtype) for o in outputs]
    return [c for c, o in zip(made, outputs, strict=True) if o.requires_grad]


def truth(spec: OpSpec, args: dict[str, Any], **how: Any) -> Results:
    """The reference in float64 on the same values."""
    doubled = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    return run(spec, doubled, "reference", **how)


# -- comparing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """How far a tensor is from the truth; the three last are for gradients."""

    largest: float
    cosine: float = 0.0  # 1 - cos(got, truth)
    scale: float = 0.0  # <got - truth, truth> / <truth, truth>: shrunk or stretched
    shift: float = 0.0  # mean error / mean magnitude


def errors(got: Tensor, true: Tensor) -> Errors:
    got, true = got.double().flatten(), true.double().flatten()
    if true.numel() == 0:
        return Errors(0.0)
    error = got - true
    largest = float(error.abs().max())
    square, magnitude = float(true @ true), float(true.abs().mean())
    if square == 0:
        return Errors(largest)
    norms = float(got.norm()) * math.sqrt(square)
    cosine = 1 - float(got @ true) / norms if norms else 1.0
    return Errors(largest, cosine, float(error @ true) / square, float(error.mean()) / magnitude)


def allowed(own: Errors, true: Tensor, result: torch.dtype, accumulation: torch.dtype) -> Errors:
    """The bound on each error, from the reference's own errors in the kernel's types: all tolerances there are."""
    if true.numel() == 0:
        return Errors(0.0)
    info = torch.finfo(result)
    rounding = info.eps / 2
    roundings = FLOAT64_ROUNDINGS if accumulation == torch.float64 else ACCUMULATION_ROUNDINGS
    drift = roundings * torch.finfo(accumulation).eps
    relative = rounding + drift
    subnormal = info.smallest_normal * info.eps  # below it half-precision gradients vanish
    top, magnitude = float(true.abs().max()), float(true.abs().mean())
    rms = float(true.double().square().mean().sqrt())
    if rms == 0:
        return Errors(2 * own.largest)
    # independent roundings average out over n values, what the accumulation does to all of them does not
    bias = 4 * rounding / math.sqrt(true.numel()) + drift
    bias += subnormal / magnitude
    return Errors(
        2 * own.largest + relative * top + subnormal,
        2 * abs(own.cosine) + ((relative * top + subnormal) / rms) ** 2 + 1e-14,
        2 * abs(own.scale) + bias,
        2 * abs(own.shift) + bias,
    )


def assert_accurate(
    got: Tensor,
    own: Tensor,
    true: Tensor,
    what: str,
    accumulation: torch.dtype = torch.float32,
    approximation: Approximation | None = None,
) -> None:
    """``got`` is as near to ``true`` as ``own``, the reference in its types, promises, or as ``approximation`` does.
    Integers must be equal.

    ``what`` names the operator, case and tensor in the message.
    """
    assert got.shape == own.shape, f"{what}: shape {list(got.shape)}, expected {list(own.shape)}"
    assert got.dtype == own.dtype, f"{what}: {got.dtype}, expected {own.dtype}"
    if not got.is_floating_point():
        different = int((got != own).sum())
        assert different == 0, f"{what}: {different} of {got.numel()} values differ from the reference's"
        return
    assert bool(true.isfinite().all()), f"{what}: the reference itself is not finite"
    broken = int((~got.isfinite()).sum())
    assert broken == 0, f"{what}: {broken} of {got.numel()} values are not finite"
    if approximation is not None:
        assert_near(got, true, what, approximation)
        return
    found, own_errors = errors(got, true), errors(own, true)
    bound = allowed(own_errors, true, got.dtype, accumulation)
    kinds = ("largest", "cosine", "scale", "shift") if ": grad " in what else ("largest",)
    for kind in kinds:
        error, limit = abs(getattr(found, kind)), getattr(bound, kind)
        assert error <= limit, (
            f"{what}: {kind} error {error:.3g} is above the allowed {limit:.3g} "
            f"(the reference in its own types: {abs(getattr(own_errors, kind)):.3g}; "
            f"largest magnitude {float(true.abs().max()) if true.numel() else 0:.3g})"
        )


def assert_near(got: Tensor, true: Tensor, what: str, approximation: Approximation) -> None:
    error = (got.double() - true.double()).abs().flatten()
    for kind, found in (("largest", error.amax()), ("mean", error.mean())) if error.numel() else ():
        limit = getattr(approximation, kind)
        assert found <= limit, (
            f"{what}: {kind} error {float(found):.3g} is above the {limit:.3g} that {approximation.reason} may cost"
        )


@functools.lru_cache(maxsize=2048)  # 14 MiB for all contiguous samples in all types
def _expected(
    op: str, sample_id: str, device: str, dtype: torch.dtype, layout: str, cotangent: str
) -> tuple[Results, Results, list[int]]:
    """What ``expected_of`` returns for the sample, kept for as long as the process lives, and the tensors' versions."""
    args = Case(op, sample_id, "reference", device, dtype, layout).sample.args
    own, true = expected_of(OPS[op], args, cotangent)
    return own, true, _versions(own, true)


def _versions(*results: Results) -> list[int]:
    return [t._version for r in results for t in r.named().values()]


def expected_of(spec: OpSpec, args: dict[str, Any], cotangent: str = "random") -> tuple[Results, Results]:
    """Return the reference in the arguments' types, and the truth."""
    return run(spec, args, "reference", cotangent=cotangent), truth(spec, args, cotangent=cotangent)


def check(case: Case, *, function: Callable | None = None, cotangent: str = "random") -> Results:
    """Run ``case``, assert outputs and gradients against the truth, and return them.

    What is expected of a sample is computed once for all backends and tests.
    """
    spec, args = case.spec, case.sample.args
    got = run(spec, args, case.backend, function=function, cotangent=cotangent)
    own, true, versions = _expected(case.op, case.sample_id, case.device, case.dtype, case.layout, cotangent)
    assert_results(spec, args, case.backend, str(case), got, own, true)
    assert versions == _versions(own, true), f"{case}: what is expected, and shared, was written to"
    return got


def check_args(
    spec: OpSpec,
    args: dict[str, Any],
    backend: str,
    what: str,
    *,
    function: Callable | None = None,
    cotangent: str = "random",
) -> Results:
    """As ``check``, for arguments that are no sample of the operator."""
    got = run(spec, args, backend, function=function, cotangent=cotangent)
    assert_results(spec, args, backend, what, got, *expected_of(spec, args, cotangent))
    return got


def assert_results(
    spec: OpSpec, args: dict[str, Any], backend: str, what: str, got: Results, own: Results, true: Results
) -> None:
    """Assert each output and gradient by ``assert_accurate``."""
    floating = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor) and t.is_floating_point()]
    named, own_named, true_named = got.named(), own.named(), true.named()
    assert len(named) == len(own_named), f"{what}: got {list(named)}, expected {list(own_named)}"
    for name, tensor in named.items():
        assert_accurate(
            tensor,
            own_named[name],
            true_named[name],
            f"{what}: {name}",
            accumulation_dtype(*floating),
            spec.approximation if backend != "reference" else None,
        )


def assert_same_bits(a: Results, b: Results, what: str) -> None:
    for name, tensor in a.named().items():
        other = b.named()[name]
        same = (tensor == other) | (tensor.isnan() & other.isnan())
        assert bool(same.all()), f"{what}: {name}: {int((~same).sum())} of {same.numel()} values differ"
