"""AffinityNet: features whose distance says whether two pixels belong together (Ahn & Kwak, CVPR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pssl.data.voc import IGNORE
from pssl_ext.ops._reference import shifted
from pssl_ext.ops.random_walk import feature_affinities, neighbours, shrunk_radius

EPS = 1e-5  # added inside the logarithms, as AffinityNet's code does


class AffinityHead(nn.Module):
    """Two 1x1 convolutions, each with ELU, from the CAM network's features to affinity features.

    Args:
        features: channels of the CAM network's features.
        dim: channels of the affinity features.
    """

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(features, dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, features: Tensor) -> Tensor:  # [B,D,h,w]
        """Affinity features [B,dim,h,w]."""
        return F.elu(self.out(F.elu(self.hidden(features))))


def affinity_losses(
    features: Tensor,  # [B,dim,h,w]
    labels: Tensor,  # uint8 [B,h,w], 255: not sure
    radius: int,
) -> dict[str, Tensor]:
    """AffinityNet's loss (eq. 4 to 7) over all pairs of sure cells less than `radius` apart.

    With a_ij = exp(-mean_d |f_i - f_j|): "foreground" is the mean of -log a over the pairs of one class, "background"
    that over the pairs of background, "different" the mean of -log(1 - a) over the pairs of two regions; a kind of
    pair that is not there counts 0. "total" = foreground / 4 + background / 4 + different / 2.
    """
    offsets = [o for o in neighbours(shrunk_radius(radius, *labels.shape[1:])) if o > (0, 0)]
    sums = features[:0].sum() + features.new_zeros(
        3
    )  # on a map without pairs too, a loss that has a gradient
    counts = features.new_zeros(3)
    for own_features, own_labels in zip(features, labels, strict=True):
        if not offsets:
            break
        affinity = feature_affinities(own_features, offsets, 1.0)
        others = torch.stack(shifted(own_labels, offsets, outside=IGNORE))
        sure = (own_labels != IGNORE) & (others != IGNORE)
        same = sure & (own_labels == others)
        kinds = (same & (own_labels > 0), same & (own_labels == 0), sure & (own_labels != others))
        costs = (-(affinity + EPS).log(), -(affinity + EPS).log(), -(1 + EPS - affinity).log())
        sums = sums + torch.stack([torch.where(k, c, 0).sum() for k, c in zip(kinds, costs, strict=True)])
        counts = counts + torch.stack([kind.sum() for kind in kinds])
    foreground, background, different = sums / counts.clamp(min=1)
    total = foreground / 4 + background / 4 + different / 2
    return {"foreground": foreground, "background": background, "different": different, "total": total}
