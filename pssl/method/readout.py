"""The prototype readout: how much nearer a pixel's feature is to a class's prototype than to the background's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Prototypes:
    """Class prototypes of a data set: `rows` [C,D] L2-normalised, `valid` bool [C], `temperature` of the softmax."""

    rows: Tensor
    valid: Tensor
    temperature: float


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


def readout_regions(
    features: list[Tensor],  # T x [B,D,h,w], the features of T scales
    prototypes: Prototypes,
    image_labels: Tensor,  # [B,K]
    *,
    size: tuple[int, int],
    foreground: float,
    background: float,
    ignore_index: int = 255,
) -> Tensor:
    """A region mask uint8 [B,H,W] of that size, by the readout instead of the CAMs.

    The map of a present class is (1 + mean over scales of its margin, resized bilinearly) / 2, in 0..1, so that 0.5 is
    where class and background are equally likely. A pixel belongs to its best class where that map is at least
    `foreground`, to the background where it is below `background`, and is ignored between.
    """
    present = image_labels > 0
    margin = sum(
        F.interpolate(
            prototype_margin(f, prototypes, present), size=size, mode="bilinear", align_corners=False
        )
        for f in features
    )
    maps = ((1 + margin / len(features)) / 2).masked_fill(~present[..., None, None], 0.0)
    best, index = maps.max(1)
    regions = torch.where(best >= foreground, index + 1, ignore_index)
    return torch.where(best < background, 0, regions).to(torch.uint8)
