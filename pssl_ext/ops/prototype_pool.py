"""prototype_pool: region-wise sums of upsampled features, without upsampling them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pssl_ext import checks
from pssl_ext.dispatch import triton_limits
from pssl_ext.op import Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype, l2_normalize, resize

OP = "prototype_pool"
EPS = 1e-12  # F.normalize's default


def reference(
    features: Tensor,  # [B,D,h,w]
    regions: Tensor,  # [B,H,W] integer labels, or [B,C,H,W] soft masks
    num_regions: int,
    weights: Tensor | None,  # [B,H,W]
    normalize: bool,
    ignore_index: int,
    align_corners: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # sums [B,C,D], mass [B,C]
    dtype = accumulation_dtype(features)
    upsampled = resize(features.to(dtype), regions.shape[-2:], align_corners)  # [B,D,H,W]
    if regions.ndim == 4:
        masks = regions.to(dtype)
        if weights is not None:
            masks = masks * weights.to(dtype)[:, None]
    else:
        counted = regions != ignore_index  # [B,H,W]
        labels = torch.where(counted, regions, 0).long()
        pixel_weights = (
            torch.ones((), dtype=dtype, device=features.device) if weights is None else weights.to(dtype)
        )
        pixel_weights = torch.where(counted, pixel_weights, 0.0)
        masks = F.one_hot(labels, num_regions).movedim(-1, 1) * pixel_weights[:, None]  # [B,C,H,W]
        # 0 · NaN is NaN: an ignored pixel is replaced, not multiplied away
        upsampled = torch.where(counted[:, None], upsampled, 0.0)
    if normalize:
        upsampled = l2_normalize(upsampled, 1, eps)
    return torch.einsum("bchw,bdhw->bcd", masks, upsampled), masks.sum((2, 3))


def _fake(a):
    b, d = a.features.shape[:2]
    new, dtype = a.features.new_empty, accumulation_dtype(a.features)
    return new(b, a.num_regions, d, dtype=dtype), new(b, a.num_regions, dtype=dtype)


def _check_values(a):
    if a.regions.ndim == 3:
        checks.check_regions(OP, a.regions, a.num_regions, a.ignore_index)


def _triton(a) -> str | None:
    return triton_limits("regions", a.num_regions, a.features)


def _bytes_moved(
    features: Tensor, regions: Tensor, num_regions: int, weights: Tensor | None = None, **_
) -> tuple[int, int]:
    """Forward: features, regions and weights read once. Backward: the same, and the gradients written."""
    feature_bytes = features.numel() * features.element_size()
    label_bytes = sum(t.numel() * t.element_size() for t in (regions, weights) if t is not None)
    weight_bytes = weights.numel() * weights.element_size() if weights is not None else 0
    return feature_bytes + label_bytes, 2 * feature_bytes + label_bytes + weight_bytes


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls over the shapes that matter: both grids, absent and ignored regions, degenerate sizes."""
    g = torch.Generator().manual_seed(7)

    def features(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)

    def regions(
        b: int, c: int, h: int, w: int, ignored: float = 0.1, integer: torch.dtype = torch.int64
    ) -> Tensor:
        labels = torch.randint(0, c, (b, h, w), generator=g)
        labels[torch.rand(labels.shape, generator=g) < ignored] = 255
        return labels.to(integer).to(device)

    def weights(b: int, h: int, w: int) -> Tensor:
        return (
            torch.rand(b, h, w, generator=g, dtype=torch.float64)
            .to(accumulation_dtype(features(1)))
            .to(device)
        )

    yield Sample(
        "same_grid", dict(features=features(2, 19, 9, 11), regions=regions(2, 5, 9, 11), num_regions=5)
    )
    yield Sample(
        "label_grid_8x", dict(features=features(2, 17, 5, 7), regions=regions(2, 5, 40, 56), num_regions=5)
    )
    odd = dict(
        features=features(2, 33, 6, 5), regions=regions(2, 4, 23, 31, integer=torch.uint8), num_regions=4
    )
    yield Sample("label_grid_odd", odd)
    yield Sample("weighted", dict(odd, weights=weights(2, 23, 31)))
    yield Sample("plain_sum", dict(odd, normalize=False))
    yield Sample("align_corners", dict(odd, align_corners=True, weights=weights(2, 23, 31)))
    yield Sample(
        "smaller_labels", dict(features=features(2, 8, 13, 9), regions=regions(2, 3, 4, 3), num_regions=3)
    )
    soft = torch.rand(2, 4, 12, 15, generator=g, dtype=torch.float64).to(dtype).to(device)
    yield Sample(
        "soft", dict(features=features(2, 11, 5, 6), regions=soft, num_regions=4, weights=weights(2, 12, 15))
    )
    yield Sample("soft_same_grid", dict(features=features(2, 11, 12, 15), regions=soft, num_regions=4))
    absent = dict(
        features=features(2, 8, 4, 4), regions=regions(2, 2, 16, 16, integer=torch.int32), num_regions=6
    )
    yield Sample("absent_regions", absent)
    ignored = dict(
        features=features(1, 8, 4, 4), regions=torch.full((1, 9, 9), 255, device=device), num_regions=3
    )
    yield Sample("all_ignored", ignored)
    yield Sample(
        "one_pixel", dict(features=features(1, 5, 1, 1), regions=regions(1, 1, 1, 1, 0.0), num_regions=1)
    )
    yield Sample("one_cell", dict(features=features(1, 5, 1, 1), regions=regions(1, 3, 7, 5), num_regions=3))
    yield Sample(
        "empty_batch", dict(features=features(0, 5, 3, 3), regions=regions(0, 3, 6, 6), num_regions=3)
    )
    yield Sample(
        "many_regions", dict(features=features(1, 40, 6, 6), regions=regions(1, 37, 48, 48), num_regions=37)
    )
    wide = dict(features=features(1, 6, 3, 150), regions=regions(1, 3, 6, 300), num_regions=3)
    yield Sample("wide", wide)
    yield Sample(
        "wide_same_grid", dict(features=features(1, 6, 3, 150), regions=regions(1, 3, 3, 150), num_regions=3)
    )
    plain = dict(features=features(2, 9, 7, 5), regions=regions(2, 4, 7, 5), num_regions=4, normalize=False)
    yield Sample("plain_sum_same_grid", dict(plain, weights=weights(2, 7, 5)))


@define_op(
    schema=(
        "(Tensor features, Tensor regions, SymInt num_regions, Tensor? weights, bool normalize, int ignore_index, "
        "bool align_corners, float eps) -> (Tensor, Tensor)"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    differentiable=("features", "regions", "weights"),
    check_values=_check_values,
    triton=_triton,
)
def prototype_pool(
    features: Tensor,  # [B,D,h,w]
    regions: Tensor,  # [B,H,W] integer labels, or [B,C,H,W] soft masks
    num_regions: int,
    *,
    weights: Tensor | None = None,  # [B,H,W]
    normalize: bool = True,
    ignore_index: int = 255,
    align_corners: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # sums [B,C,D], mass [B,C]
    r"""Sums the upsampled feature over the label pixels of each region; the numerator of a class prototype.

    With F = features resized bilinearly to the label grid H×W (``align_corners=False``: half-pixel centres, as
    ``F.interpolate``), m_c(x) the mask of region c and ω(x) the weight (1 without ``weights``):

    .. math::
        \text{sums}[b,c] = \sum_x \omega(x)\, m_c(x)\, \frac{F(x)}{\lVert F(x)\rVert}, \qquad
        \text{mass}[b,c] = \sum_x \omega(x)\, m_c(x)

    without the division where ``normalize=False``. F is never formed: the sum equals
    Σ_i f_i · (Σ_x a_i(x) ω(x) m_c(x)/‖F(x)‖) over the cells i of the feature grid with bilinear weights a_i, and
    ‖F(x)‖² follows from products of neighbouring cells. Prototype means, their L2 normalisation, leave-one-out and
    reduction over ranks are sums of these results.

    Args:
        features: [B,D,h,w], float16, bfloat16, float32 or float64, any strides.
        regions: [B,H,W] of any integer type, labels 0..num_regions-1 or ``ignore_index``; or soft masks
            [B,C,H,W], floating, C = num_regions, with a gradient of their own (class scores as weights, as
            PPC, SIPE and ReCAM pool).
        num_regions: C, background included.
        weights: [B,H,W], floating.
        normalize: L2-normalise F(x) (Yoon et al. 2021, eq. of the class prototypes). A feature with
            ‖F(x)‖ ≤ 1e-12 counts as zero, with zero gradient.
        ignore_index: label of pixels that count for nothing (255, PASCAL VOC's). NaN under them reaches no output.
        align_corners: resizing convention; True is SEAM's and PPC's.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        sums [B,C,D] and mass [B,C], float32 (float64 for float64 features). A region absent from an image has a
        zero row and mass 0.

    Gradients: features, soft ``regions``, ``weights``. Deterministic: the same inputs give the same bits, whatever
    the number of threads.

    Precision: accumulation in float32. ‖F(x)‖² is a sum of products of neighbouring cells, so where the four
    neighbours nearly cancel (‖F(x)‖ ≪ ‖f_i‖) its relative error grows as 1e-7·‖f_i‖²/‖F(x)‖²; it is clamped at 0.

    Raises:
        ValueError, TypeError: for shapes, types or labels out of range (labels: on CPU, elsewhere with PSSL_DEBUG=1).

    Paper: Yoon et al., *Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation*,
    arXiv 2112.05351 (regional contrastive module).
    """
    checks.require_floating(OP, "features", features)
    checks.require(features.ndim == 4, OP, "features", "[B,D,h,w]", features)
    b = features.shape[0]
    checks.require_tensor(OP, "regions", regions)
    if regions.is_floating_point():
        checks.require_floating(OP, "regions", regions)
        soft = regions.ndim == 4 and regions.shape[0] == b and regions.shape[1] == num_regions
        checks.require(
            soft, OP, "regions", lambda: f"[B,C,H,W]=[{b},{num_regions},*,*] (soft masks)", regions
        )
    else:
        checks.require_integer(OP, "regions", regions)
        hard = regions.ndim == 3 and regions.shape[0] == b
        checks.require(hard, OP, "regions", lambda: f"[B,H,W]=[{b},*,*]", regions)
    checks.require(num_regions >= 1, OP, "num_regions", "at least 1", num_regions)
    checks.require_device(OP, "regions", regions, features.device)
    h, w = features.shape[-2:]
    filled = (h > 0 and w > 0) or 0 in regions.shape
    checks.require(filled, OP, "features", "of at least 1×1 cells where there are label pixels", features)
    if weights is not None:
        checks.require_floating(OP, "weights", weights)
        expected = (b, *regions.shape[-2:])
        checks.require(
            tuple(weights.shape) == expected, OP, "weights", lambda: f"[B,H,W]={list(expected)}", weights
        )
        checks.require_device(OP, "weights", weights, features.device)
    return call(
        OP,
        backend,
        features=features,
        regions=regions,
        num_regions=num_regions,
        weights=weights,
        normalize=normalize,
        ignore_index=ignore_index,
        align_corners=align_corners,
        eps=EPS,
    )
