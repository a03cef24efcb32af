"""``torch.library.opcheck``, all of its tests, on every operator and its backward: schema, fake kernel,
autograd, AOT."""

import pytest
import torch
from support import schema_args
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from pssl_ext.testing import check

pytestmark = pytest.mark.interface


@pytest.mark.cases()
def test_forward(case):
    opcheck(case.spec.op_of(case.backend), schema_args(case, requires_grad=True))


@pytest.mark.cases(differentiable=True)
def test_backward(case):
    """With every gradient wanted, then with each alone: what is not wanted must be faked as it is returned.
    (The forward's test compiles the backward too.)"""
    spec, args = case.spec, schema_args(case)
    outputs = spec.op_of(case.backend)(*args)
    op_backward = spec.op_backward_of(case.backend)
    grads = [torch.ones_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    possible = [_is_floating(args[spec.argument_names.index(name)]) for name in spec.differentiable]
    opcheck(op_backward, (*grads, *args, possible), test_utils=("test_schema", "test_faketensor"))
    for i in range(len(possible)):
        alone = [wanted and i == j for j, wanted in enumerate(possible)]
        opcheck(op_backward, (*grads, *args, alone), test_utils="test_faketensor")


@pytest.mark.cases(differentiable=True, count=1)
def test_under_a_dispatch_mode(case):
    with FlopCounterMode(display=False):
        check(case)


def _is_floating(value):
    value = value[0] if isinstance(value, list) else value
    return isinstance(value, torch.Tensor) and value.is_floating_point()
