"""The tester itself: kernels with a planted fault, registered as compiled ones are, must fail it."""

import pytest
import torch
from support import planted, schema_args

from pssl_ext.op import OPS
from pssl_ext.ops import _reference, dense_crf, pixel_refine, prototype_contrast, prototype_pool, random_walk
from pssl_ext.testing import Case, assert_same_bits, check, run


def sound(spec):
    """The reference's gradients, whatever kernel is registered."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return lambda *args: spec.op_backward._op_dk(key, *args)


def wrong_resize(*args):
    """Half-pixel centres forgotten: the bilinear weights are off by part of a cell."""
    return prototype_pool.reference(*args[:6], not args[6], args[7])


def no_ignore_mask(features, regions, *rest):
    """Ignored pixels counted for region 0."""
    if regions.ndim == 3:
        regions = torch.where(regions == 255, 0, regions)
    return prototype_pool.reference(features, regions, *rest)


def half_mass(*args):
    sums, mass = prototype_pool.reference(*args)
    return sums, mass * 0.5


def unwritten(*args):
    """The last region's row left as the allocator gave it."""
    sums, mass = prototype_pool.reference(*args)
    out = torch.empty_like(sums)
    out[:, :-1] = sums[:, :-1]
    return out, mass


def half_precision_sum(features, *rest):
    sums, mass = prototype_pool.reference(features, *rest)
    return sums.bfloat16().to(sums.dtype), mass


def random_order(*args):
    """Bits that change from run to run, well within the tolerance: an atomic sum."""
    sums, mass = prototype_pool.reference(*args)
    return sums * (1 + 1e-7 * torch.randint(0, 2, sums.shape)), mass


FORWARD = [wrong_resize, no_ignore_mask, half_mass, half_precision_sum]


@pytest.mark.parametrize("kernel", FORWARD, ids=lambda k: k.__name__)
@pytest.mark.parametrize("sample", ["label_grid_8x", "label_grid_odd"])
def test_wrong_forward(kernel, sample):
    with (
        planted("prototype_pool", kernel),
        pytest.raises(AssertionError, match=f"prototype_pool-{sample}.*output"),
    ):
        check(Case("prototype_pool", sample))


def test_unwritten_output():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with planted("prototype_pool", unwritten), pytest.raises(AssertionError, match="not finite"):
            check(Case("prototype_pool", "label_grid_8x"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_non_determinism():
    case = Case("prototype_pool", "label_grid_8x")
    with planted("prototype_pool", random_order):
        check(case)
        with pytest.raises(AssertionError, match="values differ"):
            assert_same_bits(*(run(case.spec, case.sample.args) for _ in range(2)), str(case))


def wrong_sign(grads):
    return (-grads[0], *grads[1:])


def one_percent(grads):
    return (grads[0] * 1.01, *grads[1:])


def shifted(grads):
    return (grads[0] + 0.01 * grads[0].abs().mean(), *grads[1:])


def one_pixel_missing(grads):
    wrong = grads[0].clone()
    wrong[..., -1, -1] = 0
    return (wrong, *grads[1:])


def rolled(grads):
    return (grads[0].roll(1, -1), *grads[1:])


@pytest.mark.parametrize("fault", [wrong_sign, one_percent, shifted, one_pixel_missing, rolled])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_wrong_gradient(op, dtype, fault):
    """One percent hides below bfloat16's largest rounding error; the signed bias shows it."""
    backward = sound(OPS[op])
    case = Case(op, "label_grid_8x", dtype=dtype)
    check(case)
    with (
        planted(f"{op}_backward", lambda *args: fault(backward(*args))),
        pytest.raises(AssertionError, match="grad features"),
    ):
        check(case)


def test_wrong_temperature_gradient():
    backward = sound(OPS["prototype_contrast"])

    def kernel(*args):
        features, prototypes, temperature, weights = backward(*args)
        return features, prototypes, temperature * 1.001, weights

    with (
        planted("prototype_contrast_backward", kernel),
        pytest.raises(AssertionError, match="grad temperature"),
    ):
        check(Case("prototype_contrast", "tensor_temperature"))


def test_wrong_softmax():
    """The prototypes that are not valid left in the denominator."""

    def kernel(features, prototypes, regions, temperature, valid, *rest):
        return prototype_contrast.reference(features, prototypes, regions, temperature, None, *rest)

    with planted("prototype_contrast", kernel):
        check(Case("prototype_contrast", "same_grid"))
        with pytest.raises(
            AssertionError, match="prototype_contrast-invalid-auto-cpu-float32-contiguous: output 0"
        ):
            check(Case("prototype_contrast", "invalid"))


def test_one_wrong_count():
    def kernel(*args):
        counts = OPS["cam_sweep"].reference(*args)
        counts[0, 0, 0] += 1
        return counts

    with planted("cam_sweep", kernel), pytest.raises(AssertionError, match="1 of"):
        check(Case("cam_sweep", "one_image"))


@pytest.mark.parametrize("sample", ["edges", "walls"])
def test_a_walk_through_walls(sample, monkeypatch):
    """The edges between two cells left out, their ends alone counted."""
    monkeypatch.setattr(random_walk, "path", lambda dy, dx: [(0, 0), (dy, dx)])
    check_planted("random_walk", sample, random_walk, monkeypatch)


@pytest.mark.parametrize("sample", ["same_size", "defaults"])
def test_refinement_with_dark_borders(sample, monkeypatch):
    """Zeros where the borders should be replicated."""
    dark = lambda maps, offsets, outside: _reference.shifted(maps, offsets)  # noqa: E731
    monkeypatch.setattr(pixel_refine, "shifted", dark)
    check_planted("pixel_refine", sample, pixel_refine, monkeypatch)


def check_planted(op, sample, module, monkeypatch):
    """The kernel is ``module``'s reference as patched; what it is checked against is the sound one."""
    case = Case(op, sample)
    wrong = module.reference(*schema_args(case))
    monkeypatch.undo()
    with (
        planted(op, lambda *args: wrong.clone()),
        pytest.raises(AssertionError, match=f"{op}-{sample}.*output 0"),
    ):
        check(case)


def weights_forgotten(images, probabilities, iterations, g_sxy, g_compat, b_sxy, b_srgb, b_compat):
    return dense_crf.reference(images, probabilities, iterations, g_sxy, 1.0, b_sxy, b_srgb, 1.0)


def columns_for_rows(images, *rest):
    return dense_crf.reference(images.flip(-1), *rest)


def one_iteration(images, probabilities, iterations, *kernels):
    return dense_crf.reference(images, probabilities, 1, *kernels)


def grey(images, *rest):
    return dense_crf.reference(images[:, :1].expand(-1, 3, -1, -1), *rest)


@pytest.mark.parametrize("kernel", [weights_forgotten, columns_for_rows, one_iteration, grey])
def test_wrong_within_an_approximation(kernel):
    """The wider bounds of an operator whose kernels approximate still tell."""
    for sample in ("two_images", "wide"):
        with planted("dense_crf", kernel), pytest.raises(AssertionError, match="lattice may cost"):
            check(Case("dense_crf", sample))
