"""SEAM, the equivariant baseline: CAMs of an image and of its smaller self shall agree (Wang et al. 2020).

The losses are those of the published training code, on the pixels of the smaller view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pssl.method.terms.base import Step, Term
from pssl.method.terms.registry import register
from pssl.models.build import new_pixel_correlation
from pssl.models.cam_net import CamNet, CamOutput

EPS = 1e-5


@dataclass
class SEAMConfig:
    """The baseline SEAM (Wang et al., CVPR 2020); values of its published training code."""

    weight: float = 1.0
    """Weight of equivariant regularisation, its cross form and the background term together (SEAM: 1)."""
    scale: float = 0.3
    """Scale of the second view (SEAM: 0.3)."""
    hard_share: float = 0.2
    """Share of the pixels, those that differ most, that the cross form looks at (SEAM: 0.2)."""


def spread(maps: Tensor) -> Tensor:  # [B,C,h,w]
    """Each map from its own minimum to its own maximum: relu(m - min - 1e-5) / (max - min + 1e-5), m = relu(map)."""
    maps = maps.float().relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low - EPS).relu() / (high - low + EPS)


def with_background(cam: Tensor) -> Tensor:  # [B,K,h,w] in 0..1
    """[B,1+K,h,w]: before the classes, 1 - the strongest of them."""
    return torch.cat([1 - cam.amax(1, keepdim=True), cam], 1)


def strongest_only(scores: Tensor) -> Tensor:  # [B,1+K,h,w]
    """Of the classes only the strongest keeps its score; the background keeps its own. A copy without gradient."""
    scores = scores.detach()
    classes = scores[:, 1:]
    kept = classes.masked_fill(classes != classes.amax(1, keepdim=True), 0)
    return torch.cat([scores[:, :1], kept], 1)


def least_quarter(refined: Tensor) -> Tensor:  # [B,1+K,h,w], absent classes 0
    """Mean of the lowest quarter of each image's strongest class scores: some of an image is background."""
    strongest = refined[:, 1:].amax(1).flatten(1)
    return strongest.topk(max(strongest.shape[1] // 4, 1), largest=False).values.relu().mean()


def seam_loss(
    first: CamOutput,  # scale 1
    second: CamOutput,  # the smaller view
    image_labels: Tensor,  # [B,K]
    size: tuple[int, int],
    config: SEAMConfig,
) -> Tensor:
    """Equivariant regularisation, its cross form with the pixel correlation module, and the background term.

    With all maps at `size`, A_v the spread CAM of view v times the image labels and R_v its refined scores likewise:
    mean |A_1 - A_2| + Σ_v (mean of the largest fifth of |strongest(A_w) - R_v|, w the other view) + mean over views of
    `least_quarter`. A float32 scalar.
    """
    present = image_labels[:, :, None, None].to(torch.float32)
    everywhere = torch.cat([torch.ones_like(present[:, :1]), present], 1)

    def at_size(maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)

    cams = [at_size(spread(view.cam)) * present for view in (first, second)]
    loss = (cams[0] - cams[1]).abs().mean()
    scores = [with_background(cam) for cam in cams]
    for view, other in ((first, scores[1]), (second, scores[0])):
        refined = at_size(spread(view.refined)) * everywhere
        difference = (strongest_only(other) - refined).abs().flatten(1)
        hard = max(int(difference.shape[1] * config.hard_share), 1)
        loss = loss + difference.topk(hard).values.mean()
        loss = loss + least_quarter(view.refined * everywhere) / 2
    return loss


@register
class SEAMTerm(Term):
    """Equivariant regularisation of two views, with the pixel correlation module that MainNet is given for it."""

    name = "seam"
    Config = SEAMConfig

    @property
    def main_scales(self) -> tuple[float, ...]:
        """The second view."""
        return (self.config.scale,)

    @property
    def views(self) -> tuple[float, ...]:
        """SEAM classifies both of its views."""
        return (self.config.scale,)

    def equip(self, net: CamNet, seed: int) -> None:
        """Give MainNet the pixel correlation module."""
        new_pixel_correlation(net, seed)

    def forward(self, step: Step) -> Tensor:
        """Return the loss, a scalar."""
        side = max(round(self.setting.size * self.config.scale), 1)
        first, second = step.main[1.0], step.main[self.config.scale]
        return seam_loss(first, second, step.image_labels, (side, side), self.config)
