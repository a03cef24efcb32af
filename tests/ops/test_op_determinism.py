"""Same inputs, same bits: on a second run, for another number of threads, and in another batch."""

import pytest
import torch

from pssl_ext import prototype_pool
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


@pytest.mark.parametrize("height, width", [(128, 128), (127, 131)])
def test_a_gradient_larger_than_the_caches(height, width):
    """16 MiB and more the CPU writes past the caches, where rows are whole vectors; single images it does not."""
    g = torch.Generator().manual_seed(3)
    features = torch.randn(4, 66, height, width, generator=g)
    regions = torch.randint(0, 5, (4, height, width), generator=g)
    seeds = torch.randn(4, 5, 66, generator=g)

    def gradient(images):
        leaf = features[images].clone().requires_grad_()
        (prototype_pool(leaf, regions[images], 5)[0] * seeds[images]).sum().backward()
        return leaf.grad

    whole = gradient(slice(0, 4))
    assert whole.numel() * 4 >= 16 * 2**20
    for i in range(4):
        assert torch.equal(whole[i : i + 1], gradient(slice(i, i + 1)))
