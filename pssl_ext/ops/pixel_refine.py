"""pixel_refine: masks smoothed along the colours of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pssl_ext import checks
from pssl_ext.op import Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype, resize, shifted

OP = "pixel_refine"
EPS = 1e-8  # added to standard deviations, as PAR does


def reference(
    images: Tensor,  # [B,3,H,W]
    masks: Tensor,  # [B,k,h,w]
    dilations: list[int],
    iterations: int,
    colour_scale: float,
    position_weight: float,
) -> Tensor:  # [B,k,H,W]
    """Shifted slices of replicated maps; the neighbours of the masks are never stored together."""
    dtype = accumulation_dtype(images, masks)
    images, masks = images.to(dtype).contiguous(), masks.to(dtype).contiguous()
    masks = resize(masks, tuple(images.shape[-2:]), align_corners=True)
    if masks.numel() == 0:
        return torch.empty_like(masks)
    offsets = neighbours(dilations)
    colours = torch.stack(shifted(images, offsets, "replicate"), 2)  # [B,3,N,H,W]
    spread = colours.std(2, keepdim=True) + EPS
    colour = -((colours - images[:, :, None]) / spread / colour_scale).square().mean(1)  # [B,N,H,W]
    position = position_affinity(offsets, colour_scale).to(colour)[:, None, None]
    affinity = colour.softmax(1) + position_weight * position
    for _ in range(iterations):
        pairs = zip(affinity.unbind(1), shifted(masks, offsets, "replicate"), strict=True)
        masks = sum(a[:, None] * m for a, m in pairs)
    return masks.contiguous()


def neighbours(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """The 8 neighbours at each dilation."""
    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    return [(y * d, x * d) for d in dilations for y, x in steps]


def position_affinity(offsets: list[tuple[int, int]], scale: float) -> Tensor:  # [N]
    r = torch.tensor(offsets, dtype=torch.float64).norm(dim=1)
    return (-((r / (r.std() + EPS) / scale) ** 2)).softmax(0)


def _fake(a):
    b, _, h, w = a.images.shape
    return a.images.new_empty(b, a.masks.shape[1], h, w, dtype=accumulation_dtype(a.images, a.masks))


def _bytes_moved(images: Tensor, masks: Tensor, **_) -> tuple[int, int]:
    b, _, h, w = images.shape
    result = b * masks.shape[1] * h * w * accumulation_dtype(images, masks).itemsize
    return sum(t.numel() * t.element_size() for t in (images, masks)) + result, 0


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(31)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype).to(device)

    few = dict(dilations=(1, 2, 4), iterations=3)
    yield Sample("same_size", dict(images=rand(2, 3, 13, 11), masks=rand(2, 3, 13, 11), **few))
    yield Sample("defaults", dict(images=255 * rand(1, 3, 20, 26), masks=rand(1, 2, 20, 26)))
    up = dict(dilations=(1, 3), iterations=2, colour_scale=0.5, position_weight=0.1)
    yield Sample("resized", dict(images=rand(2, 3, 17, 19), masks=rand(2, 4, 5, 6), **up))
    wide = dict(dilations=(2, 1), iterations=2)
    yield Sample("several_vectors", dict(images=rand(1, 3, 7, 300), masks=rand(1, 6, 7, 150), **wide))
    yield Sample("row", dict(images=rand(1, 3, 1, 33), masks=rand(1, 1, 1, 33), **few))
    yield Sample("column", dict(images=rand(1, 3, 21, 1), masks=rand(1, 5, 11, 3), **few))
    flat = torch.full_like(rand(1, 3, 6, 6), 0.1)  # no spread at all
    yield Sample("one_colour", dict(images=flat, masks=rand(1, 2, 6, 6), **few))
    yield Sample("one_pixel", dict(images=rand(1, 3, 1, 1), masks=rand(1, 2, 1, 1), iterations=1))
    yield Sample("no_class", dict(images=rand(1, 3, 4, 5), masks=rand(1, 0, 4, 5)))
    yield Sample("empty_batch", dict(images=rand(0, 3, 4, 5), masks=rand(0, 2, 2, 3)))


@define_op(
    schema=(
        "(Tensor images, Tensor masks, int[] dilations, int iterations, float colour_scale, "
        "float position_weight) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
)
def pixel_refine(
    images: Tensor,  # [B,3,H,W]
    masks: Tensor,  # [B,k,h,w]
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    colour_scale: float = 0.3,
    position_weight: float = 0.01,
    backend: str = "auto",
) -> Tensor:  # [B,k,H,W]
    """Pixel-adaptive refinement (PAR; Ru et al., AFA 2022, and ToCo 2023): masks follow the colours of the image.

    Every iteration replaces a mask value by Σ_n a_n m_n over the N = 8·|dilations| neighbours, one in each of the 8
    directions at each dilation, borders replicated. With I the pixel's colour, I_n and r_n neighbour n's colour and
    distance, and standard deviations over the N neighbours (unbiased),

        a_n = softmax_n(−mean over channels of (|I_n − I| / (std(I_n) + 1e-8) / colour_scale)²)
              + position_weight · softmax_n(−(r_n / (std(r) + 1e-8) / colour_scale)²)

    so that an iteration multiplies constant masks by 1 + position_weight, as PAR does. The masks are first resized to
    the images bilinearly with ``align_corners=True``. PAR stores all N neighbours of all masks in every iteration; this
    stores the affinities alone, N·H·W numbers.

    Args:
        images: [B,3,H,W], floating, on any scale (a factor or an offset changes nothing but what 1e-8 does), of any
            size from 1×1, also smaller than the dilations.
        masks: [B,k,h,w], floating: class scores.
        dilations: distances of the neighbours in pixels, ≥ 1 (PAR's in AFA).
        iterations: ≥ 1 (10: AFA's; ToCo's too).
        colour_scale: > 0 (0.3: PAR's w1).
        position_weight: share of the position term (0.01: PAR's w2).
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B,k,H,W] in float32, float64 if any input is. No gradient. Deterministic, whatever the number of threads. NaN
        in one mask stays in that mask.

        A channel in which all neighbours, but not the pixel itself, have one value has no spread: its term is the
        same huge number for all neighbours, beside which the other channels' differences are lost to rounding.

    Raises:
        ValueError, TypeError: for shapes, types, settings out of range.
    """
    checks.require_floating(OP, "images", images)
    sound = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] > 0 and images.shape[3] > 0
    checks.require(sound, OP, "images", "[B,3,H,W] of at least 1×1 pixels", images)
    checks.require_floating(OP, "masks", masks)
    sound = (
        masks.ndim == 4 and masks.shape[0] == images.shape[0] and masks.shape[2] > 0 and masks.shape[3] > 0
    )
    checks.require(
        sound, OP, "masks", lambda: f"[B,k,h,w]=[{images.shape[0]},*,*,*] of at least 1×1 cells", masks
    )
    checks.require_device(OP, "masks", masks, images.device)
    dilations = list(dilations)
    sound = len(dilations) >= 1 and min(dilations) >= 1
    checks.require(sound, OP, "dilations", "one or more distances, each at least 1", dilations)
    checks.require(iterations >= 1, OP, "iterations", "at least 1", iterations)
    checks.require(colour_scale > 0, OP, "colour_scale", "greater than 0", colour_scale)
    return call(
        OP,
        backend,
        images=images,
        masks=masks,
        dilations=dilations,
        iterations=iterations,
        colour_scale=float(colour_scale),
        position_weight=float(position_weight),
    )
