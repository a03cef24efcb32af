"""Same inputs, same bits: on a second run, and for another number of threads."""

import pytest
import torch

from pssl_ext.testing import assert_same_bits, run


@pytest.mark.cases(dtypes=(torch.float32, torch.bfloat16))
def test_twice(case):
    first, second = (run(case.spec, case.sample.args, case.backend) for _ in range(2))
    assert_same_bits(first, second, str(case))


@pytest.mark.cases(each=lambda case: case.backend != "auto" and case.device == "cpu")
def test_any_number_of_threads(case):
    """Ours alone: PyTorch's own matrix product, which the composite kernel is made of, promises no such
    thing."""
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(case.spec, case.sample.args, case.backend))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[0], found[1], f"{case} 1 and 2 threads")
    assert_same_bits(found[0], found[2], f"{case} 1 and 3 threads")
