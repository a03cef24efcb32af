"""A pytest plugin: the operators' tests that are written for CPU tensors, over the kernels of the GPU.

    pytest -p gpu_for_cpu tests/ops/cases/cam_sweep.py

with tests/gpu on PYTHONPATH. The kernels for CPU tensors are replaced: arguments go to the GPU, results come back.
Since CUDA kernels do not look for labels out of range, PSSL_DEBUG=1 has them found before the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

LIBRARIES = []


def on_device(operator: Any, device: str) -> Callable:
    def kernel(*args: Any) -> Any:
        moved = tree_map_only(Tensor, lambda t: t.to(device), args)
        results = operator(*moved)
        if isinstance(results, list):
            results = tuple(results)
        return tree_map_only(Tensor, lambda t: t.to("cpu"), results)

    return kernel


def pytest_configure(config):
    from pssl_ext.op import NAMESPACE, OPS

    library = torch.library.Library(NAMESPACE, "IMPL")
    LIBRARIES.append(library)  # lives as long as the process
    for name, spec in OPS.items():
        forward = on_device(spec.op, "cuda")
        library.impl(name, forward, "CPU", allow_override=True)
        if spec.differentiable:
            backward = on_device(spec.op_backward, "cuda")
            library.impl(f"{name}_backward", backward, "CPU", allow_override=True)
            if spec.saves is not None:
                plain_instead(library, spec, forward, backward)


def plain_instead(library: torch.library.Library, spec: Any, forward: Callable, backward: Callable) -> None:
    """Where CPU kernels would save something for the backward pass, these save nothing."""
    outputs = spec.output_count

    def saving(*args: Any) -> tuple:
        return (*forward(*args), torch.empty(0))

    def backward_saved(*args: Any) -> Any:
        return backward(*args[:outputs], *args[outputs + 1 :])

    library.impl(f"{spec.name}_saving", saving, "CPU", allow_override=True)
    library.impl(f"{spec.name}_backward_saved", backward_saved, "CPU", allow_override=True)


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setenv("PSSL_DEBUG", "1")
