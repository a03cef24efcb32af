"""SEAM's pixel correlation module: a CAM, averaged over pixels that look alike (Wang et al. 2020, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
WIDTHS = (64, 128)
"""Channels that the earlier activations are brought to, the shallower first (SEAM's f8_3 and f8_4)."""


class PixelCorrelation(nn.Module):
    """Refined region scores: sum over pixels j of score_j · relu(cos(φ_i, φ_j)), weights normalised over... i.

    φ is a 1x1 convolution of the (up to two) earlier activations and of the image's colours. Neither the CAM nor the
    activations receive a gradient, so only this module learns from the refined maps.

    Args:
        low_channels: channels of the earlier activations (one or two).
        colours: the normalised image takes part too; not with cached activations, which come without it.
    """

    def __init__(self, low_channels: Sequence[int], *, colours: bool) -> None:
        super().__init__()
        widths = WIDTHS[-len(low_channels) :]
        pairs = zip(low_channels, widths, strict=True)
        self.low = nn.ModuleList(nn.Conv2d(inputs, width, 1, bias=False) for inputs, width in pairs)
        self.colours = colours
        self.embed = nn.Conv2d(sum(widths) + (3 if colours else 0), 192, 1, bias=False)
        for layer in self.low:
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.embed.weight, gain=4)

    def forward(
        self,
        cam: Tensor,  # [B,K,h,w]
        low: Sequence[Tensor],  # [B,low_channels,h',w'] each
        images: Tensor | None,  # [B,3,H,W] normalised, if colours take part
    ) -> Tensor:
        """Region scores [B,1+K,h,w] in 0..1, background first, float32."""
        size = cam.shape[2:]
        parts = [_resized(images, size)] if self.colours else []
        for layer, activations in zip(self.low, low, strict=True):
            parts.append(layer(_resized(activations.detach().to(layer.weight.dtype), size)).relu())
        pixels = (
            self.embed(torch.cat([part.to(self.embed.weight.dtype) for part in parts], 1)).flatten(2).float()
        )
        with torch.autocast(cam.device.type, enabled=False):
            pixels = pixels / (pixels.norm(dim=1, keepdim=True) + EPS)
            alike = torch.einsum("bdi,bdj->bij", pixels, pixels).relu()
            alike = alike / (alike.sum(1, keepdim=True) + EPS)
            return torch.einsum("bci,bij->bcj", region_scores(cam).flatten(2), alike).unflatten(2, size)


@torch.no_grad()
def region_scores(cam: Tensor) -> Tensor:  # [B,K,h,w]
    """What the module averages, float32 [B,1+K,h,w]: each class over its maximum, 0 where another class is stronger.

    The background, first, is 1 - the strongest class.
    """
    cam = cam.float().relu()
    scores = (cam - EPS).relu() / (cam.amax((2, 3), keepdim=True) + EPS)
    strongest = scores.amax(1, keepdim=True)
    return torch.cat([1 - strongest, scores.masked_fill(scores < strongest, 0)], 1)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:  # [B,C,h,w]
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)
