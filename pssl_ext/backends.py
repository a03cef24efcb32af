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
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

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


def load_native() -> None:
    """Imports the compiled kernels, which registers them. Called once, when ``pssl_ext`` is imported.

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


def release_memory() -> int:
    """Gives the system what the CPU kernels keep of freed gradients and other large results; returns how many bytes.

    Results of 4 MiB and more lie in memory that is kept when they are freed and taken for the next ones, since the
    system takes longer to clear new pages than the kernels take to fill them. It keeps at most ``PSSL_KEEP_MIB``
    (1024), in which the system may help itself to pages where it has none left; so this is needed only to see how much
    a process really uses. Linux; elsewhere, and without the compiled kernels, nothing is kept. Memory on GPUs is
    torch's: ``torch.cuda.empty_cache``.
    """
    native = sys.modules.get("pssl_ext._C")
    return native.release_memory() if native else 0


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question
def has_kernel(op: str, device_type: str) -> bool:
    if (op, device_type) in _there:
        return True
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    found = key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"pssl::{op}", key)
    if found:
        _there.add((op, device_type))
    return found


@torch.compiler.assume_constant_result
def _why_no_triton(op: str, device_type: str) -> str | None:
    """What is missing for ``op``'s Triton kernels, whatever the arguments. Imports no Triton."""
    from pssl_ext.registry import OPS

    if op not in OPS or OPS[op].triton is None:
        return f"this version holds no Triton kernel for {op}"
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
    """Why Triton's kernels do not take ``count`` regions or maps, or ``tensors``, the types that sums go by."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "Triton kernels accumulate in float32, and an argument is float64"
    if count > TRITON_MOST[what]:
        return f"Triton kernels take at most {TRITON_MOST[what]} {what}, got {count}"
    return None


def why_not(
    op: str, backend: str, device: str | torch.device = "cpu", args: Sequence[Any] | None = None
) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device``; None when it can.

    With the schema's arguments ``args`` also where it cannot for these.
    """
    device_type = device.type if isinstance(device, torch.device) else torch.device(device).type
    if backend == "reference":
        return None
    if backend == "native":
        if load_error is not None:
            return f"pssl_ext._C could not be imported ({load_error})"
        if not has_kernel(op, device_type):
            return f"this build of pssl_ext._C holds no {device_type} kernel for {op}"
        return None
    if backend == "triton":
        reason = _why_no_triton(op, device_type)
        if reason is None and args is not None:
            from pssl_ext.registry import OPS

            reason = OPS[op].triton(*args)
        return reason
    raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def choose(op: str, backend: str, device: torch.device, args: Sequence[Any] | None = None) -> str:
    """How to run ``op`` on ``device``: ``dispatcher`` (the best kernel registered there), ``triton`` or ``reference``.

    Raises RuntimeError where an explicit choice cannot run. ``auto`` that falls back to the reference on a GPU
    warns once an operator.
    """
    if backend == "auto":
        refused = []
        for candidate in AUTO.get(device.type, AUTO_ELSEWHERE):
            reason = why_not(op, candidate, device, args)
            if reason is None:
                return "dispatcher" if candidate == "native" else candidate
            refused.append(f"{candidate}: {reason}")
        if device.type != "cpu" and not torch.compiler.is_compiling() and (op, device.type) not in _warned:
            _warned.add((op, device.type))
            warnings.warn(
                f"{op} runs on its slow PyTorch reference on {device}{_bound(op)}: {'; '.join(refused)}",
                RuntimeWarning,
                stacklevel=4,
            )
        return "dispatcher"
    reason = why_not(op, backend, device, args)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run on {device}: {reason}")
    return "dispatcher" if backend == "native" else backend


def _bound(op: str) -> str:
    """What the reference of ``op`` is limited to, after a comma; nothing where it is not."""
    from pssl_ext.registry import OPS

    return f", {OPS[op].reference_bound}" if OPS[op].reference_bound else ""


def explain(op: str, device: str | torch.device = "cpu") -> str:
    """One line: the backend ``auto`` takes for ``op`` on ``device``, and why not each faster one.

    >>> print(pssl_ext.explain("prototype_pool", "cuda"))
    prototype_pool on cuda: reference (native: this build ... ; triton: ...)
    """
    from pssl_ext.registry import OPS

    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    device_type = torch.device(device).type
    refused = []
    for backend in ("native", "triton", "reference"):
        reason = why_not(op, backend, device)
        if reason is None and backend not in (*AUTO.get(device_type, AUTO_ELSEWHERE), "reference"):
            reason = f"runs on {device_type} only when asked for"
        if reason is None:
            detail = f" ({'; '.join(refused)})" if refused else ""
            bound = _bound(op) if backend == "reference" else ""
            return f"{op} on {device_type}: {backend}{detail}{bound}"
        refused.append(f"{backend}: {reason}")
    raise AssertionError("the reference runs everywhere")
