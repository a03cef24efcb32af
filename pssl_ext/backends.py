"""Which implementation of an operator runs, and why not the others.

``native``     compiled kernels of ``pssl_ext._C`` (C++ on CPU, CUDA C++ on GPU)
``triton``     Triton kernels on GPU
``reference``  plain PyTorch, on any device
``auto``       the fastest of these that can run
"""

from __future__ import annotations

import importlib
import warnings

import torch

BACKENDS = ("auto", "native", "triton", "reference")

#: why ``pssl_ext._C`` could not be imported; None when it was
load_error: str | None = None
_warned: set[tuple[str, str]] = set()


def load_native() -> None:
    """Imports the compiled kernels, which registers them. Called once, when ``pssl_ext`` is imported.

    Their absence is no error (every operator has its reference) but is said once, as a warning.
    """
    global load_error
    try:
        importlib.import_module("pssl_ext._C")
    except ImportError as error:
        # a setting that cannot be followed is the user's to mend, not to pass over
        if "PSSL_SIMD" in str(error):
            raise
        load_error = str(error)
        warnings.warn(
            f"pssl_ext: the compiled kernels are not there ({error}); every operator runs on its slow PyTorch "
            "reference. `pip install -e .` builds them, `python -m pssl_ext.env` says what is missing.",
            RuntimeWarning,
            stacklevel=3,
        )


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question
def _has_kernel(op: str, device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"pssl::{op}", key)


def why_not(op: str, backend: str, device: str | torch.device = "cpu") -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device``; None when it can."""
    device_type = torch.device(device).type
    if backend == "reference":
        return None
    if backend == "native":
        if load_error is not None:
            return f"pssl_ext._C could not be imported ({load_error})"
        if not _has_kernel(op, device_type):
            return f"this build of pssl_ext._C holds no {device_type} kernel for {op}"
        return None
    if backend == "triton":
        return f"this version holds no Triton kernel for {op}"
    raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def choose(op: str, backend: str, device: torch.device) -> str:
    """How to run ``op`` on ``device``: ``dispatcher`` (the best kernel registered there) or ``reference``.

    Raises RuntimeError where an explicit choice cannot run. ``auto`` that falls back to the reference on a GPU
    warns once an operator.
    """
    if backend == "auto":
        reason = why_not(op, "native", device)
        if (
            reason is not None
            and device.type != "cpu"
            and (op, device.type) not in _warned
            and not torch.compiler.is_compiling()
        ):
            _warned.add((op, device.type))
            warnings.warn(
                f"{op} runs on its slow PyTorch reference on {device}{_bound(op)}: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )
        return "dispatcher"
    reason = why_not(op, backend, device)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run on {device}: {reason}")
    return "reference" if backend == "reference" else "dispatcher"


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
    refused = []
    for backend in ("native", "triton", "reference"):
        reason = why_not(op, backend, device)
        if reason is None:
            detail = f" ({'; '.join(refused)})" if refused else ""
            bound = _bound(op) if backend == "reference" else ""
            return f"{op} on {torch.device(device).type}: {backend}{detail}{bound}"
        refused.append(f"{backend}: {reason}")
    raise AssertionError("the reference runs everywhere")
