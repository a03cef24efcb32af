"""cam_compare: the loss of the Multi-scale Attentive Module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pssl_ext import checks
from pssl_ext.dispatch import triton_limits
from pssl_ext.op import Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype, resize
from pssl_ext.ops.cam_regions import _check_cams, present_bytes

OP = "cam_compare"
ATTENTIONS = ("none", "cosine")


def reference(
    main: list[Tensor],  # S of [B,K,h_s,w_s]
    support: list[Tensor],  # T of [B,K,h_t,w_t]
    image_labels: Tensor,  # [B,K]
    height: int,
    width: int,
    cosine: bool,
) -> Tensor:  # [B,K], the sum over space and main scales
    dtype = accumulation_dtype(*main, *support)
    present = (image_labels != 0)[:, :, None, None]

    def maps(cams: list[Tensor]) -> list[Tensor]:
        # an absent class is replaced, not multiplied away: 0 · NaN is NaN
        return [torch.where(present, resize(c.to(dtype), (height, width)), 0.0).relu() for c in cams]

    supports = maps(support)
    total = image_labels.new_zeros(image_labels.shape, dtype=dtype)
    for m in maps(main):  # [B,K,H,W]
        target = torch.zeros_like(m)
        for s in supports:
            attention = torch.ones((), dtype=dtype, device=m.device)
            if cosine:
                similarity = F.cosine_similarity(m.detach().flatten(2), s.detach().flatten(2), dim=2)
                attention = (2 - similarity)[:, :, None, None]
            target = target + attention * s / len(supports)
        total = total + (m - target).abs().sum((2, 3))
    return total


def _fake(a):
    return a.image_labels.new_empty(a.image_labels.shape, dtype=accumulation_dtype(*a.main, *a.support))


def _triton(a) -> str | None:
    return triton_limits("maps", len(a.main) + len(a.support), *a.main, *a.support)


def _bytes_moved(
    main: Sequence[Tensor], support: Sequence[Tensor], image_labels: Tensor, **_
) -> tuple[int, int]:
    """Gradients are written for absent classes too: zeros."""
    read = present_bytes((*main, *support), image_labels)
    return read, read + sum(c.numel() * c.element_size() for c in (*main, *support))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(17)

    def cams(b: int, k: int, *sizes: tuple[int, int]) -> list[Tensor]:
        return [torch.randn(b, k, *s, generator=g, dtype=torch.float64).to(dtype).to(device) for s in sizes]

    def case(id: str, b: int, k: int, main, support, size, **more) -> Sample:
        labels = torch.randint(0, 2, (b, k), generator=g).to(device)
        args = dict(main=cams(b, k, *main), support=cams(b, k, *support), image_labels=labels, size=size)
        return Sample(id, {**args, **more})

    yield case("multi_scale", 2, 3, [(3, 4), (6, 8), (12, 16)], [(3, 4), (6, 8), (9, 12)], (12, 16))
    yield case("no_attention", 2, 3, [(5, 7)], [(5, 7), (3, 3)], (11, 9), attention="none")
    yield case("sum", 2, 3, [(5, 7)], [(5, 7)], (5, 7), reduction="sum")
    yield case("per_class", 2, 3, [(5, 7)], [(5, 7)], (5, 7), reduction="none")
    none = torch.zeros(2, 3, device=device)
    yield case("no_class", 2, 3, [(5, 7)], [(5, 7)], (5, 7), image_labels=none)
    wide = [(9, 40), (17, 70)]
    yield case(
        "wide", 3, 2, wide, [(17, 70), (34, 140)], (17, 70), image_labels=torch.ones(3, 2, device=device)
    )
    yield case(
        "smaller_size", 1, 2, [(9, 12)], [(13, 7)], (5, 6), image_labels=torch.ones(1, 2, device=device)
    )
    yield case("one_pixel", 1, 1, [(1, 1)], [(1, 1)], (1, 1))
    yield case("empty_batch", 0, 3, [(4, 4)], [(4, 4)], (8, 8))


@define_op(
    schema=(
        "(Tensor[] main, Tensor[] support, Tensor image_labels, SymInt height, SymInt width, bool cosine) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    differentiable=("main", "support"),
    triton=_triton,
)
def cam_compare(
    main: Sequence[Tensor],  # S of [B,K,h_s,w_s]
    support: Sequence[Tensor],  # T of [B,K,h_t,w_t]
    image_labels: Tensor,  # [B,K]
    *,
    size: tuple[int, int],
    attention: str = "cosine",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:  # [], or [B,K] for reduction="none"
    r"""Pulls MainNet's multi-scale CAMs towards SupportNet's, more strongly where the two disagree (MAM).

    Per image and present class, with M_s = relu(upsample(main[s])), S_t = relu(upsample(support[t])) at ``size``:

    .. math::
        w_{st} = 2 - \cos(M_s, S_t) \ \text{over space}, \qquad
        L = \sum_s \operatorname{mean}_{B,K,H,W} \Bigl| M_s - \tfrac1T \sum_t w_{st} S_t \Bigr|

    A class absent from the image counts as 0 in the mean, as ``F.l1_loss`` on masked maps gives. The attention is
    a constant: no gradient goes through it. The subgradient of |·| and of relu at 0 is 0.

    Args:
        main: list of S tensors [B,K,h_s,w_s], floating, of any sizes; at least one.
        support: list of T tensors [B,K,h_t,w_t], likewise; on a GPU at most 24 maps with those of main.
        image_labels: [B,K], non-zero where the class is present.
        size: (H,W) at which the maps are compared.
        attention: "cosine", or "none" for w = 1.
        reduction: "mean" (over B·K·H·W, summed over s), "sum", or "none" ([B,K], summed over space and s).
        backend: "auto", "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 maps). An empty batch gives 0.

    Gradients: main, support. Deterministic: the same inputs give the same bits, whatever the number of threads.
    Maps of classes that are absent are not read; NaN in them reaches nothing.

    Raises:
        ValueError, TypeError: for shapes, types, a size below 1×1, an unknown attention or reduction.

    Paper: Yoon et al., arXiv 2112.05351 (multi-scale attentive module).
    """
    k = _check_cams(OP, "main", main, image_labels)
    _check_cams(OP, "support", support, image_labels)
    checks.require(attention in ATTENTIONS, OP, "attention", "one of " + ", ".join(ATTENTIONS), attention)
    choices = ("mean", "sum", "none")
    checks.require(reduction in choices, OP, "reduction", "one of " + ", ".join(choices), reduction)
    checks.require_size(OP, "size", size)
    height, width = size
    sums = call(
        OP,
        backend,
        main=list(main),
        support=list(support),
        image_labels=image_labels,
        height=height,
        width=width,
        cosine=attention == "cosine",
    )
    if reduction == "none":
        return sums
    if reduction == "sum":
        return sums.sum()
    return sums.sum() / max(1, image_labels.shape[0] * k * height * width)
