"""A pytest plugin: runs the operators' own tests over the CUDA kernels, executed on the CPU.

    pytest -p cuda_on_cpu --cuda-on-cpu PATH tests/ops

with tests/cuda on PYTHONPATH. PATH is the module that tests/cuda/build.py made; it stands in for pssl_ext._C, so that
what the tests call native is the CUDA code. Tests of operators without a .cu file are skipped, and what tests nothing
of a kernel is left out. New memory holds NaN all the time, and since kernels do not look for labels out of range (no
result may wait for the device), PSSL_DEBUG=1 has them found before the call.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

MODULE = "pssl_ext._C"


class Finder:
    """Finds MODULE at ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def find_spec(self, name: str, path: object = None, target: object = None):
        return importlib.util.spec_from_file_location(name, self.path) if name == MODULE else None


def pytest_addoption(parser):
    parser.addoption("--cuda-on-cpu", metavar="PATH", help="the extension module made by tests/cuda/build.py")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    path = early_config.known_args_namespace.cuda_on_cpu
    assert path and os.path.exists(path), f"--cuda-on-cpu: {path} is no file"
    sys.meta_path.insert(0, Finder(path))


def pytest_collection_modifyitems(config, items):
    from emulation import of_a_kernel

    from build import cuda_sources
    from pssl_ext import dispatch
    from pssl_ext.op import OPS

    missing = [op for op in OPS if dispatch.why_not(OPS[op], "native", "cpu")]
    if lost := set(missing) & set(cuda_sources()):
        raise pytest.UsageError(f"{config.option.cuda_on_cpu} lacks kernels of {', '.join(sorted(lost))}")
    kept, left_out, taken = [], [], set()
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        # a case of another backend than ours, or the skipped one that says so
        other = any(f"-{backend}-cpu" in item.nodeid for backend in ("auto", "triton", "reference"))
        stays = getattr(case, "backend", None) == "native" if other else True
        stays = stays and (config.option.whole or of_a_kernel(item, taken))
        (kept if stays else left_out).append(item)
        if without := [op for op in missing if op in item.nodeid]:
            item.add_marker(pytest.mark.skip(reason=f"no CUDA kernel yet: {without[0]}"))
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setenv("PSSL_DEBUG", "1")


@pytest.fixture(autouse=True)
def poison():
    """Before every test, since some of them switch it off when they are done."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
