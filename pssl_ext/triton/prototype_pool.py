"""prototype_pool in Triton. With t_c(x) = <F(x), grad_sums[c]>/‖F(x)‖ and m_c(x) the masks times the weights:

    sums[c] = Σ_i f_i A_c(i),  A_c(i) = Σ_x a_i(x) m_c(x)/‖F(x)‖
    ∂/∂F through the products: m_c/‖F‖ · grad_sums[c];   ∂/∂‖F‖² = -Σ_c m_c t_c / (2‖F‖²);   ∂/∂m_c = t_c + grad_mass[c]

Forward reads the features for their norms, then for the sums. Where the grids are the same the backward is one kernel
that reads them twice, the second time out of the cache.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pssl_ext.triton.cells import cell_maps, class_sums, feature_gradient
from pssl_ext.triton.launch import Features, bundle, gradient_of, view
from pssl_ext.triton.pixels import (
    label_grid,
    load_labels,
    load_weights,
    pixel_offsets,
    same_grid,
    store_pixels,
)


@triton.jit
def load_masks(regions, masks, weights, b, y, x, live, ignore_index, c, C):
    """(masks [P,BC] without weights, weights [P]), of labels or of soft masks."""
    if masks is None:
        labels, counts = load_labels(regions, b, y, x, live, ignore_index, C)
        mask = (labels[:, None] == c[None, :]) & counts[:, None]
        return mask.to(tl.float32), load_weights(weights, b, y, x, counts)
    else:
        data, sb, sc, sy, sx = masks
        at = pixel_offsets((sb, sy, sx), b, y, x)[:, None] + c.to(tl.int64)[None, :] * sc
        mask = tl.load(data + at, mask=live[:, None] & (c < C)[None, :], other=0.0)
        return mask.to(tl.float32), load_weights(weights, b, y, x, live)


@triton.jit
def pool_pixels(extra, z, u, b, y, x, live, c, C):
    regions, masks, weights, ignore_index, _ = extra
    mask, weight = load_masks(regions, masks, weights, b, y, x, live, ignore_index, c, C)
    shares = mask * weight[:, None]
    # 0 · NaN is NaN, and 1/‖F‖ may be that of a pixel that does not count
    return tl.where(shares != 0.0, shares * u[:, None], 0.0), weight * 0.0, shares


@triton.jit
def pool_pixels_backward(extra, z, u, b, y, x, live, c, C):
    regions, masks, weights, ignore_index, grad_mass, grad_masks, grad_weights, _ = extra
    mask, weight = load_masks(regions, masks, weights, b, y, x, live, ignore_index, c, C)
    shares = mask * weight[:, None]
    t = z * u[:, None]
    if masks is None:
        t = tl.where(mask != 0.0, t, 0.0)
    products = tl.sum(tl.where(shares != 0.0, shares * t, 0.0), 1)
    if grad_mass is not None:
        t += tl.load(grad_mass + b * C + c, mask=c < C, other=0.0)[None, :]
    if grad_masks is not None:
        data, sb, sc, sy, sx = grad_masks
        at = pixel_offsets((sb, sy, sx), b, y, x)[:, None] + c.to(tl.int64)[None, :] * sc
        gradient = (t * weight[:, None]).to(data.dtype.element_ty)
        tl.store(data + at, gradient, mask=live[:, None] & (c < C)[None, :])
    if grad_weights is not None:
        store_pixels(grad_weights, b, y, x, tl.sum(tl.where(mask != 0.0, mask * t, 0.0), 1), live)
    g = tl.where(shares != 0.0, shares * u[:, None], 0.0)
    return g, tl.where(products != 0.0, -0.5 * u * u * products, 0.0), weight[:, None]


def _masks(regions: Tensor) -> tuple:
    """(labels, soft masks): the one that ``regions`` are, and None."""
    return (view(regions), None) if regions.ndim == 3 else (None, view(regions))


def forward(a: Any) -> tuple[Tensor, Tensor]:  # sums [B,C,D], mass [B,C]
    f = Features(a.features)
    size = tuple(a.regions.shape[-2:])
    extra = bundle(*_masks(a.regions), view(a.weights), a.ignore_index)
    how = dict(norm=a.normalize, eps=a.eps, totals="class")
    if size == f.sizes[2:]:
        shares, mass = same_grid(f, None, a.num_regions, pool_pixels, extra, keep=True, **how)
    else:
        maps = cell_maps(f, None, gram=True) if a.normalize else None
        shares, mass = label_grid(
            f, maps, a.num_regions, size, pool_pixels, extra, dots=False, align_corners=a.align_corners,
            adjoint=True, **how,
        )  # fmt: skip
    return class_sums(f, shares, a.num_regions, images_apart=True), mass


def backward(
    grad_sums: Tensor | None,  # [B,C,D]
    grad_mass: Tensor | None,  # [B,C]
    a: Any,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # of features, regions, weights
    f = Features(a.features)
    size = tuple(a.regions.shape[-2:])
    grad_regions = gradient_of(a.regions, needs[1])
    grad_weights = gradient_of(a.weights, needs[2])
    vectors = (
        f.new(f.sizes[0], a.num_regions, f.sizes[1]).zero_() if grad_sums is None else grad_sums.contiguous()
    )
    extra = bundle(
        *_masks(a.regions), view(a.weights), a.ignore_index,
        None if grad_mass is None else grad_mass.contiguous(),
        view(grad_regions) if needs[1] else None, view(grad_weights) if needs[2] else None,
    )  # fmt: skip
    how = dict(norm=a.normalize, eps=a.eps)
    if size == f.sizes[2:]:
        grad_features = gradient_of(a.features, needs[0])
        out = grad_features if needs[0] else None
        same_grid(f, vectors, a.num_regions, pool_pixels_backward, extra, out=out, **how)
        return grad_features, grad_regions, grad_weights
    adjoint, _ = label_grid(
        f, cell_maps(f, vectors, gram=a.normalize), a.num_regions, size, pool_pixels_backward, extra, dots=True,
        align_corners=a.align_corners, adjoint=needs[0], adjoint_norm=needs[0] and a.normalize, **how,
    )  # fmt: skip
    grad_features = gradient_of(a.features, False)
    if needs[0]:
        grad_features = feature_gradient(f, vectors, adjoint)
    return grad_features, grad_regions, grad_weights
