"""Outputs and gradients of every operator against the reference in float64: types, layouts, cotangents."""

import pytest
import torch
from support import prototype_args

from pssl_ext.op import OPS
from pssl_ext.testing import DTYPES, check, check_args, devices, errors, leaves, run, samples, truth


@pytest.mark.cases(dtypes=DTYPES)
def test_every_dtype(case):
    check(case)


@pytest.mark.cases(dtypes=(torch.float32, torch.bfloat16), pairwise=True)
def test_every_layout(case):
    check(case)


@pytest.mark.cases(dtypes=(torch.float32,), differentiable=True)
def test_stride_0_gradient(case):
    """What ``.sum().backward()`` sends."""
    check(case, cotangent="sum")


@pytest.mark.cases(differentiable=True)
def test_each_gradient_alone(case):
    """A kernel told to make one gradient makes the one that it makes among all."""
    spec, args = case.spec, case.sample.args
    together = run(spec, args, case.backend).grads
    for name in leaves(spec, args):
        alone = run(spec, args, case.backend, only=name).grads
        for found, gradient in alone.items():
            assert found == f"grad {name}"
            torch.testing.assert_close(
                gradient, together[found], rtol=1e-5, atol=1e-6, msg=f"{case}: {found}"
            )


@pytest.mark.cases(dtypes=(torch.bfloat16, torch.float16), differentiable=True)
def test_mixed_types(case):
    """Half-precision features beside float32 everything else: each gradient comes in its argument's type."""
    args = dict(case.sample.args)
    for name in list(args)[1:]:
        if isinstance(args[name], torch.Tensor) and args[name].is_floating_point():
            args[name] = args[name].float()
    got = check_args(case.spec, args, case.backend, f"{case} beside float32")
    for name, tensor in leaves(case.spec, args).items():
        assert got.grads[f"grad {name}"].dtype == tensor.dtype


@pytest.mark.cases(dtypes=(torch.float32, torch.bfloat16))
def test_poisoned_outputs(case, poisoned_memory):
    """New memory holds NaN: a kernel that leaves an element unwritten shows it."""
    check(case)


@pytest.fixture
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid, size", [(20, 120), (70, 70)])
@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_several_tiles(op, grid, size, dtype, device):
    """More channels, classes and pixels than any one tile or vector of a kernel holds."""
    g = torch.Generator().manual_seed(2)
    regions = torch.randint(0, 21, (1, size, size), generator=g)
    regions[torch.rand(regions.shape, generator=g) < 0.2] = 255
    features = torch.randn(1, 130, grid, grid, generator=g).to(dtype)
    args = prototype_args(op, features, regions, 21, g, device)
    check_args(OPS[op], args, "auto", f"{op} {grid} to {size} {dtype} {device}")


@pytest.mark.interface
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("op", OPS)
def test_the_reference_is_well_conditioned(op, device):
    """The bound grows with the reference's own float32 error, so that must be small itself."""
    for sample in samples(op, device, torch.float32, "contiguous"):
        own, true = run(OPS[op], sample.args, "reference"), truth(OPS[op], sample.args)
        for name, tensor in own.named().items():
            if tensor.is_floating_point() and tensor.numel():
                error = errors(tensor, true.named()[name])
                limit = 1e-4 * float(true.named()[name].abs().max()) + 1e-6
                assert error.largest <= limit, f"{op} {sample.id} {name}: {error.largest:.3g} > {limit:.3g}"
