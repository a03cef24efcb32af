"""Gradients against finite differences in float64."""

import pytest
import torch

from pssl_ext.testing import leaves


@pytest.mark.cases(dtypes=(torch.float64,), differentiable=True, each=lambda case: not _stops_gradient(case))
def test_gradcheck(case):
    """Every element for few inputs, random directions for many. The samples are random, so none lies on a
    kink of |·| or relu; gradcheck leaves gradients that are zero by definition (all ignored) to agree with a
    constant."""
    spec, args = case.spec, case.sample.args
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves(spec, args).items()}
    names = list(inputs)

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        replaced = {
            name: [given.get(f"{name}[{i}]", v) for i, v in enumerate(value)]
            if isinstance(value, (list, tuple))
            else given.get(name, value)
            for name, value in args.items()
        }
        return spec.function(**replaced, backend=case.backend)

    few = sum(t.numel() for t in inputs.values()) <= 100
    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=not few)


def _stops_gradient(case):
    """cam_compare's attention is a constant by definition, so its gradient is no derivative of its loss; the
    literal loop of test_oracle_cams.py checks it with the attention held."""
    return case.op == "cam_compare" and case.sample.args.get("attention", "cosine") == "cosine"
