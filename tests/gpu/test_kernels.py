"""Kernels at the size of training: the same bits every time, the values of the C++ kernels, torch.compile. And the
operators' tests that are written for CPU tensors, over the kernels of the GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import kernels
from gpu_for_cpu import on_device
from problems import real_size

from pssl_ext.op import OPS
from pssl_ext.ops.cam_sweep import by_launches
from pssl_ext.testing import Case, assert_same_bits, check, run, samples

HERE = Path(__file__).resolve().parent
gpu = pytest.mark.gpu
every_kernel = pytest.mark.parametrize("op, backend", kernels())


@gpu
@every_kernel
def test_the_same_bits_every_time(op, backend):
    args = real_size(op)
    first = run(OPS[op], args, backend)
    for _ in range(4):
        assert_same_bits(run(OPS[op], args, backend), first, op)


@gpu
@every_kernel
def test_the_values_of_the_processor(op, backend):
    """Two implementations that share their arithmetic at most, at a size where the reference takes too long."""
    got = run(OPS[op], real_size(op), backend).named()
    expected = run(OPS[op], real_size(op, "cpu"), "native").named()
    for name, tensor in expected.items():
        other = got[name].cpu()
        if not tensor.is_floating_point():
            assert torch.equal(other, tensor), f"{op}: {name}"
            continue
        error, top = float((other - tensor).abs().max()), float(tensor.abs().max())
        assert error <= 1e-4 * top, f"{op}: {name}: {error:.3g} apart, largest {top:.3g}"


@gpu
@every_kernel
def test_inductor(op, backend):
    torch._dynamo.reset()
    first = samples(op, "cpu", torch.float32, "contiguous")[0].id
    compiled = torch.compile(OPS[op].function, fullgraph=True)
    check(Case(op, first, backend, "cuda"), function=compiled)


@gpu
@pytest.mark.parametrize("op", OPS)
def test_the_tests_for_cpu_tensors(op):
    """Each operator's own; tests/ops/test_op_* have cases on every device themselves."""
    plugin = ["-p", "gpu_for_cpu", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugin, "-q", f"tests/ops/cases/{op}.py", "-k", "not threads"]
    variables = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    found = subprocess.run(
        command, cwd=HERE.parents[1], env=variables, capture_output=True, text=True, check=False
    )
    passed = re.search(r"(\d+) passed", found.stdout)
    assert found.returncode == 0 and passed and int(passed[1]) > 0, found.stdout[-10000:] + found.stderr


def test_thresholds_in_a_graph():
    """What a captured call makes of a list of thresholds, here without a graph."""
    values = [0.1, 0.5, float("nan"), float("inf"), -float("inf"), 1e-9, *(i / 1000 for i in range(400))]
    for dtype in (torch.float32, torch.float64):
        made = by_launches(values, torch.zeros(len(values), dtype=dtype))
        torch.testing.assert_close(made, torch.tensor(values, dtype=dtype), rtol=0, atol=0, equal_nan=True)
    assert by_launches([], torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("op", ["random_walk", "prototype_pool", "cam_compare"])
def test_the_problems_are_sound(op):
    """Here with the kernels of the processor, so that they are known to run before there is a GPU."""
    for name, tensor in run(OPS[op], real_size(op, "cpu")).named().items():
        assert tensor.numel() and bool(tensor.isfinite().all()), f"{op}: {name}"


@pytest.mark.parametrize("op, sample_id", [("random_walk", "edges"), ("cam_compare", None)])
def test_a_kernel_on_another_device(op, sample_id):
    """What gpu_for_cpu registers, with the reference in the place of the GPU."""
    spec = OPS[op]
    sample = next(s for s in samples(op, "cpu", torch.float32, "contiguous") if sample_id in (None, s.id))
    with torch.library._scoped_library("pssl", "IMPL") as library:
        library.impl(op, on_device(spec.reference, "cpu"), "CPU", allow_override=True)
        check(Case(op, sample.id, "auto"))
