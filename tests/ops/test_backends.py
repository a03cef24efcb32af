"""Which backend runs, and the words when one cannot."""

import pytest
import torch

import pssl_ext
from pssl_ext import dispatch
from pssl_ext.op import OPS, define_op
from pssl_ext.testing import samples

pytestmark = pytest.mark.interface


def first(op):
    return samples(op, "cpu", torch.float32, "contiguous")[0].args


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_an_explicit_choice_runs_or_says_why(op, backend):
    reason = dispatch.why_not(OPS[op], backend, "cpu")
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
    reason = dispatch.why_not(OPS[op], "native", "cpu")
    if reason is None:
        assert told == f"{op} on cpu: native"
    else:
        assert told.startswith(f"{op} on cpu: reference (native: {reason}; triton: ")
    assert pssl_ext.explain(op, "cuda:1").startswith(f"{op} on cuda: ")


def test_explain_of_no_operator():
    with pytest.raises(ValueError, match=r"explain: op must be one of .*prototype_pool.*, got 'conv'"):
        pssl_ext.explain("conv")


def test_the_reasons(monkeypatch):
    monkeypatch.setattr(dispatch, "load_error", "No module named 'pssl_ext._C'")
    reason = dispatch.why_not(OPS["prototype_pool"], "native")
    assert reason == "pssl_ext._C could not be imported (No module named 'pssl_ext._C')"
    monkeypatch.setattr(dispatch, "load_error", None)
    reason = dispatch.why_not(OPS["prototype_pool"], "native", "meta")
    assert reason == "this build of pssl_ext._C holds no meta kernel for prototype_pool"
    assert dispatch.why_not(OPS["prototype_pool"], "reference", "cpu") is None


def test_the_reasons_of_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_tools", set())  # what was found, and what this test pretends
    assert (
        dispatch.why_not(OPS["cam_sweep"], "triton", "cuda")
        == "this version holds no Triton kernel for cam_sweep"
    )
    assert "Triton kernels run on CUDA devices" in dispatch.why_not(OPS["prototype_pool"], "triton", "cpu")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.why_not(OPS["prototype_pool"], "triton", "cuda") == "triton is not installed"
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)
    assert "neither CC, gcc nor clang" in dispatch.why_not(OPS["prototype_pool"], "triton", "cuda")
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert dispatch.why_not(OPS["prototype_pool"], "triton", "cuda") is None
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: pytest.fail("looked for again"))
    assert dispatch.why_not(OPS["prototype_pool"], "triton", "cuda") is None


@pytest.fixture
def triton_there(monkeypatch):
    """As on a machine with a GPU and Triton, without CUDA kernels."""
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda device_type: None)
    monkeypatch.setattr(dispatch, "has_kernel", lambda op, device_type: device_type == "cpu")
    monkeypatch.setattr(dispatch, "load_error", None)
    monkeypatch.setattr(dispatch, "_warned", set())


def test_auto_takes_triton_where_no_cuda_was_compiled(triton_there, monkeypatch):
    """And the reference, with a warning, for what Triton's kernels do not take."""
    cuda = torch.device("cuda")

    def choose(dtype, regions):
        args = OPS["prototype_pool"].arguments(
            torch.zeros(1, 2, 3, 3, dtype=dtype), None, regions, *[None] * 5
        )
        return dispatch.choose(OPS["prototype_pool"], "auto", cuda, args)

    reason = "native: this build of pssl_ext._C holds no cuda kernel for prototype_pool"
    assert pssl_ext.explain("prototype_pool", cuda) == f"prototype_pool on cuda: triton ({reason})"
    assert choose(torch.float32, 256) == "triton"
    with pytest.warns(
        RuntimeWarning, match="triton: Triton kernels accumulate in float32, and an argument is float64"
    ):
        assert choose(torch.float64, 3) == "dispatcher"
    dispatch._warned.clear()
    with pytest.warns(RuntimeWarning, match="triton: Triton kernels take at most 256 regions, got 257"):
        assert choose(torch.float32, 257) == "dispatcher"
    monkeypatch.setattr(dispatch, "has_kernel", lambda op, device_type: True)
    assert choose(torch.float32, 3) == "dispatcher"
    assert pssl_ext.explain("prototype_pool", cuda) == "prototype_pool on cuda: native"


def test_triton_on_the_cpu_is_for_who_asks(triton_there, monkeypatch):
    monkeypatch.setattr(dispatch, "has_kernel", lambda op, device_type: False)
    assert dispatch.choose(OPS["prototype_pool"], "auto", torch.device("cpu")) == "dispatcher"
    assert dispatch.choose(OPS["prototype_pool"], "triton", torch.device("cpu")) == "triton"
    assert "triton: runs on cpu only when asked for" in pssl_ext.explain("prototype_pool", "cpu")


def test_auto_on_a_device_without_kernels_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    device = torch.device("meta")
    with pytest.warns(RuntimeWarning, match="prototype_pool runs on its slow PyTorch reference on meta: "):
        dispatch.choose(OPS["prototype_pool"], "auto", device)
    dispatch.choose(OPS["prototype_pool"], "auto", device)  # a second warning would be an error


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
