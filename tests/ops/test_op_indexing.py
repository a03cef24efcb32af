"""Elements more than 2³¹ apart: strides that no 32-bit index reaches, in memory of which only
the pages that hold one are ever there."""

import mmap

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pssl_ext.testing import run

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python before 3.13 lacks the name
FAR = 2**31 + 8  # elements; cut to 32 bits, it is 8


def stretched(x: Tensor, dim: int) -> Tensor:
    """``x`` with ``FAR`` elements between neighbours along ``dim``; ``x`` itself where it has no two there."""
    if x.ndim <= dim or x.shape[dim] < 2 or not x.numel():
        return x
    strides = list(x.contiguous().stride())
    strides[dim] = FAR
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    pages = mmap.mmap(-1, size * x.element_size(), flags=flags)
    return torch.frombuffer(pages, dtype=x.dtype, count=size).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.cases(each=lambda case: case.device == "cpu")
def test_far_apart(case, dim):
    """The same as from dense arguments, up to the order of sums."""
    args = case.sample.args
    far = tree_map_only(Tensor, lambda x: stretched(x, dim), args)
    if not any(new is not x for new, x in zip(_tensors(far), _tensors(args), strict=True)):
        return  # nothing in this sample has two elements there
    got, expected = run(case.spec, far, case.backend).named(), run(case.spec, args, case.backend).named()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{case}: {name}")


def test_stretched_is_far():
    x = torch.arange(6.0).view(2, 3)
    far = stretched(x, 0)
    assert far.stride() == (FAR, 1) and far[1].data_ptr() - far[0].data_ptr() == FAR * x.element_size()
    assert torch.equal(far, x) and stretched(x[:1], 0).data_ptr() == x.data_ptr()


def _tensors(args: dict) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
