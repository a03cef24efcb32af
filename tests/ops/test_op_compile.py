"""torch.compile in one graph: forward and gradients as in eager mode."""

import pytest
import torch

from pssl_ext.op import OPS
from pssl_ext.testing import Case, check, check_args

pytestmark = pytest.mark.interface


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.cases()
def test_one_graph(case):
    """Labels hold ignore_index in most samples, where other fused losses have been wrong under compile
    only."""
    check(case, function=torch.compile(case.spec.function, fullgraph=True, backend="aot_eager"))


@pytest.mark.cases(dtypes=(torch.bfloat16,), count=1)
def test_one_graph_in_half_precision(case):
    check(case, function=torch.compile(case.spec.function, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_dynamic_shapes(op):
    """One graph for every size of batch, grid and labels."""
    compiled = torch.compile(OPS[op].function, fullgraph=True, backend="aot_eager", dynamic=True)
    g = torch.Generator().manual_seed(3)
    for b, h, w, scale in [(2, 5, 6, 4), (3, 7, 4, 4), (4, 9, 8, 3)]:
        args = dict(
            features=torch.randn(b, 8, h, w, generator=g),
            regions=torch.randint(0, 3, (b, h * scale, w * scale), generator=g),
        )
        more = (
            dict(num_regions=3) if op == "prototype_pool" else dict(prototypes=torch.randn(3, 8, generator=g))
        )
        with torch.compiler.set_stance("default" if b == 2 else "fail_on_recompile"):
            check_args(OPS[op], {**args, **more}, "auto", f"{op} {b}x{h}x{w}", function=compiled)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_inductor(op):
    check(Case(op, "label_grid_8x"), function=torch.compile(OPS[op].function, fullgraph=True))
