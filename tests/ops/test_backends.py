"""Which backend runs, and the words when one cannot."""

import pytest
import torch

import pssl_ext
from pssl_ext import backends
from pssl_ext.registry import OPS, define_op
from pssl_ext.testing import samples


def first(op):
    return samples(op, "cpu", torch.float32, "contiguous")[0].args


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_an_explicit_choice_runs_or_says_why(op, backend):
    reason = backends.why_not(op, backend, "cpu")
    if reason is None:
        OPS[op].function(**first(op), backend=backend)
    else:
        with pytest.raises(RuntimeError) as error:
            OPS[op].function(**first(op), backend=backend)
        assert str(error.value) == f"{op}: backend '{backend}' cannot run on cpu: {reason}"


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_backend(op):
    message = f"{op}: backend must be one of auto, native, triton, reference, got 'cuda'"
    with pytest.raises(ValueError, match=message):
        OPS[op].function(**first(op), backend="cuda")


@pytest.mark.parametrize("op", OPS)
def test_explain(op):
    told = pssl_ext.explain(op)
    assert told.startswith(f"{op} on cpu: ")
    reason = backends.why_not(op, "native", "cpu")
    if reason is None:
        assert told == f"{op} on cpu: native"
    else:
        assert told.startswith(f"{op} on cpu: reference (native: {reason}; triton: ")
    assert pssl_ext.explain(op, "cuda:1").startswith(f"{op} on cuda: ")


def test_explain_of_no_operator():
    with pytest.raises(ValueError, match=r"explain: op must be one of .*prototype_pool.*, got 'conv'"):
        pssl_ext.explain("conv")


def test_the_reasons(monkeypatch):
    monkeypatch.setattr(backends, "load_error", "No module named 'pssl_ext._C'")
    reason = backends.why_not("prototype_pool", "native")
    assert reason == "pssl_ext._C could not be imported (No module named 'pssl_ext._C')"
    monkeypatch.setattr(backends, "load_error", None)
    reason = backends.why_not("prototype_pool", "native", "meta")
    assert reason == "this build of pssl_ext._C holds no meta kernel for prototype_pool"
    assert "Triton kernel for prototype_pool" in backends.why_not("prototype_pool", "triton", "cpu")
    assert backends.why_not("prototype_pool", "reference", "cpu") is None


def test_auto_on_a_device_without_kernels_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    device = torch.device("meta")
    with pytest.warns(RuntimeWarning, match="prototype_pool runs on its slow PyTorch reference on meta: "):
        backends.choose("prototype_pool", "auto", device)
    backends.choose("prototype_pool", "auto", device)  # a second warning would be an error


def empty_definition(**more):
    return dict(
        schema="(Tensor x) -> Tensor",
        reference=lambda x: x,
        fake=lambda x: x,
        samples=lambda device, dtype: iter(()),
        bytes_moved=lambda x: (0, 0),
        **more,
    )


def test_an_operator_is_defined_once():
    def prototype_pool(x):
        return x

    with pytest.raises(ValueError, match="define_op: prototype_pool is defined twice"):
        define_op(**empty_definition())(prototype_pool)


def test_a_gradient_of_no_argument():
    def misnamed(x):
        return x

    with pytest.raises(ValueError, match=r"define_op: misnamed has no argument \['y'\]; it has \('x',\)"):
        define_op(**empty_definition(differentiable=("y",)))(misnamed)
    assert "misnamed" not in OPS


@pytest.mark.parametrize("op", OPS)
def test_bytes_moved(op):
    """At least what the largest argument holds; the backward of what is differentiable also writes."""
    for sample in samples(op, "cpu", torch.float32, "contiguous"):
        args = sample.args
        forward, backward = OPS[op].bytes_moved(**args)
        largest = max(
            [t.numel() * t.element_size() for t in args.values() if isinstance(t, torch.Tensor)], default=0
        )
        assert forward >= largest
        assert backward >= forward if OPS[op].differentiable else backward == 0
