"""dense_crf's own: bad calls, the size of training, planted faults; the reference against a loop over pairs, the
kernels against the lattice, and against pydensecrf.

The generic tests compare kernels with the exact sums, which they approximate; here they are held to what they compute.
"""

import lattice
import numpy as np
import oracle
import pytest
import torch
from peers import crf as crf_peer
from problems import smooth_areas
from small_inputs import FEATURES, FLOATS, LABELS, META
from support import Fault
from torch.nn import functional as F

from pssl_ext import dense_crf, dispatch
from pssl_ext import nn as pssl_nn
from pssl_ext.op import OPS
from pssl_ext.ops.dense_crf import MOST_PIXELS, reference
from pssl_ext.testing import DTYPES, LAYOUTS, samples

SHAPE = "[B,C,H,W]=[2,1 or more,4,5]"
FINITE = "finite, with standard deviations greater than 0"

SOUND = dict(images=torch.zeros(2, 3, 4, 5, dtype=torch.uint8), probabilities=torch.ones(2, 3, 4, 5))

BAD_CALLS = [
    (dict(images=None), "images must be a tensor, got NoneType"),
    (dict(images=torch.zeros(2, 3, 4, 5)), "images must be uint8, got torch.float32"),
    (dict(images=SOUND["images"][0]), "images must be [B,3,H,W], got [3, 4, 5] torch.uint8 on cpu"),
    (dict(images=SOUND["images"][:, :2]), "images must be [B,3,H,W], got [2, 2, 4, 5] torch.uint8 on cpu"),
    (dict(probabilities=LABELS), f"probabilities must be {FLOATS}, got torch.int64"),
    (
        dict(probabilities=FEATURES[0]),
        f"probabilities must be {SHAPE}, got [4, 3, 3] torch.float32 on cpu",
    ),
    (
        dict(probabilities=torch.zeros(2, 0, 4, 5)),
        f"probabilities must be {SHAPE}, got [2, 0, 4, 5] torch.float32 on cpu",
    ),
    (
        dict(probabilities=torch.zeros(2, 3, 5, 4)),
        f"probabilities must be {SHAPE}, got [2, 3, 5, 4] torch.float32 on cpu",
    ),
    (
        dict(probabilities=SOUND["probabilities"].to(META)),
        "probabilities must be on cpu as the first argument, got [2, 3, 4, 5] torch.float32 on meta",
    ),
    (dict(iterations=-1), "iterations must be at least 0, got -1"),
    (dict(gaussian=3), f"gaussian must be (sxy, compat), {FINITE}, got 3"),
    (dict(gaussian=(0, 3)), f"gaussian must be (sxy, compat), {FINITE}, got (0, 3)"),
    (dict(bilateral=(80, 10)), f"bilateral must be (sxy, srgb, compat), {FINITE}, got (80, 10)"),
    (
        dict(bilateral=(80, 13, float("nan"))),
        f"bilateral must be (sxy, srgb, compat), {FINITE}, got (80, 13, nan)",
    ),
]

MODULE = pssl_nn.DenseCrf


def training_size(g):
    """Kernels that leave the result between the classes, where a pixel does not fall to either for next to nothing."""
    image = 255 * smooth_areas(g, 3, 375, 500) + 8 * torch.randn(3, 375, 500, generator=g)
    scores = 6 * smooth_areas(g, 21, 375, 500) + torch.randn(21, 375, 500, generator=g)
    weak = dict(gaussian=(3.0, 0.6), bilateral=(25.0, 20.0, 1.2), iterations=5)
    return dict(
        images=image.clamp(0, 255).to(torch.uint8)[None], probabilities=scores.softmax(0)[None], **weak
    )


def weights_forgotten(images, probabilities, iterations, g_sxy, g_compat, b_sxy, b_srgb, b_compat):
    return reference(images, probabilities, iterations, g_sxy, 1.0, b_sxy, b_srgb, 1.0)


def columns_for_rows(images, *rest):
    return reference(images.flip(-1), *rest)


def one_iteration(images, probabilities, iterations, *kernels):
    return reference(images, probabilities, 1, *kernels)


def grey(images, *rest):
    return reference(images[:, :1].expand(-1, 3, -1, -1), *rest)


# the wider bounds of an operator whose kernels approximate still tell
FAULTS = [
    Fault(kernel, ("two_images", "wide"), "lattice may cost")
    for kernel in (weights_forgotten, columns_for_rows, one_iteration, grey)
]
GRADIENT_SAMPLE = None


IDS = [s.id for s in samples("dense_crf", "cpu", torch.float32, "contiguous")]
native = pytest.mark.skipif(
    dispatch.why_not(OPS["dense_crf"], "native") is not None,
    reason=str(dispatch.why_not(OPS["dense_crf"], "native")),
)


def scene(b, c, h, w, seed=5):
    """Images with areas and noise, and probabilities of c classes that follow the areas."""
    g = torch.Generator().manual_seed(seed)
    areas = F.interpolate(
        torch.rand(b, 3, h // 16 + 1, w // 16 + 1, generator=g), size=(h, w), mode="bilinear"
    )
    images = (255 * areas + 8 * torch.randn(b, 3, h, w, generator=g)).clamp(0, 255).to(torch.uint8)
    scores = torch.einsum("ck,bkhw->bchw", 4 * torch.randn(c, 3, generator=g), areas)
    return images, (scores + torch.randn(b, c, h, w, generator=g)).softmax(1)


def test_the_reference_is_the_sum_over_pairs():
    images, probabilities = scene(2, 3, 4, 3)
    settings = dict(iterations=3, gaussian=(1.5, 0.7), bilateral=(4.0, 60.0, 1.3))
    found = dense_crf(images, probabilities.double(), **settings, backend="reference")
    expected = oracle.crf(images.numpy(), probabilities.double().numpy(), **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_the_lattice_is_near_to_the_sum_over_pairs():
    """So that neither is near to something else: with exact weights the two differ by a few percent of a message."""
    points = np.random.default_rng(3).uniform(0, 4, (300, 2))
    exact = np.exp(-0.5 * ((points[:, None] - points[None]) ** 2).sum(-1))
    scale = 1 / np.sqrt(exact.sum(1))
    values = np.random.default_rng(4).uniform(size=(300, 2))
    found = lattice.Lattice(points)(values)
    assert np.abs(found - scale[:, None] * exact @ (scale[:, None] * values)).mean() < 0.02


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample_id", IDS)
def test_the_kernel_filters_on_the_lattice(sample_id, dtype):
    args = next(s for s in samples("dense_crf", "cpu", dtype, "contiguous") if s.id == sample_id).args
    check_lattice(**args)


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("c, h, w", [(2, 130, 71), (17, 65, 64), (33, 64, 65), (90, 20, 67), (150, 6, 7)])
def test_several_tiles(c, h, w, dtype):
    """More pixels than a tile, more classes than the vectors a kernel keeps in registers."""
    images, probabilities = scene(1, c, h, w)
    check_lattice(
        images, probabilities.to(dtype), gaussian=(3.0, 0.6), bilateral=(25.0, 20.0, 1.2), iterations=4
    )


def check_lattice(images, probabilities, **settings):
    found = dense_crf(images, probabilities, **settings, backend="native").double()
    expected = lattice.mean_field(images.numpy(), probabilities.double().numpy(), **settings)
    # each iteration carries an error on; float32 ends some ten roundings away
    tolerance = 1e-11 if probabilities.dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


@native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_bits(layout):
    images, probabilities = scene(1, 5, 20, 30)
    lay_out = LAYOUTS[layout]
    plain = dense_crf(images, probabilities, iterations=3)
    assert torch.equal(dense_crf(lay_out(images), lay_out(probabilities), iterations=3), plain)


@native
def test_every_number_of_threads_has_the_same_bits():
    """With enough tiles, vertices and chains that several threads have work at every step."""
    images, probabilities = scene(1, 4, 200, 150)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(dense_crf(images, probabilities, iterations=3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_images_do_not_see_each_other():
    images, probabilities = scene(3, 4, 9, 11)
    together = dense_crf(images, probabilities)
    for n in range(3):
        torch.testing.assert_close(
            dense_crf(images[n : n + 1], probabilities[n : n + 1])[0], together[n], rtol=1e-5, atol=1e-6
        )


def test_a_kernel_of_no_weight_is_no_kernel():
    images, probabilities = scene(1, 4, 9, 11)
    alone = dense_crf(images, probabilities, gaussian=(3, 0), bilateral=(80, 13, 0))
    torch.testing.assert_close(alone, probabilities / probabilities.sum(1, keepdim=True))
    other = torch.full_like(images, 7)
    blind = dict(bilateral=(80, 13, 0))
    assert torch.equal(dense_crf(images, probabilities, **blind), dense_crf(other, probabilities, **blind))


def test_probabilities_are_clamped():
    images, _ = scene(1, 3, 2, 2)
    probabilities = torch.tensor([2.0, 1e-9, -1.0])[None, :, None, None].expand(1, 3, 2, 2)
    found = dense_crf(images, probabilities, iterations=0)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([1.0, 1e-5, 1e-5]) / (1 + 2e-5))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strong_kernels_stay_finite(dtype):
    images, probabilities = scene(1, 3, 20, 20)
    found = dense_crf(images, probabilities.to(dtype), gaussian=(3, 1e6), bilateral=(80, 13, 1e6))
    assert bool(found.isfinite().all()) and bool(((found.sum(1) - 1).abs() < 1e-6).all())


@native
def test_more_lattice_points_than_a_key_can_tell_apart():
    images, probabilities = scene(1, 2, 8, 9)
    message = r"dense_crf: bilateral must be standard deviations .* less than 2\^62 .*, got smaller ones"
    for deviation in (1e-6, 1e-320):
        with pytest.raises((ValueError, RuntimeError), match=message):
            dense_crf(images, probabilities, bilateral=(80.0, deviation, 1.0))


def test_the_reference_refuses_large_images(monkeypatch):
    images, probabilities = torch.zeros(1, 3, 97, 96, dtype=torch.uint8), torch.zeros(1, 2, 97, 96)
    words = f"dense_crf: images must be of at most {MOST_PIXELS} pixels where the reference runs"
    got = r"got \[1, 3, 97, 96\] torch.uint8 on cpu"
    if dispatch.why_not(OPS["dense_crf"], "native") is None:
        with pytest.raises(ValueError, match=rf"{words}.* \(native has no such bound\), {got}"):
            dense_crf(images, probabilities, backend="reference")
    monkeypatch.setattr(dispatch, "load_error", "No module named 'pssl_ext._C'")
    with pytest.raises(
        ValueError, match=rf"{words}.*native, which has no such bound: pssl_ext._C could not.*{got}"
    ):
        reference(images, probabilities, 1, 3.0, 3.0, 80.0, 13.0, 10.0)
    told = dispatch.explain(OPS["dense_crf"])
    assert told.startswith("dense_crf on cpu: reference (native: ")
    assert told.endswith(f"), for images of at most {MOST_PIXELS} pixels")


# -- pydensecrf ------------------------------------------------------------------------------------------------


@native
@pytest.mark.skipif(crf_peer.why_not() is not None, reason=f"the peer: {crf_peer.why_not()}")
@pytest.mark.parametrize("number", range(4))
def test_labels_agree_with_pydensecrf_on_photographs(photographs, number):
    """All 21 classes, and those of the image alone, from ground truth that was blurred and disturbed."""
    images, classes = crf_peer.photograph(photographs, number)
    every = crf_peer.disturbed(classes, 21, seed=number)
    few = sorted({0, 1, *classes.unique().tolist()})
    alone = every[:, few] / every[:, few].sum(1, keepdim=True)
    for probabilities in (every, alone):
        found, expected = dense_crf(images, probabilities), crf_peer.crf(images, probabilities)
        assert crf_peer.labels_agree(found, probabilities) < 0.99, "nothing to agree about"
        agreement = crf_peer.labels_agree(found, expected)
        assert agreement >= crf_peer.LEAST_AGREEMENT, f"{100 * agreement:.2f} % of the labels agree"
        assert float((found - expected).abs().mean()) < 1e-3
