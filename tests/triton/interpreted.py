"""What run.py runs beside the operators' tests: faults planted in Triton kernels, which these tests
must see, and what kernels for GPUs do otherwise than those on the CPU. Not collected by itself: it needs the
interpreter.
"""

from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from test_cuda_kernels import arguments, labels
from triton.runtime.errors import InterpreterError

from pssl_ext.op import OPS
from pssl_ext.testing import Case, assert_same_bits, check, check_args, run
from pssl_ext.triton import cam_compare, cells, pixels
from pssl_ext.triton.arithmetic import dot


@triton.jit
def no_mask(cells, live, d, D, sd):
    """Reads the channels behind the last one."""
    return tl.load(cells[:, None] + d.to(tl.int64)[None, :] * sd, mask=live[:, None], other=0.0)


@triton.jit
def one_term(a, b, sum):
    """Products of bfloat16's accuracy."""
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sum)


@triton.jit
def all_count(regions, b, y, x, live, ignore_index, C):
    """Ignored pixels counted for region 0."""
    found = pixels.load_pixels(regions, b, y, x, live, 0).to(tl.int64)
    return tl.where(found == ignore_index, 0, found), live


@triton.jit
def no_half_pixel(out, n, size, ALIGN: tl.constexpr):
    return out.to(tl.int64) * n, size


FAULTS = {
    "no_mask": ([(cells, "channels"), (pixels, "channels")], no_mask, "out of bounds"),
    "one_term": ([(cells, "dot"), (pixels, "dot")], one_term, "error .* is above the allowed"),
    "all_count": ([("op", "load_labels")], all_count, "error .* is above the allowed"),
}


@pytest.mark.parametrize(
    "sample, fault",
    [
        *(("same_grid", fault) for fault in FAULTS),
        ("smaller_labels", "no_mask"),  # none of its 24 pixels is ignored in one of the operators
        ("smaller_labels", "one_term"),
    ],
)
@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_a_fault_is_seen(op, sample, fault, monkeypatch):
    case = Case(op, sample, "triton")
    places, kernel, words = FAULTS[fault]
    for module, name in places:
        monkeypatch.setattr(
            import_module(f"pssl_ext.triton.{op}") if module == "op" else module, name, kernel
        )
    with pytest.raises((AssertionError, InterpreterError), match=words):
        check(case)


@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_half_a_pixel_off_is_seen(op, monkeypatch):
    monkeypatch.setattr(pixels, "axis_source", no_half_pixel)
    with pytest.raises(AssertionError, match="is above the allowed"):
        check(Case(op, "smaller_labels", "triton"))


@triton.jit
def no_relu(map, size, b, k, y, x, live, H, W):
    data, sb, sk, sy, sx = map
    return tl.load(data + b * sb + k * sk + y.to(tl.int64) * sy + x.to(tl.int64) * sx, mask=live, other=0.0)


def test_maps_without_relu_are_seen(monkeypatch):
    monkeypatch.setattr(cam_compare, "resized", no_relu)
    with pytest.raises(AssertionError, match="is above the allowed"):
        check(Case("cam_compare", "sum", "triton"))


def test_nan_in_an_absent_class():
    g = torch.Generator().manual_seed(1)
    cams = torch.randn(1, 3, 4, 4, generator=g)
    found = []
    for value in (float("nan"), 1.0):
        cams[:, 1] = value
        args = dict(
            main=[cams.clone()], support=[cams.flip(-1)], image_labels=torch.tensor([[True, False, True]])
        )
        found.append(run(OPS["cam_compare"], dict(args, size=(6, 6)), "triton"))
    assert_same_bits(*found, "cam_compare")


def test_as_many_maps_as_a_tile_takes():
    g = torch.Generator().manual_seed(11)
    maps = [torch.randn(1, 2, 2, 2 + i % 3, generator=g) for i in range(17)]
    more = dict(image_labels=torch.ones(1, 2), size=(3, 4))
    check_args(
        OPS["cam_compare"], dict(main=maps[:3], support=maps[3:16], **more), "triton", "cam_compare, 16 maps"
    )
    with pytest.raises(RuntimeError, match="Triton kernels take at most 16 maps, got 17"):
        run(OPS["cam_compare"], dict(main=maps[:3], support=maps[3:], **more), "triton")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_a_label_out_of_range_is_ignored(op, dtype):
    """As on CUDA: no result may wait for the device."""
    found = []
    for regions in labels(dtype, "cpu"):
        args = arguments(op, regions)
        features = args["features"].requires_grad_()
        if op == "prototype_pool":
            outputs = OPS[op].op_of("triton")(features, regions, 3, None, True, 127, False, 1e-12)
        else:
            temperature = torch.tensor(0.5)
            outputs = OPS[op].op_of("triton")(
                features, args["prototypes"], regions, temperature, None, None, 127, False, 1e-12
            )
        (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs), features)
        found.append([*(o.detach() for o in outputs), grad])
    for sound, bad in zip(*found, strict=True):
        assert torch.equal(sound, bad)


@pytest.mark.parametrize("types", [(a, b) for a in "hbf" for b in "hbf"], ids="".join)
def test_products_are_float32s(types):
    """Any two types: as near to the truth as the float32 product of the same numbers."""

    @triton.jit
    def kernel(a, b, out, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        tl.store(out + at, dot(tl.load(a + at), tl.load(b + at), tl.zeros((N, N), tl.float32)))

    g = torch.Generator().manual_seed(1)
    kinds = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32}
    a, b = (torch.randn(32, 32, generator=g).to(kinds[kind]) for kind in types)
    out = torch.empty(32, 32)
    kernel[(1,)](a, b, out, N=32)
    true = a.double() @ b.double()
    error, own = (out - true).abs().max(), (a.float() @ b.float() - true).abs().max()
    assert error <= 2 * own + 1e-6, f"{float(error):.3g} against {float(own):.3g}"


def test_more_classes_than_a_tile(monkeypatch):
    """The largest tile, whose features' gradient has a kernel of its own; and one region more, which is refused."""
    g = torch.Generator().manual_seed(4)
    args = dict(
        features=torch.randn(1, 6, 3, 3, generator=g), regions=torch.randint(0, 130, (1, 3, 3), generator=g)
    )
    args["prototypes"] = torch.randn(171, 6, generator=g)
    spec = OPS["prototype_contrast"]
    found, expected = run(spec, args, "triton").named(), run(spec, args, "reference").named()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    args["prototypes"] = torch.randn(257, 6, generator=g)
    with pytest.raises(RuntimeError, match="Triton kernels take at most 256 regions, got 257"):
        run(spec, args, "triton")


def test_twice_with_a_gradient_for_everything():
    case = Case("prototype_contrast", "smaller_labels", "triton")
    first, second = (run(case.spec, case.sample.args, "triton") for _ in range(2))
    assert_same_bits(first, second, str(case))
