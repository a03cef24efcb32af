"""prototype_contrast in Triton. With q_c = p_c/(‖p_c‖ τ), z_c = <F, q_c> and u = 1/‖F‖ the logits are z_c u, and

    loss = log Σ_c exp(z_c u) - z_r u
    ∂/∂z_c = a (softmax_c - [c = r]) u,   a: the gradient of the loss times the pixel's weight
    ∂/∂‖F‖² = -u²/2 · Σ_c a (softmax_c - [c = r]) z_c u: the norm's backward needs no pass over the channels

Prototypes that are not valid stand as zero vectors and are left out of the softmax. Forward reads the features once.
Backward, where the grids are the same, is one kernel that reads them twice, the second time out of the cache; the
gradients of prototypes and temperature read them once more.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pssl_ext.triton.arithmetic import inverse_norm
from pssl_ext.triton.cells import add_up, cell_maps, class_sums, feature_gradient
from pssl_ext.triton.launch import Features, bundle, gradient_of, launch, view
from pssl_ext.triton.pixels import (
    label_grid,
    load_labels,
    load_pixels,
    load_weights,
    same_grid,
    store_pixels,
)

LOWEST = tl.constexpr(
    -1e30
)  # the logit of a prototype that is not valid: finite, so that none valid makes no NaN


# -- class vectors -----------------------------------------------------------------------------------------------------


@triton.jit
def prototype_row(prototypes, n, c, d, D, mask):
    data, sn, sc, sd = prototypes
    at = data + n * sn + c * sc + d.to(tl.int64) * sd
    return tl.load(at, mask=mask & (d < D), other=0.0).to(tl.float32)


@triton.jit
def prototype_inverse(prototypes, n, c, D, eps, mask, BD: tl.constexpr):
    squares = tl.zeros((BD,), tl.float32)
    for d0 in range(0, D, BD):
        p = prototype_row(prototypes, n, c, d0 + tl.arange(0, BD), D, mask)
        squares += p * p
    return inverse_norm(tl.sum(squares, 0), eps)


@triton.jit
def is_valid(valid, n, c):
    if valid is None:
        return n >= 0
    else:
        data, sn, sc = valid
        return tl.load(data + n * sn + c * sc) != 0


@triton.jit
def class_vectors_kernel(prototypes, valid, temperature, vectors, allowed, C, D, eps, BD: tl.constexpr):
    n, c = (tl.program_id(0) // C).to(tl.int64), tl.program_id(0) % C
    counts = is_valid(valid, n, c)
    scale = prototype_inverse(prototypes, n, c, D, eps, counts, BD) / tl.load(temperature).to(tl.float32)
    to = vectors + tl.program_id(0).to(tl.int64) * D
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        tl.store(to + d, prototype_row(prototypes, n, c, d, D, counts) * scale, mask=d < D)
    tl.store(allowed + tl.program_id(0), counts.to(tl.int8))


@triton.jit
def prototype_gradient_kernel(
    prototypes, valid, temperature, d_vectors, grad, grad_temperature, C, D, eps, BD: tl.constexpr
):
    """From the gradient of q = p/(‖p‖ τ): ∂p = (∂q - û <û,∂q>)/(‖p‖ τ), and of each row ∂τ = -<û,∂q>/τ²."""
    n, c = (tl.program_id(0) // C).to(tl.int64), tl.program_id(0) % C
    counts = is_valid(valid, n, c)
    inverse = prototype_inverse(prototypes, n, c, D, eps, counts, BD)
    tau = tl.load(temperature).to(tl.float32)
    of_row = d_vectors + tl.program_id(0).to(tl.int64) * D
    along = tl.zeros((BD,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        unit = prototype_row(prototypes, n, c, d, D, counts) * inverse
        along += unit * tl.load(of_row + d, mask=d < D, other=0.0)
    product = tl.sum(along, 0)
    if grad is not None:
        data, sn, sc, sd = grad
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            unit = prototype_row(prototypes, n, c, d, D, counts) * inverse
            gradient = (tl.load(of_row + d, mask=d < D, other=0.0) - unit * product) * inverse / tau
            at = data + n * sn + c * sc + d.to(tl.int64) * sd
            tl.store(at, tl.where(counts, gradient, 0.0).to(data.dtype.element_ty), mask=d < D)
    tl.store(grad_temperature + tl.program_id(0), tl.where(counts, -product / (tau * tau), 0.0))


class _ClassVectors:
    """q [n,C,D] and which prototypes are valid [n,C]; n = B where they differ from image to image, else 1."""

    def __init__(self, f: Features, a: Any) -> None:
        self.prototypes, self.temperature, self.eps = a.prototypes, a.temperature, a.eps
        self.valid = None if a.valid is None else a.valid.view(torch.uint8)
        self.classes = a.prototypes.shape[-2]
        apart = a.prototypes.ndim == 3 or (a.valid is not None and a.valid.ndim == 2)
        self.sets = f.sizes[0] if apart else 1
        self.vectors = f.new(self.sets, self.classes, a.prototypes.shape[-1])
        self.allowed = f.new(self.sets, self.classes, dtype=torch.int8)
        self._launch(class_vectors_kernel, self.sets, self.valid, self.vectors, self.allowed)

    def _launch(self, kernel, sets: int, valid: Tensor | None, *made: Tensor | tuple | None) -> None:
        classes, channels = self.prototypes.shape[-2:]
        prototypes = self.prototypes.expand(sets, classes, channels)
        valid = None if valid is None else valid.expand(sets, classes)
        launch(
            kernel, sets * classes, view(prototypes), view(valid), self.temperature, *made, classes, channels,
            self.eps, BD=256, warps=4,
        )  # fmt: skip

    @property
    def of_pixels(self) -> tuple:
        """What pixels ask for: which prototypes are valid, and how far those of the next image are."""
        return self.allowed, self.classes if self.sets > 1 else 0

    def gradients(self, f: Features, shares: Tensor, grad: Tensor | None) -> Tensor:
        """From the gradients of the products, [B,rows,h·w]: that of the prototypes into ``grad``; returns the
        temperature's."""
        apart = self.prototypes.ndim == 3
        d_vectors = class_sums(f, shares, self.classes, images_apart=apart)
        valid = self.valid
        if valid is not None and valid.ndim == 2 and not apart:
            valid = valid.amax(0)  # where an image has none, its share is 0
        temperatures = f.new(1, d_vectors.shape[0] * self.classes)
        to = view(grad if grad is None or apart else grad[None])
        self._launch(prototype_gradient_kernel, d_vectors.shape[0], valid, d_vectors, to, temperatures)
        return add_up(temperatures)[0]


# -- pixels ------------------------------------------------------------------------------------------------------------


@triton.jit
def softmax(extra, z, u, b, y, x, live, c, C):
    """(labels, which pixels count, logits [P,BC], exp(logits - maximum), its sum, loss); 0 where a pixel does not
    count."""
    regions, allowed, image, ignore_index = extra
    labels, counts = load_labels(regions, b, y, x, live, ignore_index, C)
    of_image = allowed + b * image
    counts = counts & (tl.load(of_image + labels, mask=counts, other=0) != 0)
    among = (tl.load(of_image + c, mask=c < C, other=0) != 0)[None, :] & counts[:, None]
    logits = tl.where(among, z * u[:, None], LOWEST)
    maximum = tl.max(logits, 1)
    powers = tl.where(among, tl.exp(logits - maximum[:, None]), 0.0)
    sum = tl.where(counts, tl.sum(powers, 1), 1.0)
    own = tl.sum(tl.where(labels[:, None] == c[None, :], logits, 0.0), 1)
    return labels, counts, logits, powers, sum, tl.where(counts, tl.log(sum) + maximum - own, 0.0)


@triton.jit
def contrast_pixels(extra, z, u, b, y, x, live, c, C):
    regions, allowed, image, ignore_index, weights, losses, _ = extra
    _, counts, _, powers, _, loss = softmax(
        (regions, allowed, image, ignore_index), z, u, b, y, x, live, c, C
    )
    weight = load_weights(weights, b, y, x, counts)
    store_pixels(losses, b, y, x, loss * weight, live)
    return powers, loss, weight[:, None]


@triton.jit
def contrast_pixels_backward(extra, z, u, b, y, x, live, c, C):
    regions, allowed, image, ignore_index, weights, grad_loss, grad_total, grad_weights, _ = extra
    labels, counts, logits, powers, sum, loss = softmax(
        (regions, allowed, image, ignore_index), z, u, b, y, x, live, c, C
    )
    gradient = counts.to(tl.float32) * 0.0
    if grad_loss is not None:
        gradient = load_pixels(grad_loss, b, y, x, counts, 0.0).to(tl.float32)
    if grad_weights is not None:
        of_weight = loss * gradient
        if grad_total is not None:
            of_weight += tl.load(grad_total).to(tl.float32)
        store_pixels(grad_weights, b, y, x, tl.where(counts, of_weight, 0.0), live)
    a = gradient * load_weights(weights, b, y, x, counts) / sum
    # the one before scaling, so that a softmax of 1 gives exactly 0
    own = (labels[:, None] == c[None, :]) & counts[:, None]
    r = tl.where(own, powers - sum[:, None], powers) * a[:, None]
    products = tl.sum(tl.where(r != 0.0, r * logits, 0.0), 1)
    return (
        r * tl.where(counts, u, 0.0)[:, None],
        tl.where(counts, -0.5 * u * u * products, 0.0),
        gradient[:, None],
    )


# -- the operator ------------------------------------------------------------------------------------------------------


def forward(a: Any) -> tuple[Tensor, Tensor]:  # [B,H,W], []
    f, classes, size, how = _problem(a)
    losses = f.new(*a.regions.shape)
    extra = bundle(view(a.regions), *classes.of_pixels, a.ignore_index, view(a.weights), view(losses))
    how["totals"] = "all"
    if size == f.sizes[2:]:
        _, total = same_grid(f, classes.vectors, classes.classes, contrast_pixels, extra, **how)
    else:
        maps = cell_maps(f, classes.vectors, gram=True)
        _, total = label_grid(
            f, maps, classes.classes, size, contrast_pixels, extra, dots=True, align_corners=a.align_corners, **how
        )  # fmt: skip
    return losses, add_up(total.view(1, -1)).view(())


def backward(
    grad_loss: Tensor | None,  # [B,H,W]
    grad_total: Tensor | None,  # []
    a: Any,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # of features, prototypes, temperature, weights
    f, classes, size, how = _problem(a)
    grad_prototypes = gradient_of(a.prototypes, needs[1])
    grad_temperature = gradient_of(a.temperature, needs[2])
    grad_weights = gradient_of(a.weights, needs[3])
    extra = bundle(
        view(a.regions), *classes.of_pixels, a.ignore_index, view(a.weights), view(grad_loss), grad_total,
        view(grad_weights) if needs[3] else None,
    )  # fmt: skip
    of_classes = needs[1] or needs[2]
    if size == f.sizes[2:]:
        grad_features = gradient_of(a.features, needs[0])
        shares, _ = same_grid(
            f, classes.vectors, classes.classes, contrast_pixels_backward, extra,
            out=grad_features if needs[0] else None, keep=of_classes, **how,
        )  # fmt: skip
    else:
        maps = cell_maps(f, classes.vectors, gram=True)
        shares, _ = label_grid(
            f, maps, classes.classes, size, contrast_pixels_backward, extra, dots=True,
            align_corners=a.align_corners, adjoint=needs[0] or of_classes, adjoint_norm=needs[0], **how,
        )  # fmt: skip
        grad_features = gradient_of(a.features, False)
        if needs[0]:
            grad_features = feature_gradient(f, classes.vectors, shares)
    if of_classes:
        found = classes.gradients(f, shares, grad_prototypes if needs[1] else None)
        if needs[2]:
            grad_temperature.copy_(found)
    return grad_features, grad_prototypes, grad_temperature, grad_weights


def _problem(a: Any) -> tuple[Features, _ClassVectors, tuple[int, int], dict[str, Any]]:
    """Return the features, the class vectors, the label grid's size, and how pixels are gone through."""
    f = Features(a.features)
    return f, _ClassVectors(f, a), tuple(a.regions.shape[1:]), dict(norm=True, eps=a.eps)
