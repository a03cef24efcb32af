"""Each operator at the size that training has, on any device: many blocks, many tiles, some labels ignored."""

from __future__ import annotations

from typing import Any

import torch
from cases import case_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


def real_size(op: str, device: str = "cuda") -> dict[str, Any]:
    """Return the public function's arguments by name; the same values on every device."""
    args = case_of(op).training_size(torch.Generator().manual_seed(41))
    return tree_map_only(Tensor, lambda t: t.to(device), args)


def smooth_areas(g: torch.Generator, channels: int, height: int, width: int) -> Tensor:
    """Return [channels,H,W] in 0..1, smooth."""
    rough = torch.rand(1, channels, height // 24, width // 24, generator=g)
    return F.interpolate(rough, size=(height, width), mode="bilinear")[0]


def label_areas(g: torch.Generator, count: int, regions: int, height: int, width: int) -> Tensor:
    """Return uint8 [count,H,W]: areas of one label, a tenth of the pixels ignored."""
    labels = torch.stack([smooth_areas(g, regions, height, width).argmax(0) for _ in range(count)])
    return labels.where(torch.rand(labels.shape, generator=g) > 0.1, 255).to(torch.uint8)


def present_classes(g: torch.Generator) -> Tensor:
    """Return image labels [4,20]."""
    return (torch.rand(4, 20, generator=g) < 0.15).float()
