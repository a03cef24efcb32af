"""The tester itself: kernels with a planted fault, registered as compiled ones are, must fail it."""

import pytest
import torch
from cases import case_of
from support import planted, reference_gradients
from torch.utils._pytree import tree_map_only

from pssl_ext.op import OPS
from pssl_ext.ops import prototype_pool
from pssl_ext.testing import DTYPES, Case, assert_same_bits, check, run

pytestmark = pytest.mark.interface

FAULTS = [
    pytest.param(op, fault, sample, id=f"{op}-{fault.kernel.__name__}-{sample}")
    for op in OPS
    for fault in case_of(op).FAULTS
    for sample in fault.samples
]
UNSEEN = [
    pytest.param(op, fault, sample, id=f"{op}-{fault.kernel.__name__}-{sample}")
    for op in OPS
    for fault in case_of(op).FAULTS
    for sample in fault.unseen
]


@pytest.mark.parametrize("op, fault, sample", FAULTS)
def test_a_fault_is_seen(op, fault, sample):
    check(Case(op, sample))
    with (
        planted(op + fault.entry, fault.kernel),
        pytest.raises(AssertionError, match=f"{op}-{sample}.*{fault.words}"),
    ):
        check(Case(op, sample))


@pytest.mark.parametrize("op, fault, sample", UNSEEN)
def test_a_fault_is_seen_where_it_is(op, fault, sample):
    with planted(op + fault.entry, fault.kernel):
        check(Case(op, sample))


def unwritten(*args):
    """The last region's row left as the allocator gave it."""
    sums, mass = prototype_pool.reference(*args)
    out = torch.empty_like(sums)
    out[:, :-1] = sums[:, :-1]
    return out, mass


def random_order(*args):
    """Bits that change from run to run, well within the tolerance: an atomic sum."""
    sums, mass = prototype_pool.reference(*args)
    return sums * (1 + 1e-7 * torch.randint(0, 2, sums.shape)), mass


def test_unwritten_output():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with planted("prototype_pool", unwritten), pytest.raises(AssertionError, match="not finite"):
            check(Case("prototype_pool", "label_grid_8x"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_non_determinism():
    case = Case("prototype_pool", "label_grid_8x")
    with planted("prototype_pool", random_order):
        check(case)
        with pytest.raises(AssertionError, match="values differ"):
            assert_same_bits(*(run(case.spec, case.sample.args) for _ in range(2)), str(case))


def wrong_sign(grad):
    return -grad


def one_percent(grad):
    return grad * 1.01


def shifted(grad):
    return grad + 0.01 * grad.abs().mean()


def one_pixel_missing(grad):
    wrong = grad.clone()
    wrong[..., -1, -1] = 0
    return wrong


def rolled(grad):
    return grad.roll(1, -1)


@pytest.mark.parametrize("fault", [wrong_sign, one_percent, shifted, one_pixel_missing, rolled])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].differentiable])
def test_wrong_gradient(op, dtype, fault):
    """In the first argument's. One percent hides below bfloat16's largest rounding error; the signed bias shows it."""

    def kernel(*args):
        first, *others = reference_gradients(op, *args)
        return (tree_map_only(torch.Tensor, fault, first), *others)

    case = Case(op, case_of(op).GRADIENT_SAMPLE, dtype=dtype)
    check(case)
    with (
        planted(f"{op}_backward", kernel),
        pytest.raises(AssertionError, match=f"grad {OPS[op].differentiable[0]}"),
    ):
        check(case)
