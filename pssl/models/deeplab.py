"""DeepLab: a segmentation network of a backbone and one of three heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pssl.config.model import Fixed, Head
from pssl.core.errors import InputError
from pssl.data.transforms import multi_scale, to_float
from pssl.models.backbone_net import BackboneNet
from pssl.models.backbones import Backbone


class LargeFOV(nn.Module):
    """DeepLab v1's head with a large field of view (Chen et al., ICLR 2015): fc6 as a dilated 3x3 convolution, fc7 and
    the classifier as 1x1 ones.

    Args:
        channels: of the backbone.
        regions: C.
        dim: channels of fc6 and fc7 (DeepLab: 1024).
        rate: dilation of fc6 (DeepLab: 12 at stride 8).
        dropout: after fc6 and fc7 (DeepLab: 0.5).
    """

    def __init__(self, channels: int, regions: int, dim: int, rate: int, dropout: float) -> None:
        super().__init__()
        self.fc6 = nn.Conv2d(channels, dim, 3, padding=rate, dilation=rate)
        self.fc7 = nn.Conv2d(dim, dim, 1)
        self.classifier = nn.Conv2d(dim, regions, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, activations: Tensor) -> Tensor:  # [B,channels,h,w]
        """Return logits [B,C,h,w]."""
        x = self.dropout(F.relu(self.fc6(activations)))
        return self.classifier(self.dropout(F.relu(self.fc7(x))))


class V2(nn.Module):
    """DeepLab v2's head on a ResNet (Chen et al., PAMI 2017): dilated 3x3 classifiers, their logits added up.

    Args:
        channels: of the backbone.
        regions: C.
        rates: dilations, one a classifier (ASPP-L: 6, 12, 18, 24 at stride 8).
    """

    def __init__(self, channels: int, regions: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(
            nn.Conv2d(channels, regions, 3, padding=rate, dilation=rate) for rate in rates
        )

    def forward(self, activations: Tensor) -> Tensor:  # [B,channels,h,w]
        """Return logits [B,C,h,w]."""
        return sum(classifier(activations) for classifier in self.classifiers)


def _conv(inputs: int, outputs: int, kernel: int = 1, rate: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU, at an unchanged size."""
    padding = rate * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class V3Plus(nn.Module):
    """DeepLab v3+'s head (Chen et al., ECCV 2018): atrous spatial pyramid pooling, and a decoder on a finer grid.

    The branch that pools the whole image has a bias in place of batch norm, which a batch of one image has no
    statistics for.

    Args:
        channels: of the backbone's output.
        fine_channels: of the finer activations.
        regions: C.
        dim: channels of every branch and of the decoder (v3+: 256).
        rates: dilations of the 3x3 branches (v3+: 6, 12, 18 at stride 16).
        dropout: before the classifier.
    """

    FINE = 48  # channels that the finer activations are brought to (v3+)

    def __init__(
        self, channels: int, fine_channels: int, regions: int, dim: int, rates: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_conv(channels, dim), *(_conv(channels, dim, 3, r) for r in rates)])
        self.whole = nn.Conv2d(channels, dim, 1)
        self.project = _conv(dim * (len(rates) + 2), dim)
        self.fine = _conv(fine_channels, self.FINE)
        self.decoder = nn.Sequential(
            _conv(dim + self.FINE, dim, 3), _conv(dim, dim, 3), nn.Dropout2d(dropout)
        )
        self.classifier = nn.Conv2d(dim, regions, 1)

    def forward(self, activations: Tensor, fine: Tensor) -> Tensor:  # [B,channels,h,w], [B,fine_channels,H,W]
        """Return logits [B,C,H,W]."""
        pooled = F.relu(self.whole(activations.mean((2, 3), keepdim=True))).expand(
            -1, -1, *activations.shape[2:]
        )
        x = self.project(torch.cat([*(branch(activations) for branch in self.branches), pooled], 1))
        x = F.interpolate(x, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.classifier(self.decoder(torch.cat([x, self.fine(fine)], 1)))


class DeepLab(BackboneNet):
    """A backbone and a head.

    Args:
        backbone: of :mod:`pssl.models.backbones`; for "v3plus" one with `fine_channels`.
        regions: C, background included.
        head: "largefov", "v2" or "v3plus".
        dim: channels of the head; "v2" has none of its own.
        rates: dilations; "largefov" takes one, "v2" one a classifier, "v3plus" one a branch.
        dropout: of the head; "v2" has none.
        frozen, fixed: what of the backbone training leaves as it is (:class:`BackboneNet`). A batch norm precedes the
            head on a frozen one, whose channels differ in scale.

    Raises InputError, naming the argument, for another head, another number of rates, a backbone without a finer grid.
    """

    def __init__(
        self,
        backbone: Backbone,
        regions: int,
        *,
        head: Head = "largefov",
        dim: int = 256,
        rates: Sequence[int] = (12,),
        dropout: float = 0.5,
        fixed: Fixed = "nothing",
        frozen: bool = False,
    ) -> None:
        super().__init__(backbone, frozen=frozen, fixed=fixed)
        if head not in get_args(Head):
            raise InputError(f"head: expected 'largefov', 'v2' or 'v3plus', got {head!r}")
        if head == "largefov":
            if len(rates) != 1:
                raise InputError(f"rates: expected one dilation for largefov, got {list(rates)}")
            self.head = LargeFOV(backbone.channels, regions, dim, rates[0], dropout)
        elif not rates:
            raise InputError(f"rates: expected one dilation or more for {head}, got none")
        elif head == "v2":
            self.head = V2(backbone.channels, regions, rates)
        else:
            if frozen:
                raise InputError("head: expected largefov or v2 for a frozen backbone, got v3plus")
            if backbone.fine_channels is None:
                raise InputError(
                    f"head: expected largefov or v2 for {type(backbone).__name__}, which has no finer map; got v3plus"
                )
            self.head = V3Plus(backbone.channels, backbone.fine_channels, regions, dim, rates, dropout)
        if frozen:
            self.head = nn.Sequential(nn.BatchNorm2d(backbone.channels), self.head)

    def forward(self, images: Tensor) -> Tensor:  # [B,3,H,W], normalised by the backbone's `normalise`
        """Return logits [B,C,h,w], on the finer grid for "v3plus", else on the backbone's."""
        if isinstance(self.head, V3Plus):
            maps = self.backbone.pyramid(images)
            return self.head(maps.activations, maps.fine)
        return self.head(self.backbone(images))

    @torch.no_grad()
    def probabilities(
        self,
        image: Tensor,  # uint8 [3,H,W]
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> Tensor:
        """Return the mean softmax over `scales`, and over mirrored passes with `flip`, at the image's size: [C,H,W].

        Float32, on the network's device; in the mode that the network is in.
        """
        device = next(self.parameters()).device
        pixels = self.backbone.normalise(to_float(image[None].to(device)))
        total = torch.zeros((), device=device)
        for resized in multi_scale(pixels, scales):
            for mirrored in (False, True) if flip else (False,):
                logits = self(resized.flip(3) if mirrored else resized).float()
                logits = logits.flip(3) if mirrored else logits
                total = total + resize(logits, image.shape[1:]).softmax(1)
        return total[0] / (len(scales) * (2 if flip else 1))


def resize(logits: Tensor, size: Sequence[int]) -> Tensor:  # [B,C,h,w]
    """Resize logits to label resolution, bilinearly: [B,C,H,W]."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:  # [B,C,h,w], uint8 [B,H,W], 255: ignored
    """Return the mean cross-entropy over the pixels that count, at label resolution.

    Where none counts it is 0, with a gradient of 0.
    """
    logits, labels = resize(logits.float(), labels.shape[1:]), labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    return total / (labels != 255).sum().clamp(min=1)
