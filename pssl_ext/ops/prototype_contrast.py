"""prototype_contrast: pixel-to-prototype cross-entropy at label resolution, at the cost of the feature grid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pssl_ext import checks
from pssl_ext.dispatch import triton_limits
from pssl_ext.op import Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype, l2_normalize, resize

OP = "prototype_contrast"
EPS = 1e-12  # F.normalize's default


def reference(
    features: Tensor,  # [B,D,h,w]
    prototypes: Tensor,  # [C,D] or [B,C,D]
    regions: Tensor,  # [B,H,W]
    temperature: Tensor,  # []
    valid: Tensor | None,  # [C] or [B,C] bool
    weights: Tensor | None,  # [B,H,W]
    ignore_index: int,
    align_corners: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # weighted loss per pixel [B,H,W], total weight []
    dtype = accumulation_dtype(features, prototypes)
    b, c = features.shape[0], prototypes.shape[-2]
    prototypes = prototypes.to(dtype).expand(b, -1, -1)
    valid = torch.ones((), dtype=torch.bool, device=features.device) if valid is None else valid
    valid = valid.expand(b, c)
    counted = regions != ignore_index  # [B,H,W]
    labels = torch.where(counted, regions, 0).long()
    counted = counted & valid.gather(1, labels.flatten(1)).view_as(counted)

    # 0 · NaN is NaN: what does not count is replaced before anything is multiplied
    upsampled = resize(features.to(dtype), regions.shape[-2:], align_corners)
    upsampled = l2_normalize(torch.where(counted[:, None], upsampled, 0.0), 1, eps)  # [B,D,H,W]
    unit = l2_normalize(torch.where(valid[..., None], prototypes, 0.0), -1, eps)  # [B,C,D]
    logits = torch.einsum("bcd,bdhw->bchw", unit, upsampled) / temperature.to(dtype)
    # the lowest finite number, not -inf: an image without any valid prototype must not make NaN
    logits = torch.where(valid[..., None, None], logits, torch.finfo(dtype).min)
    loss = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
    pixel_weights = (
        torch.ones((), dtype=dtype, device=features.device) if weights is None else weights.to(dtype)
    )
    pixel_weights = torch.where(counted, pixel_weights, 0.0)
    return torch.where(counted, loss * pixel_weights, 0.0), pixel_weights.sum()


def _fake(a):
    dtype = accumulation_dtype(a.features, a.prototypes)
    return a.features.new_empty(a.regions.shape, dtype=dtype), a.features.new_empty((), dtype=dtype)


def _check_values(a):
    checks.check_regions(OP, a.regions, a.prototypes.shape[-2], a.ignore_index)


def _triton(a) -> str | None:
    return triton_limits("regions", a.prototypes.shape[-2], a.features, a.prototypes)


def _saves(a) -> bool:
    """Save the products of the pixels with the prototypes, and their squares, for the gradient: on the CPU, on one
    grid, where they take an eighth of the features' bytes at most."""
    products = (a.prototypes.shape[-2] + 1) * accumulation_dtype(a.features, a.prototypes).itemsize
    one_grid = a.features.device.type == "cpu" and a.regions.shape[1:] == a.features.shape[2:]
    return one_grid and 8 * products <= a.features.shape[1] * a.features.element_size()


def _bytes_moved(
    features: Tensor, prototypes: Tensor, regions: Tensor, weights: Tensor | None = None, **_
) -> tuple[int, int]:
    """Forward: every argument read once. Backward: the same, and the gradients written."""

    def size(*tensors: Tensor | None) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    read = size(features, prototypes, regions, weights)
    return read, read + size(features, prototypes, weights)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls over the shapes that matter: both grids, per-image and invalid prototypes, weights, degenerate sizes."""
    g = torch.Generator().manual_seed(11)
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)

    def regions(
        b: int, c: int, h: int, w: int, ignored: float = 0.1, integer: torch.dtype = torch.int64
    ) -> Tensor:
        labels = torch.randint(0, c, (b, h, w), generator=g)
        labels[torch.rand(labels.shape, generator=g) < ignored] = 255
        return labels.to(integer).to(device)

    def case(id: str, b: int, d: int, c: int, grid: tuple[int, int], size: tuple[int, int], **more) -> Sample:
        args = dict(
            features=random(b, d, *grid),
            prototypes=random(c, d, dtype=wide_dtype),
            regions=regions(b, c, *size),
        )
        return Sample(id, {**args, **more})

    yield case("same_grid", 2, 19, 5, (9, 11), (9, 11))
    # few classes beside the channels: the CPU's kernels save the products
    yield case("same_grid_saved", 2, 64, 3, (17, 32), (17, 32))
    tall = dict(weights=torch.rand(2, 5, 60, generator=g, dtype=torch.float64).to(wide_dtype).to(device))
    yield case("same_grid_saved_weighted", 2, 80, 4, (5, 60), (5, 60), **tall)
    yield case("label_grid_8x", 2, 17, 5, (5, 7), (40, 56))
    yield case(
        "label_grid_odd", 2, 33, 4, (6, 5), (23, 31), regions=regions(2, 4, 23, 31, integer=torch.uint8)
    )
    yield case("per_image", 2, 9, 4, (6, 5), (12, 10), prototypes=random(2, 4, 9))
    weights = torch.rand(2, 23, 31, generator=g, dtype=torch.float64).to(wide_dtype).to(device)
    yield case("weighted_sum", 2, 12, 4, (6, 5), (23, 31), weights=weights, reduction="sum")
    yield case("weighted_mean", 2, 12, 4, (6, 5), (23, 31), weights=weights)
    yield case("per_pixel", 2, 12, 4, (6, 5), (23, 31), reduction="none")
    yield case("align_corners", 2, 12, 4, (6, 5), (23, 31), align_corners=True)
    yield case("smaller_labels", 2, 8, 3, (13, 9), (4, 3))
    valid = torch.tensor([True, False, True, True, False], device=device)
    yield case("invalid", 2, 8, 5, (4, 6), (16, 24), valid=valid)
    valid = torch.tensor([[True, True, False], [False, False, False]], device=device)
    yield case("invalid_per_image", 2, 8, 3, (6, 6), (6, 6), valid=valid)
    tau = torch.tensor(0.07, dtype=wide_dtype, device=device)
    yield case("tensor_temperature", 2, 16, 5, (4, 4), (16, 16), temperature=tau)
    yield case("sharp", 1, 16, 5, (4, 4), (4, 4), temperature=0.01)
    yield case("all_ignored", 1, 8, 3, (4, 4), (9, 9), regions=torch.full((1, 9, 9), 255, device=device))
    yield case("one_class", 1, 8, 1, (4, 4), (8, 8))
    yield case("one_pixel", 1, 5, 2, (1, 1), (1, 1), regions=regions(1, 2, 1, 1, 0.0))
    yield case("one_cell", 1, 5, 3, (1, 1), (7, 5), regions=regions(1, 3, 7, 5, integer=torch.int32))
    yield case("empty_batch", 0, 5, 3, (3, 3), (6, 6))
    yield case("many_classes", 1, 40, 37, (6, 6), (48, 48))
    # more classes than the CPU's kernels take at a time
    yield case("many_classes_wide", 1, 5, 41, (2, 160), (3, 320))
    yield case("many_classes_same_grid", 1, 9, 41, (16, 16), (16, 16))
    yield case("wide", 1, 6, 3, (3, 150), (6, 300))
    yield case("wide_same_grid", 1, 6, 3, (3, 150), (3, 150))


@define_op(
    schema=(
        "(Tensor features, Tensor prototypes, Tensor regions, Tensor temperature, Tensor? valid, Tensor? weights, "
        "int ignore_index, bool align_corners, float eps) -> (Tensor, Tensor)"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    differentiable=("features", "prototypes", "temperature", "weights"),
    check_values=_check_values,
    triton=_triton,
    saves=_saves,
)
def prototype_contrast(
    features: Tensor,  # [B,D,h,w]
    prototypes: Tensor,  # [C,D] or [B,C,D]
    regions: Tensor,  # [B,H,W]
    *,
    temperature: float | Tensor = 0.5,
    valid: Tensor | None = None,  # [C] or [B,C] bool
    weights: Tensor | None = None,  # [B,H,W]
    ignore_index: int = 255,
    align_corners: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:  # [], or [B,H,W] for reduction="none"
    r"""Contrasts every label pixel's feature with the class prototypes: the loss of the Regional Contrastive Module.

    With F = features resized bilinearly to the label grid and r(x) the region of pixel x:

    .. math::
        \ell(x) = -\log \frac{\exp(\cos(F(x), p_{r(x)})/\tau)}{\sum_{c\ \mathrm{valid}} \exp(\cos(F(x), p_c)/\tau)}

    F is never formed (for bilinear weights a_i, ⟨F(x),p⟩ = Σ a_i⟨f_i,p⟩ and ‖F(x)‖² = Σ a_i a_j⟨f_i,f_j⟩) and the
    logits of the label grid are never stored: extra memory is [B,C,h,w] on the feature grid where the grids differ, and
    none that grows with D. Where they are the same, the CPU's kernels keep [B,C+1,h,w] from the forward to the backward
    pass, if that is an eighth of the features' memory at most, and save a fifth of the time.

    Args:
        features: [B,D,h,w], float16, bfloat16, float32 or float64, any strides.
        prototypes: [C,D], or [B,C,D] for prototypes of each image; any floating type. L2-normalised inside.
        regions: [B,H,W] of any integer type, labels 0..C-1 or ``ignore_index``.
        temperature: τ > 0, a number or a one-element tensor (learnable). 0.5 is Yoon et al.'s.
        valid: [C] or [B,C] bool; False removes a prototype from the softmax, and the pixels of its region do
            not count.
        weights: [B,H,W], floating, multiplies ℓ(x).
        ignore_index: label of pixels that do not count (255, PASCAL VOC's). NaN under them reaches no output.
        align_corners: resizing convention; True is SEAM's and PPC's.
        reduction: "mean" (Σ ω ℓ / Σ ω over the pixels that count), "sum" (Σ ω ℓ) or "none" ([B,H,W], 0 where a
            pixel does not count). Where no pixel counts the mean is 0 with zero gradients, not NaN as in
            ``F.cross_entropy``, so that the ranks of a distributed run stay in step.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 features or prototypes).

    Gradients: features, prototypes, temperature, weights. A feature or prototype with norm ≤ 1e-12 counts as the
    zero vector: cosine 0 with everything, zero gradient. Deterministic: the same inputs give the same bits, whatever
    the number of threads.

    Precision: accumulation in float32, the maximum logit subtracted before exponentials. ‖F(x)‖² is a sum of
    products of neighbouring cells, so where the four neighbours nearly cancel (‖F(x)‖ ≪ ‖f_i‖) its relative error
    grows as 1e-7·‖f_i‖²/‖F(x)‖²; it is clamped at 0.

    Raises:
        ValueError, TypeError: for shapes, types, a temperature ≤ 0 given as a number, or labels out of range
            (labels: on CPU, elsewhere with PSSL_DEBUG=1).

    Paper: Yoon et al., *Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation*,
    arXiv 2112.05351; the same form as pixel-to-prototype contrast, Du et al., CVPR 2022 (PPC).
    """
    checks.require_floating(OP, "features", features)
    checks.require(features.ndim == 4, OP, "features", "[B,D,h,w]", features)
    b, d, h, w = features.shape
    checks.require_floating(OP, "prototypes", prototypes)
    shaped = prototypes.ndim in (2, 3) and prototypes.shape[-1] == d and prototypes.shape[-2] >= 1
    shaped = shaped and (prototypes.ndim == 2 or prototypes.shape[0] == b)
    checks.require(shaped, OP, "prototypes", lambda: f"[C,D]=[*,{d}] or [B,C,D]=[{b},*,{d}]", prototypes)
    c = prototypes.shape[-2]
    checks.require_integer(OP, "regions", regions)
    checks.require(
        regions.ndim == 3 and regions.shape[0] == b, OP, "regions", lambda: f"[B,H,W]=[{b},*,*]", regions
    )
    filled = (h > 0 and w > 0) or 0 in regions.shape
    checks.require(filled, OP, "features", "of at least 1×1 cells where there are label pixels", features)
    if isinstance(temperature, Tensor):
        checks.require_floating(OP, "temperature", temperature)
        checks.require(
            temperature.numel() == 1, OP, "temperature", "a number or a tensor of one element", temperature
        )
        temperature = temperature.reshape(())
    else:
        checks.require(temperature > 0, OP, "temperature", "greater than 0", temperature)
        dtype = accumulation_dtype(features, prototypes)
        temperature = torch.full((), float(temperature), dtype=dtype, device=features.device)
    if valid is not None:
        checks.require_tensor(OP, "valid", valid)
        checks.require(valid.dtype == torch.bool, OP, "valid", "bool", valid)
        checks.require(
            tuple(valid.shape) in ((c,), (b, c)), OP, "valid", lambda: f"[C]=[{c}] or [B,C]=[{b},{c}]", valid
        )
    if weights is not None:
        checks.require_floating(OP, "weights", weights)
        same = weights.shape == regions.shape
        checks.require(same, OP, "weights", lambda: f"[B,H,W]={list(regions.shape)}", weights)
    device = features.device
    checks.require_device(OP, "prototypes", prototypes, device)
    checks.require_device(OP, "regions", regions, device)
    checks.require_device(OP, "temperature", temperature, device)
    if valid is not None:
        checks.require_device(OP, "valid", valid, device)
    if weights is not None:
        checks.require_device(OP, "weights", weights, device)
    choices = ("mean", "sum", "none")
    checks.require(reduction in choices, OP, "reduction", "one of " + ", ".join(choices), reduction)
    loss, total = call(
        OP,
        backend,
        features=features,
        prototypes=prototypes,
        regions=regions,
        temperature=temperature,
        valid=valid,
        weights=weights,
        ignore_index=ignore_index,
        align_corners=align_corners,
        eps=EPS,
    )
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weights is None or not weights.requires_grad:
        total = total.detach()  # a constant, for which autograd then launches nothing
    return loss.sum() / total.masked_fill(total.logical_not(), 1.0)
