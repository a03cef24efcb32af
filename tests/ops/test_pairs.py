"""The choice of samples, layouts and types leaves out no pair of two of them."""

import pytest
import torch
from pairs import layouts_of, pairwise
from torch.utils._pytree import tree_leaves

from pssl_ext.op import OPS
from pssl_ext.testing import LAYOUTS, samples

pytestmark = pytest.mark.interface

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("op", OPS)
def test_no_pair_is_left_out(op):
    chosen = pairwise(op, "cpu", DTYPES)
    triples = [(sample, layout, dtype) for dtype in DTYPES for sample, layout in chosen[dtype]]
    plain = samples(op, "cpu", torch.float32, "contiguous")
    apply = {s.id: layouts_of(op, "cpu", i) for i, s in enumerate(plain)}
    assert sorted(t[:2] for t in triples) == sorted((s, x) for s in apply for x in apply[s])
    for sample, layouts in apply.items():
        assert len({dtype for s, _, dtype in triples if s == sample}) == min(len(DTYPES), len(layouts))
    matrices_alone = all(
        x.ndim < 4 for s in plain for x in tree_leaves(s.args) if isinstance(x, torch.Tensor)
    )
    for layout in set(LAYOUTS) - {"contiguous"} - ({"channels_last"} if matrices_alone else set()):
        assert {dtype for _, x, dtype in triples if x == layout} == set(DTYPES), layout


def test_a_sample_of_one_pixel_has_few_layouts():
    ids = [s.id for s in samples("pixel_refine", "cpu", torch.float32, "contiguous")]
    assert layouts_of("pixel_refine", "cpu", ids.index("empty_batch")) == []
    assert "offset" in layouts_of("pixel_refine", "cpu", ids.index("one_pixel"))
    assert "transposed" not in layouts_of("pixel_refine", "cpu", ids.index("one_pixel"))
