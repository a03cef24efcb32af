"""The prototype readout: how much nearer a pixel's feature is to a class's prototype than to the background's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pssl.models.prototypes import Prototypes
from pssl_ext import pixel_refine


def prototype_margin(
    features: Tensor,  # [B,D,h,w]
    prototypes: Prototypes,
    image_labels: Tensor,  # bool [B,K]
) -> Tensor:
    """p_c - p_background for each class c, [B,K,h,w]; p = softmax of cosines over the image's valid regions.

    Absent classes have p = 0; without a valid background p_background = 0.
    """
    cosines = torch.einsum("bdhw,cd->bchw", F.normalize(features.float(), dim=1), prototypes.rows)
    everywhere = torch.ones_like(image_labels[:, :1])
    allowed = torch.cat([everywhere, image_labels], 1) & prototypes.valid
    logits = (cosines / prototypes.temperature).masked_fill(~allowed[..., None, None], -torch.inf)
    probability = logits.softmax(1).nan_to_num(0.0)
    return probability[:, 1:] - probability[:, :1]


def readout_maps(
    features: list[Tensor],  # T x [B,D,h,w], the features of T scales
    prototypes: Prototypes,
    image_labels: Tensor,  # [B,K]
    *,
    size: tuple[int, int],
    pixels: Tensor | None = None,  # [B,3,*,*] in 0..1
    dilations: Sequence[int] = (),
) -> Tensor:
    """The readout of several scales as maps [B,K,H,W] of that size, in 0..1.

    The map of a present class is (1 + mean over scales of its margin, resized bilinearly) / 2, so that 0.5 is where
    class and background are equally likely; that of an absent class is 0. With `dilations` the margins follow the
    colours of `pixels` first, by pixel-adaptive refinement (`pssl_ext.pixel_refine`) on this grid.
    """
    present = image_labels > 0
    margin = sum(
        F.interpolate(
            prototype_margin(f, prototypes, present), size=size, mode="bilinear", align_corners=False
        )
        for f in features
    ) / len(features)
    if len(dilations):
        if pixels is None:
            raise ValueError("readout_maps: pixels expected [B,3,*,*] with dilations, got None")
        margin = _refined(margin, present, pixels, dilations)
    return ((1 + margin) / 2).masked_fill(~present[..., None, None], 0.0)


def _refined(margin: Tensor, present: Tensor, pixels: Tensor, dilations: Sequence[int]) -> Tensor:
    """Margins [B,K,H,W] of the present classes after refinement; PAR's weights sum to 1 + its position weight."""
    images = F.interpolate(
        pixels, size=margin.shape[2:], mode="bilinear", align_corners=False, antialias=True
    )
    iterations, position_weight = 10, 0.01  # PAR's own
    refine = partial(
        pixel_refine, dilations=dilations, iterations=iterations, position_weight=position_weight
    )
    if margin.device.type == "cpu":
        # Of 20 classes an image has two or three: their maps come first, the others' are left out. On a GPU the largest
        # number of them is not asked for, since that would wait for the device.
        order = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        order = order[:, : int(present.sum(1).max())][..., None, None].expand(-1, -1, *margin.shape[2:])
        refined = margin.scatter(1, order, refine(images, margin.gather(1, order)))
    else:
        refined = refine(images, margin)
    return refined / (1 + position_weight) ** iterations


def map_regions(
    maps: Tensor,  # [B,K,H,W] in 0..1
    *,
    foreground: float,
    background: float,
    ignore_index: int = 255,
) -> Tensor:
    """A region mask uint8 [B,H,W] by class maps: a pixel belongs to its best class where that map is at least
    `foreground`, to the background where it is below `background`, and is ignored between."""
    best, index = maps.max(1)
    regions = torch.where(best >= foreground, index + 1, ignore_index)
    return torch.where(best < background, 0, regions).to(torch.uint8)
