"""Pooling, contrast and the whole step of the Regional Contrastive Module as peers write them.

``peers`` is the usual code: features upsampled to the labels, pooled by a one-hot product, unit features and logits
materialised. ``eager`` is the best without a kernel of one's own: the norm divides masks and logits, not features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pssl.method.terms.rcm import leave_one_out

TEMPERATURE = 0.5
IGNORE = 255
EPS = 1e-12  # F.normalize's


def upsample(maps: Tensor, size: tuple[int, ...]) -> Tensor:  # [*,*,h,w] -> [*,*,H,W]
    same = tuple(maps.shape[-2:]) == tuple(size)
    return maps if same else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


# -- pooling: (features [B,D,h,w], regions [B,H,W], C) -> sums [B,C,D] -------------------------------------------------


def pool_class_loop(features: Tensor, regions: Tensor, c: int) -> Tensor:
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    return torch.stack([(unit * (regions == k)[:, None]).sum((2, 3)) for k in range(c)], 1)


def pool_broadcast(features: Tensor, regions: Tensor, c: int) -> Tensor:
    """SIPE's (Chen et al. 2022): every feature times every mask, [B,C,D,H,W]."""
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    masks = F.one_hot(torch.where(regions == IGNORE, c, regions).long(), c + 1)[..., :c].movedim(-1, 1)
    return (masks.to(unit.dtype)[:, :, None] * unit[:, None]).sum((3, 4))


def pool_one_hot(features: Tensor, regions: Tensor, c: int) -> Tensor:
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    masks = F.one_hot(torch.where(regions == IGNORE, c, regions).long(), c + 1)[..., :c].to(unit.dtype)
    return masks.flatten(1, 2).mT @ unit.flatten(2).mT


def pool_norm_in_mask(features: Tensor, regions: Tensor, c: int) -> Tensor:
    """The norm divides the masks [B,C,H,W], not the features."""
    up = upsample(features, regions.shape[-2:])
    norm = torch.linalg.vector_norm(up, dim=1).clamp_min(EPS)  # [B,H,W]
    classes = torch.arange(c, device=up.device)[:, None, None]
    masks = (regions[:, None] == classes) / norm[:, None]
    return masks.to(up.dtype).flatten(2) @ up.flatten(2).mT


# -- contrast: (features [B,D,h,w], prototypes [C,D] or [B,C,D], regions [B,H,W]) -> [] --------------------------------


def contrast_materialised(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    table = F.normalize(prototypes, dim=-1).expand(len(unit), -1, -1)
    logits = torch.einsum("bdhw,bcd->bchw", unit, table) / TEMPERATURE
    return F.cross_entropy(logits, regions.long(), ignore_index=IGNORE)


def contrast_norm_on_logits(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    """The dots are upsampled with the features they are linear in: D meets H×W in the norm alone."""
    table = F.normalize(prototypes, dim=-1).expand(len(features), -1, -1)
    dots = torch.einsum("bdhw,bcd->bchw", features, table)
    norm = torch.linalg.vector_norm(upsample(features, regions.shape[-2:]), dim=1, keepdim=True)
    logits = upsample(dots, regions.shape[-2:]) / (norm.clamp_min(EPS) * TEMPERATURE)
    return F.cross_entropy(logits, regions.long(), ignore_index=IGNORE)


def _rows(features: Tensor, prototypes: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(unit features [P,D], unit prototypes [C,D], labels [P]), one row a pixel, as losses for language models ask."""
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    return unit.movedim(1, -1).flatten(0, 2), F.normalize(prototypes, dim=1), regions.flatten().long()


def contrast_ppc(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    """PPC's (Du et al. 2022): each pixel's own prototype gathered, [P,D], beside the product with all of them."""
    unit, table, labels = _rows(features, prototypes, regions)
    unit, labels = unit[labels != IGNORE], labels[labels != IGNORE]
    own = torch.exp((unit * table[labels]).sum(1) / TEMPERATURE)
    every = torch.exp(unit @ table.T / TEMPERATURE).sum(1)
    return -(own / every).log().mean()


def contrast_linear_cross_entropy(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    """torch's, which takes the product and the loss together (torch 2.13 and later)."""
    unit, table, labels = _rows(features, prototypes, regions)
    return F.linear_cross_entropy(unit, table / TEMPERATURE, labels, ignore_index=IGNORE)


def contrast_liger(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    unit, table, labels = _rows(features, prototypes, regions)
    found = liger_fused_linear_cross_entropy(unit, table / TEMPERATURE, labels, ignore_index=IGNORE)
    return found[0] if isinstance(found, tuple) else found


def contrast_cut_cross_entropy(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    """Apple's. Its kernels are for GPUs and half precision; elsewhere its own compiled form stands in."""
    from cut_cross_entropy import linear_cross_entropy

    unit, table, labels = _rows(features, prototypes, regions)
    kernels = unit.is_cuda and unit.dtype != torch.float32
    return linear_cross_entropy(
        unit,
        (table / TEMPERATURE).to(unit.dtype),
        labels,
        ignore_index=IGNORE,
        impl="cce" if kernels else "torch_compile",
    )


# -- the step ----------------------------------------------------------------------------------------------------------


def pooled(pool: Callable[[Tensor, Tensor, int], Tensor], c: int) -> Callable[..., Tensor]:
    """A scalar that reaches every sum with a weight of its own, so that pooling has a gradient to compare."""

    def loss(features: Tensor, regions: Tensor, seeds: Tensor) -> Tensor:  # seeds [B,C,D]
        return (pool(features, regions, c) * seeds).sum()

    return loss


def step(
    mask: Callable[..., Tensor],
    pool: Callable[[Tensor, Tensor, int], Tensor],
    contrast: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[..., Tensor]:
    """RCM's step: region mask from SupportNet's CAMs, prototypes from its features, MainNet's pixels against those.

    As `pssl.method.terms.rcm.RCM`, whose `leave_one_out` it calls; a table of `memory` stands for the prototypes of
    earlier batches, so that every region has one.
    """

    def loss(
        features: Tensor, support: Tensor, memory: Tensor, image_labels: Tensor, **cams: Tensor
    ) -> Tensor:
        with torch.no_grad():
            regions = mask(image_labels, **cams)  # uint8 [B,H,W]
            sums = pool(support, regions, len(memory))  # [B,C,D]
            own, present = F.normalize(sums.float(), dim=-1), sums.abs().amax(-1) > 0
            held = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
            prototypes, _ = leave_one_out(own, present, own, present, memory, held)
        return contrast(features, prototypes.to(features.dtype), regions)

    return loss
