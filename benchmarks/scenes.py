"""Made inputs that are like real ones where that matters for the time: areas, few classes an image, smooth CAMs."""

from __future__ import annotations

import torch
from peers.rcm import IGNORE, upsample
from torch import Tensor

SCALES = (0.5, 1.0, 1.5, 2.0)  # SupportNet's


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def blobs(g: torch.Generator, *shape: int) -> Tensor:
    """Smooth maps, as CAMs are."""
    return upsample(torch.randn(*shape[:-2], 6, 8, generator=g), shape[-2:])


def region_mask(
    g: torch.Generator, batch: int, c: int, size: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Areas of c classes, a tenth of the pixels ignored, [B,size,size]."""
    scores = torch.randn(batch, c, 7, 7, generator=g)
    labels = upsample(scores, (size, size)).argmax(1)
    labels[torch.rand(labels.shape, generator=g) < 0.1] = IGNORE
    return labels.to(dtype)


def image_labels(g: torch.Generator, batch: int, classes: int) -> Tensor:
    """One class or two an image, by turns, [B,K]."""
    labels = torch.zeros(batch, classes)
    for b in range(batch):
        labels[b, torch.randperm(classes, generator=g)[: 1 + b % 2]] = 1
    return labels


def cam_pyramid(g: torch.Generator, name: str, batch: int, classes: int, base: int) -> dict[str, Tensor]:
    """{name_0: [B,K,h,w] …}: CAMs at each scale of a grid of side ``base``."""
    sides = [max(round(base * s), 1) for s in SCALES]
    return {f"{name}_{i}": blobs(g, batch, classes, side, side) for i, side in enumerate(sides)}


def on(device: str, **tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
