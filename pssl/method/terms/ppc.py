"""PPC, pixel-to-prototype contrast on top of SEAM (Du et al., CVPR 2022).

Two views of an image give features, refined scores, and from these pseudo labels and prototypes; each view's pixels are
contrasted with the other view's prototypes, with the other view's labels, and, hard ones only, with their own.

Where the published code leaves something to chance it is fixed here: a class that no image of the batch has gives no
prototype and is left out of the softmax (there pixels of other classes stand for it), and the prototype of the
background is that of all pixels so labelled (there, of any few, for its score is the same everywhere).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pssl.config.values import Floats
from pssl.core.ranks import gather_rows, sum_over_ranks
from pssl.method.terms.base import Step, Term
from pssl.method.terms.registry import register
from pssl.method.terms.seam import spread
from pssl.models.cam_net import CamOutput
from pssl_ext import prototype_contrast, prototype_pool


@dataclass
class PPCConfig:
    """The baseline PPC, pixel-to-prototype contrast on SEAM (Du et al., CVPR 2022); values of its published code."""

    weight: float = 0.1
    """Weight of the contrast (PPC on SEAM: 0.1)."""
    temperature: float = 0.1
    """Temperature of the softmax over cosines (PPC: 0.1)."""
    background: float = 0.2
    """Score of the background beside the refined CAMs in 0..1 (PPC on SEAM: 0.2)."""
    top_share: float = 0.125
    """A prototype is the mean of a class's most confident pixels of the batch, this share of one image's grid in number
    (PPC on SEAM: 1/8)."""
    negatives: Floats = (3 / 21, 13 / 21)
    """Prototypes that count against a pixel of its own view, as a range of their ranks by similarity (PPC: the 4th to
    the 13th of 21)."""


@dataclass(frozen=True)
class View:
    """One view on the common grid."""

    features: Tensor
    """[B,D,h,w]"""
    labels: Tensor
    """Pseudo labels, int64 [B,h,w]."""
    prototypes: Tensor
    """[C,D], of all ranks' images."""
    valid: Tensor
    """bool [C], true where there is a prototype."""


@torch.no_grad()
def confidences(refined: Tensor, image_labels: Tensor, background: float) -> Tensor:  # [B,C,h,w], [B,K]
    """Scores of the regions, [B,C,h,w]: refined scores spread over 0..1, absent classes 0, background a constant."""
    scores = spread(refined)[:, 1:] * image_labels[:, :, None, None]
    return torch.cat([torch.full_like(scores[:, :1], background), scores], 1)


def view_of(features: Tensor, refined: Tensor, image_labels: Tensor, config: PPCConfig) -> View:
    """A view's pseudo labels and prototypes from features [B,D,h,w] and refined scores [B,C,h,w] of one grid.

    Class prototypes are the means, weighted by confidence, of the features of the batch's most confident pixels
    (`top_share` of a grid's pixels for each class), L2-normalised.
    """
    with torch.no_grad():
        scores = confidences(refined, image_labels, config.background)
        labels = scores.argmax(1)
        regions = scores.shape[1]
        count = max(int(scores.shape[2] * scores.shape[3] * config.top_share), 1)
        everyone = gather_rows(scores).transpose(0, 1).flatten(1)  # [C,N·h·w]
        least = everyone.topk(min(count, everyone.shape[1])).values[:, -1]
        weights = torch.where(scores >= least[:, None, None], scores, 0.0)
        weights[:, 0] = labels == 0
        sums, mass = prototype_pool(features.detach(), weights, regions, normalize=False)
        sums, mass = sum_over_ranks(sums.sum(0)), sum_over_ranks(mass.sum(0))
        return View(features, labels, F.normalize(sums, dim=-1), mass > 0)


def hard_contrast(view: View, config: PPCConfig) -> Tensor:
    """A view's pixels against its own prototypes, hard ones of both, a scalar: the mean over its regions.

    Of the prototypes, by falling similarity, the first seventh is passed over and those up to three fifths count
    (the pixel's own always does). Of a region's pixels half are drawn at random and half are the least similar to
    their prototype, but for the very least tenth. Draws come from torch's global generator.
    """
    pixels = F.normalize(view.features.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    cosines = pixels @ view.prototypes.t()  # [n,C]
    labels = view.labels.flatten()
    usable = view.valid[labels]
    own = cosines.gather(1, labels[:, None])[:, 0]
    with torch.no_grad():
        order = cosines.masked_fill(~view.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        ranks = order.argsort(dim=1)
        regions = int(view.valid.sum())
        first, last = int(regions * config.negatives[0]), max(int(regions * config.negatives[1]), 1)
        counts = (ranks >= first) & (ranks < last) & view.valid
        counts.scatter_(1, labels[:, None], False)
    logits = torch.cat([own[:, None], cosines.masked_fill(~counts, -torch.inf)], 1) / config.temperature
    losses = logits.logsumexp(1) - logits[:, 0]
    total, regions = losses.new_zeros(()), 0
    for region in labels[usable].unique():
        members = (usable & (labels == region)).nonzero().flatten()
        half, most = len(members) // 2, int(len(members) * 0.6)
        if not half:
            continue
        drawn = members[torch.randperm(len(members), device="cpu")[:half].to(members.device)]
        hardest = members[own.detach()[members].argsort(dim=0, stable=True)[most - half : most]]
        total = total + losses[torch.cat([drawn, hardest])].mean()
        regions += 1
    return total / max(regions, 1)


def ppc_loss(first: CamOutput, second: CamOutput, image_labels: Tensor, config: PPCConfig) -> Tensor:
    """The sum of the cross-prototype, the cross-label and the intra-view contrast, each the mean of both views.

    Both views are brought to the grid of the second. A float32 scalar.
    """
    size = tuple(second.cam.shape[2:])
    views = []
    for output in (first, second):
        maps = [
            F.interpolate(m.float(), size=size, mode="bilinear", align_corners=True)
            for m in (output.features, output.refined.detach())
        ]
        views.append(view_of(*maps, image_labels, config))
    loss = views[0].features.new_zeros((), dtype=torch.float32)
    for own, other in (views, views[::-1]):
        for prototypes, labels in ((other, own.labels), (own, other.labels)):
            loss = loss + prototype_contrast(
                own.features,
                prototypes.prototypes,
                labels,
                temperature=config.temperature,
                valid=prototypes.valid,
            )
        loss = loss + hard_contrast(own, config)
    return loss / 2


@register
class PPCTerm(Term):
    """Pixel-to-prototype contrast of SEAM's two views."""

    name = "ppc"
    Config = PPCConfig
    needs = ("seam",)  # whose refined CAMs it reads

    @property
    def main_scales(self) -> tuple[float, ...]:
        """SEAM's second view."""
        return (self.setting.method.seam.scale,)

    def forward(self, step: Step) -> Tensor:
        """Return the loss, a scalar."""
        second = step.main[self.setting.method.seam.scale]
        return ppc_loss(step.main[1.0], second, step.image_labels, self.config)
