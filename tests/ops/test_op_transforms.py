"""What transforms calls sees the dispatcher's operator, as if the public function went nowhere else."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pssl_ext import prototype_contrast
from pssl_ext.testing import leaves, run

pytestmark = pytest.mark.interface

FEATURES = torch.linspace(-1, 1, 2 * 8 * 9).reshape(2, 8, 3, 3)
PROTOTYPES = torch.linspace(1, -2, 24).reshape(3, 8).sin()
LABELS = torch.arange(72).reshape(2, 6, 6) % 3


def loss(features):
    return prototype_contrast(features, PROTOTYPES, LABELS)


def test_a_gradient_of_functorch_is_refused():
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        torch.func.grad(loss)(FEATURES)


def test_vmap_calls_one_by_one():
    """With gradients, which the dispatcher records for each."""
    both = torch.stack([FEATURES, FEATURES.flip(1)]).requires_grad_()
    losses = torch.func.vmap(loss)(both)
    expected = torch.stack([loss(x) for x in both])
    assert torch.equal(losses, expected)
    assert torch.equal(*(torch.autograd.grad(x.sum(), both)[0] for x in (losses, expected)))


def test_a_graph_holds_the_operators(monkeypatch):
    """Also where values are looked at before a call, which those of a graph have none of."""
    monkeypatch.setenv("PSSL_DEBUG", "1")
    graph = make_fx(lambda x: torch.autograd.grad(loss(x), x)[0])(FEATURES.clone().requires_grad_()).graph
    called = [str(node.target) for node in graph.nodes if "pssl" in str(node.target)]
    assert called == ["pssl.prototype_contrast.default", "pssl.prototype_contrast_backward.default"]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fake_tensors_have_no_values_to_look_at(backend, monkeypatch):
    monkeypatch.setenv("PSSL_DEBUG", "1")
    with FakeTensorMode():
        features = torch.empty(2, 8, 3, 3).requires_grad_()
        labels = torch.empty(2, 6, 6, dtype=torch.int64)
        found = prototype_contrast(features, torch.empty(3, 8), labels, backend=backend)
        found.backward()
    assert found.shape == () and features.grad.shape == (2, 8, 3, 3)


def test_a_trace_holds_the_operator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says what it made constants of
        graph = torch.jit.trace(loss, (FEATURES.clone().requires_grad_(),), check_trace=False).graph
    assert "pssl::prototype_contrast" in str(graph)


@pytest.mark.cases(differentiable=True, count=1)
def test_the_dispatcher_records_the_same(case, monkeypatch):
    """Called by its name in ``torch.ops``, where the public function goes to the kernel directly."""
    args = case.sample.args
    assert leaves(case.spec, args)
    direct = run(case.spec, args, case.backend).named()
    monkeypatch.setattr(torch._C, "_is_tracing", lambda: True)  # sends it to the dispatcher
    dispatched = run(case.spec, args, case.backend).named()
    for name, tensor in direct.items():
        assert torch.equal(tensor, dispatched[name]), f"{case}: {name}"


def test_a_second_derivative_is_refused():
    x = FEATURES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"), pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)
