"""Memory of large results on the CPU, kept from one to the next where that is asked for."""

from __future__ import annotations

import sys


def keep_memory(mib: int) -> None:
    """Keep up to ``mib`` MiB of freed results of the CPU kernels for the next ones. 0, the default, keeps none.

    The system clears every page that a process touches for the first time, which for the gradient of a feature map
    takes longer than to compute it: with memory kept, a call with large gradients takes a quarter to a third less time.
    It concerns results of 4 MiB and more, of at most ``mib`` MiB. What is kept counts as the process's memory until the
    system runs short, and then goes first.

    It costs that such a result's storage cannot be resized: ``result.untyped_storage().resize_(0)`` raises an error,
    and so does code that frees tensors that way (FSDP, some activation offloading).

    Applies to results made from now on. With a smaller ``mib`` than before what is kept and free beyond it is given
    back at once, and what is in use when it is freed. Linux; elsewhere, and without the compiled kernels, nothing is
    kept. ``PSSL_KEEP_MIB=N`` in the environment does the same when ``pssl_ext`` is imported.

    Raises:
        ValueError: unless ``mib`` is an integer from 0 to 999999999.
    """
    if not isinstance(mib, int) or isinstance(mib, bool) or not 0 <= mib < 10**9:
        raise ValueError(f"keep_memory: mib must be an integer from 0 to 999999999, got {mib!r}")
    native = sys.modules.get("pssl_ext._C")
    if native:
        native.keep_memory(mib)


def release_memory() -> int:
    """Give the system what `keep_memory` keeps and no tensor uses; return how many bytes that was.

    Needed only to see how much memory a process really uses. Memory on GPUs is torch's: ``torch.cuda.empty_cache``.
    """
    native = sys.modules.get("pssl_ext._C")
    return native.release_memory() if native else 0
