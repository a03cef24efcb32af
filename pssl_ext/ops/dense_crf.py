"""dense_crf: mean field of a fully-connected CRF, class probabilities refined by the image's colours."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pssl_ext import checks, dispatch
from pssl_ext.op import Approximation, Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype

OP = "dense_crf"
LOWEST = 1e-5  # probability, as pydensecrf's unary_from_softmax clips
MOST_PIXELS = 96 * 96  # of an image for the reference: in float64 its dense kernels then take 2.5 GiB


def reference(
    images: Tensor,  # [B,3,H,W]
    probabilities: Tensor,  # [B,C,H,W]
    iterations: int,
    gaussian_sxy: float,
    gaussian_compat: float,
    bilateral_sxy: float,
    bilateral_srgb: float,
    bilateral_compat: float,
) -> Tensor:  # [B,C,H,W]
    """The pairwise sums over all pairs of pixels."""
    height, width = images.shape[-2:]
    if height * width > MOST_PIXELS:
        refused = dispatch.why_no_native(OP, images.device.type)
        other = (
            "native has no such bound" if refused is None else f"native, which has no such bound: {refused}"
        )
        expected = (
            f"of at most {MOST_PIXELS} pixels where the reference runs, with its dense kernels ({other})"
        )
        checks.require(False, OP, "images", expected, images)
    dtype = accumulation_dtype(probabilities)
    logits = probabilities.to(dtype).clamp(LOWEST, 1).log().flatten(2).transpose(1, 2)  # [B,N,C]
    rows, columns = (torch.arange(n, device=images.device, dtype=dtype) for n in (height, width))
    position = torch.cartesian_prod(rows, columns).flip(1)  # [N,2], x and y
    near = gaussian_compat * _normalised_kernel(position / gaussian_sxy)  # [N,N]
    refined = []
    for image, own in zip(images.flatten(2).to(dtype), logits, strict=True):
        alike = torch.cat([position / bilateral_sxy, image.T / bilateral_srgb], 1)  # [N,5]
        pairwise = near + bilateral_compat * _normalised_kernel(alike)
        q = own.softmax(1)
        for _ in range(iterations):
            q = (own + pairwise @ q).softmax(1)
        refined.append(q.T.unflatten(1, (height, width)))
    return (
        torch.stack(refined)
        if refined
        else torch.zeros(probabilities.shape, dtype=dtype, device=images.device)
    )


def _normalised_kernel(features: Tensor) -> Tensor:  # [N,d] -> [N,N]
    """D^-½ K D^-½ of K_ij = exp(−|f_i − f_j|²/2), D its row sums, i = j among them."""
    squared = sum((f[:, None] - f[None]) ** 2 for f in features.T)
    kernel = torch.exp(-0.5 * squared)
    scale = kernel.sum(1).rsqrt()
    return scale[:, None] * kernel * scale


def _fake(a):
    return a.probabilities.new_empty(a.probabilities.shape, dtype=accumulation_dtype(a.probabilities))


def _bytes_moved(images: Tensor, probabilities: Tensor, **_) -> tuple[int, int]:
    result = accumulation_dtype(probabilities).itemsize * probabilities.numel()
    return images.numel() + probabilities.numel() * probabilities.element_size() + result, 0


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(29)

    def case(name: str, b: int, c: int, h: int, w: int, **more) -> Sample:
        """Areas of one colour with blurred edges and noise, and classes that follow them roughly."""
        areas = torch.rand(b, 3, max(h // 6, 1), max(w // 6, 1), generator=g)
        colours = (
            F.interpolate(areas, size=(h, w), mode="bilinear") if b * h * w else areas.new_zeros(b, 3, h, w)
        )
        images = (
            (40 + 160 * colours + 12 * torch.randn(b, 3, h, w, generator=g)).clamp(0, 255).to(torch.uint8)
        )
        mix = torch.randn(c, 3, generator=g, dtype=torch.float64)
        scores = torch.einsum("ck,bkhw->bchw", 4 * mix, colours.double())
        scores = scores + torch.randn(b, c, h, w, generator=g, dtype=torch.float64)
        probabilities = scores.softmax(1).to(dtype)
        return Sample(name, dict(images=images.to(device), probabilities=probabilities.to(device), **more))

    # Weak kernels leave the result between the classes, where it shows what goes wrong; the strong ones that are the
    # default make one class certain, and a pixel on the edge of two falls to either for next to nothing.
    weak = dict(gaussian=(3.0, 0.5), bilateral=(15.0, 25.0, 1.0), iterations=5)
    yield case("two_images", 2, 4, 18, 23, **weak)
    yield case("many_classes", 1, 21, 15, 14, **weak)
    yield case("wide", 1, 3, 5, 131, **weak)  # several tiles of a kernel, the last of them narrow
    yield case("tall", 1, 2, 70, 4, iterations=3, gaussian=(1.5, 0.8), bilateral=(9.0, 40.0, 0.3))
    yield case("defaults", 1, 3, 12, 17)
    yield case("position_only", 1, 3, 13, 12, gaussian=(2.0, 1.0), bilateral=(80.0, 13.0, 0.0))
    yield case("no_iteration", 1, 3, 6, 7, iterations=0)
    yield case("one_class", 1, 1, 6, 5)
    yield case("one_pixel", 2, 3, 1, 1)
    yield case("no_pixel", 1, 3, 0, 4)
    yield case("empty_batch", 0, 3, 6, 5)


@define_op(
    schema=(
        "(Tensor images, Tensor probabilities, int iterations, float gaussian_sxy, float gaussian_compat, "
        "float bilateral_sxy, float bilateral_srgb, float bilateral_compat) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    reference_bound=f"for images of at most {MOST_PIXELS} pixels",
    approximation=Approximation(largest=0.08, mean=0.0025, reason="filtering on the permutohedral lattice"),
)
def dense_crf(
    images: Tensor,  # uint8 [B,3,H,W]
    probabilities: Tensor,  # [B,C,H,W]
    *,
    iterations: int = 10,
    gaussian: tuple[float, float] = (3.0, 3.0),
    bilateral: tuple[float, float, float] = (80.0, 13.0, 10.0),
    backend: str = "auto",
) -> Tensor:  # [B,C,H,W]
    """Class probabilities refined by a fully-connected conditional random field on the image's positions and colours.

    Mean field of Krähenbühl & Koltun (NIPS 2011) with Potts compatibility. With u = −log p (p clamped to 1e-5…1) and
    Q started at softmax(−u), each iteration sets

        Q ← softmax(−u + compat_g · K̃_g Q + compat_b · K̃_b Q),   K̃ = D^-½ K D^-½,   D = the row sums of K

    with K_g(i,j) = exp(−|x_i − x_j|²/2sxy²) for ``gaussian``, positions x in pixels, and for ``bilateral``
    K_b(i,j) = exp(−|x_i − x_j|²/2sxy² − |I_i − I_j|²/2srgb²), i = j among the pairs. The names, the defaults and the
    normalisation are pydensecrf's.

    The reference sums over all pairs of pixels, and so takes small images only. The kernels filter on the permutohedral
    lattice (Adams, Baek & Davis 2010) in time linear in the pixels, as pydensecrf does, with whose labels they agree.
    That is an approximation: with weak kernels, that leave probabilities between 0 and 1, they are about 0.001 from
    the exact sums on average and 0.05 at worst; with kernels as strong as the default a pixel on the edge of two
    classes may fall to the other one (0 to 2 % of the pixels of images of a few hundred pixels).

    On CUDA images are filtered one after another, in memory for as many vertices as there could be, since their number
    is known on the device alone: about 17·C + 180 numbers of 4 bytes a pixel (C classes, both kernels, float32).

    Args:
        images: [B,3,H,W] uint8, in any order of the channels.
        probabilities: [B,C,H,W] floating, at least one class. A NaN spreads to the pixels that its kernels reach.
        iterations: of the mean field (10: DeepLab's, Chen et al. 2015); 0 gives softmax(−u).
        gaussian: (sxy, compat), standard deviation in pixels and weight; (3, 3): pydensecrf's example. A weight of 0
            leaves the kernel out.
        bilateral: (sxy, srgb, compat), standard deviations in pixels and in steps of 0..255; (80, 13, 10): the same.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B,C,H,W], float32 (float64 for float64 probabilities), summing to 1 over C. No gradient. Deterministic: the
        same bits for any number of threads.

    Raises:
        ValueError, TypeError: for shapes, types, standard deviations that are not above 0, fewer than 0 iterations;
            where the reference runs, for images of more than 9216 pixels (96×96); in the kernels, for standard
            deviations so small that the image spans 2^62 lattice points, and on CUDA for images of more than 2^31 / 6
            pixels.
    """
    checks.require_tensor(OP, "images", images)
    checks.require(images.dtype == torch.uint8, OP, "images", "uint8", images.dtype)
    checks.require(images.ndim == 4 and images.shape[1] == 3, OP, "images", "[B,3,H,W]", images)
    b, _, h, w = images.shape
    checks.require_floating(OP, "probabilities", probabilities)
    p = probabilities
    ok = p.ndim == 4 and p.shape[0] == b and p.shape[1] >= 1 and p.shape[2] == h and p.shape[3] == w
    checks.require(ok, OP, "probabilities", lambda: f"[B,C,H,W]=[{b},1 or more,{h},{w}]", p)
    checks.require_device(OP, "probabilities", p, images.device)
    checks.require(iterations >= 0, OP, "iterations", "at least 0", iterations)
    _check_kernel("gaussian", gaussian, "(sxy, compat)")
    _check_kernel("bilateral", bilateral, "(sxy, srgb, compat)")
    gaussian_sxy, gaussian_compat = map(float, gaussian)
    bilateral_sxy, bilateral_srgb, bilateral_compat = map(float, bilateral)
    return call(
        OP,
        backend,
        images=images,
        probabilities=probabilities,
        iterations=iterations,
        gaussian_sxy=gaussian_sxy,
        gaussian_compat=gaussian_compat,
        bilateral_sxy=bilateral_sxy,
        bilateral_srgb=bilateral_srgb,
        bilateral_compat=bilateral_compat,
    )


def _check_kernel(argument: str, given: tuple[float, ...], names: str) -> None:
    """Standard deviations, and last how much the kernel counts."""
    ok = isinstance(given, (tuple, list)) and len(given) == names.count(",") + 1
    ok = ok and all(map(math.isfinite, given)) and min(given[:-1]) > 0
    checks.require(ok, OP, argument, f"{names}, finite, with standard deviations greater than 0", given)
