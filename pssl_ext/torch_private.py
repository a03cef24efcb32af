"""Every private name of ``torch._C`` that pssl_ext uses, each with a fallback by public API.

The names are looked up once, at import. Where this torch lacks one, the function that needs it takes its fallback:
slower or more careful, with the same results. tests/ops/test_torch_private.py hides each of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _find(*names: str) -> tuple[Any, ...] | None:
    """Return these attributes of ``torch._C``; None where one of them is missing."""
    if not all(hasattr(torch._C, name) for name in names):
        return None
    return tuple(getattr(torch._C, name) for name in names)


_BELOW = _find("_AutoDispatchBelowAutograd", "_after_autograd_keyset")
_ANY_REQUIRES_GRAD = _find("_any_requires_grad")
_TRANSFORMS = _find("_are_functorch_transforms_active", "_get_dispatch_mode", "_TorchDispatchModeKey")
_EXCLUSION = _find(
    "_dispatch_tls_local_include_set", "_dispatch_tls_local_exclude_set", "_ForceDispatchKeyGuard", "DispatchKey"
)  # fmt: skip
_HAS_KERNEL = _find("_dispatch_has_kernel_for_dispatch_key")

#: whether `run_below_autograd` can be called; `torch.library.register_autograd` serves where it cannot
CAN_RUN_BELOW_AUTOGRAD = _BELOW is not None


def run_below_autograd(op: Any, args: tuple, keyset: Any = None) -> Any:
    """Call ``op`` without the dispatcher's autograd; ``keyset`` is the dispatcher's where it is the caller."""
    guard, after = _BELOW
    with guard():
        return op(*args) if keyset is None else op.redispatch(keyset & after, *args)


def _any_requires_grad(*args: Any) -> bool:
    tensors = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


#: tell whether one of the arguments, tensors or lists of tensors among them, requires a gradient
any_requires_grad: Callable[..., bool] = _ANY_REQUIRES_GRAD[0] if _ANY_REQUIRES_GRAD else _any_requires_grad


def is_traced() -> bool:
    """Tell whether calls are recorded or transformed, or their tensors may have no values to look at.

    That is so under torch.compile, torch.jit.trace, functorch, make_fx and fake tensors. Fallback: always. Calls then
    go through the dispatcher, and label values are looked at by the kernels alone.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _TRANSFORMS is None:
        return True
    functorch_active, mode, kinds = _TRANSFORMS
    return functorch_active() or mode(kinds.PROXY) is not None or mode(kinds.FAKE) is not None


def run_with_autograd(function: Callable[[], Any]) -> Any:
    """Call ``function`` with autograd, inside a kernel, where the dispatcher leaves it out.

    ``torch.func.vjp`` needs no such thing, but its tensors have no storage, which every dispatch mode trips over
    (FlopCounterMode, opcheck's schema test). Fallback: a thread, because what the dispatcher leaves out, the modes and
    autocast are each thread's own.
    """
    if _EXCLUSION is None:
        return _in_thread(function)
    included, excluded, guard, key = _EXCLUSION
    left_out = excluded()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        left_out = left_out.remove(getattr(key, name))
    with torch.enable_grad(), guard(included(), left_out):
        return function()


def _in_thread(function: Callable[[], Any]) -> Any:
    """Call ``function`` in a new thread, on the CUDA stream of this one; return its result or raise its error."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                results.append(function())
        except BaseException as error:  # raised again by who waits
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def has_kernel(op: str, device_type: str) -> bool:
    """Tell whether the dispatcher has a compiled kernel for ``op``, such as ``prototype_pool_backward``, on a device.

    Fallback: every operator has kernels in ``pssl_ext._C`` for all devices that it was built for. Those that save
    something for the backward pass are not on all of them; the answer for these is no, and calls go without.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return False
    if _HAS_KERNEL is not None:
        return _HAS_KERNEL[0](f"pssl::{op}", key)
    native = sys.modules.get("pssl_ext._C")
    if native is None or op.endswith("_saving"):
        return False
    return device_type == "cpu" or native.build_info()["cuda"] is not None
