"""A pytest plugin: of the operators' tests those on a GPU.

    pytest -p on_gpu tests/ops

with tests/gpu on PYTHONPATH. Leaves out what runs on processors, which CI has run, and placeholders of what does not
exist by design (Triton kernels that an operator has not, or in float64): what is then skipped is missing. Ends at once
where an operator has no native kernel for CUDA.
"""

from __future__ import annotations

import pytest

NOT_MEANT = ("holds no Triton kernel", "an argument is float64")


def pytest_collection_modifyitems(config, items):
    from pssl_ext import dispatch
    from pssl_ext.op import OPS

    missing = [reason for op in OPS if (reason := dispatch.why_not(OPS[op], "native", "cuda"))]
    if missing:
        raise pytest.UsageError("; ".join(missing))
    kept = [item for item in items if _on_gpu(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _on_gpu(item) -> bool:
    if item.get_closest_marker("gpu"):
        return True
    skip = item.get_closest_marker("skip")
    if skip and any(words in skip.kwargs.get("reason", "") for words in NOT_MEANT):
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    placeholder = "cuda" if "-cuda" in item.name else None
    return (params.get("device") or getattr(params.get("case"), "device", placeholder)) == "cuda"
