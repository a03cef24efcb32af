"""Which implementation of an operator runs, and why not the others.

``native``     compiled kernels of ``pssl_ext._C`` (C++ on CPU, CUDA C++ on GPU)
``triton``     Triton kernels on GPU
``reference``  plain PyTorch, on any device
``auto``       the fastest of these that can run
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from pssl_ext import torch_private

BACKENDS = ("auto", "native", "triton", "reference")

#: What ``auto`` tries on a device before the reference, in this order. Source: benchmarks/results/nvidia-h200.json.
#: With labels finer than the features, and for cam_compare, the compiled kernels take half the time of Triton's or
#: less; on the feature grid Triton's take less of the device (contrast with gradients 0.44 ms against 0.72), but their
#: calls take twice as long to issue, 2.8 ms, for which the device waits. On other devices they run in Triton's
#: interpreter, slower than any reference.
AUTO = {"cuda": ("native", "triton")}
AUTO_ELSEWHERE = ("native",)

#: why ``pssl_ext._C`` could not be imported; None when it was
load_error: str | None = None
_warned: set[tuple[str, str]] = set()
#: (operator, device type) that the dispatcher had a kernel for; asking it takes as long as launching a kernel
_there: set[tuple[str, str]] = set()
#: (TRITON_INTERPRET is set, CC) under which all that Triton needs was found: looking for it reads folders
_tools: set[tuple[bool, str | None]] = set()


class Operator(Protocol):
    """What this module asks of an operator's description (`pssl_ext.op.OpSpec`)."""

    @property
    def name(self) -> str: ...
    @property
    def triton(self) -> Callable[[Any], str | None] | None: ...
    @property
    def reference_bound(self) -> str: ...


def load_native() -> None:
    """Import the compiled kernels, which registers them. Called once, when ``pssl_ext`` is imported.

    Their absence is no error (every operator has its reference) but is said once, as a warning.
    """
    global load_error
    try:
        importlib.import_module("pssl_ext._C")
    except ImportError as error:
        # a setting that cannot be followed is the user's to mend, not to pass over
        if "PSSL_" in str(error):
            raise
        load_error = str(error)
        warnings.warn(
            f"pssl_ext: the compiled kernels are not there ({error}); every operator runs on its slow PyTorch "
            "reference. `pip install -e .` builds them, `python -m pssl_ext.env` says what is missing.",
            RuntimeWarning,
            stacklevel=3,
        )


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question
def has_kernel(op: str, device_type: str) -> bool:
    """Tell whether a compiled kernel for the dispatcher's ``op`` is there."""
    if (op, device_type) in _there:
        return True
    found = torch_private.has_kernel(op, device_type)
    if found:
        _there.add((op, device_type))
    return found


def why_no_native(op: str, device_type: str) -> str | None:
    """Say why no compiled kernel can run ``op``; None when one can."""
    if load_error is not None:
        return f"pssl_ext._C could not be imported ({load_error})"
    if not has_kernel(op, device_type):
        return f"this build of pssl_ext._C holds no {device_type} kernel for {op}"
    return None


@torch.compiler.assume_constant_result
def _why_no_triton(device_type: str) -> str | None:
    """Say what Triton's kernels lack on ``device_type``, whatever the operator. Imports no Triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return (
            "Triton kernels run on CUDA devices, on others in Triton's interpreter alone (TRITON_INTERPRET=1)"
        )
    compiler = None if interpreted else os.environ.get("CC")
    if (interpreted, compiler) not in _tools:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        # as triton/runtime/build.py looks for it
        if not interpreted and not (compiler or shutil.which("gcc") or shutil.which("clang")):
            return "Triton compiles its launchers with a C compiler, and there is neither CC, gcc nor clang"
        _tools.add((interpreted, compiler))
    return None


#: as many regions, or maps of a class, as a tile of a Triton kernel holds at most (pssl_ext/triton/launch.py)
TRITON_MOST = {"regions": 256, "maps": 16}


def triton_limits(what: str, count: int, *tensors: torch.Tensor) -> str | None:
    """Say why Triton's kernels do not take ``count`` regions or maps, or ``tensors``, the types that sums go by."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "Triton kernels accumulate in float32, and an argument is float64"
    if count > TRITON_MOST[what]:
        return f"Triton kernels take at most {TRITON_MOST[what]} {what}, got {count}"
    return None


def why_not(spec: Operator, backend: str, device: str | torch.device = "cpu", args: Any = None) -> str | None:
    """Say why ``backend`` cannot run the operator on ``device``; None when it can.

    With the bound arguments ``args`` also where it cannot for these.
    """
    device_type = device.type if isinstance(device, torch.device) else torch.device(device).type
    if backend == "reference":
        return None
    if backend == "native":
        return why_no_native(spec.name, device_type)
    if backend == "triton":
        if spec.triton is None:
            return f"this version holds no Triton kernel for {spec.name}"
        reason = _why_no_triton(device_type)
        return spec.triton(args) if reason is None and args is not None else reason
    raise ValueError(f"{spec.name}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def choose(spec: Operator, backend: str, device: torch.device, args: Any = None) -> str:
    """Choose how the operator runs on ``device``: ``dispatcher`` (the best kernel there), ``triton`` or ``reference``.

    Raises RuntimeError where an explicit choice cannot run. ``auto`` that falls back to the reference on a GPU
    warns once an operator.
    """
    if backend == "auto":
        refused = []
        for candidate in AUTO.get(device.type, AUTO_ELSEWHERE):
            reason = why_not(spec, candidate, device, args)
            if reason is None:
                return "dispatcher" if candidate == "native" else candidate
            refused.append(f"{candidate}: {reason}")
        known = (spec.name, device.type)
        if device.type != "cpu" and not torch.compiler.is_compiling() and known not in _warned:
            _warned.add(known)
            warnings.warn(
                f"{spec.name} runs on its slow PyTorch reference on {device}{_bound(spec)}: {'; '.join(refused)}",
                RuntimeWarning,
                stacklevel=4,
            )
        return "dispatcher"
    reason = why_not(spec, backend, device, args)
    if reason is not None:
        raise RuntimeError(f"{spec.name}: backend {backend!r} cannot run on {device}: {reason}")
    return "dispatcher" if backend == "native" else backend


def _bound(spec: Operator) -> str:
    """Return what the reference is limited to, after a comma; nothing where it is not."""
    return f", {spec.reference_bound}" if spec.reference_bound else ""


def explain(spec: Operator, device: str | torch.device = "cpu") -> str:
    """Say in one line which backend ``auto`` takes on ``device``, and why not each faster one."""
    device_type = torch.device(device).type
    refused = []
    for backend in ("native", "triton", "reference"):
        reason = why_not(spec, backend, device)
        if reason is None and backend not in (*AUTO.get(device_type, AUTO_ELSEWHERE), "reference"):
            reason = f"runs on {device_type} only when asked for"
        if reason is None:
            detail = f" ({'; '.join(refused)})" if refused else ""
            bound = _bound(spec) if backend == "reference" else ""
            return f"{spec.name} on {device_type}: {backend}{detail}{bound}"
        refused.append(f"{backend}: {reason}")
    raise AssertionError("the reference runs everywhere")
