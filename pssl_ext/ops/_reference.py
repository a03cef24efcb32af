"""Pieces that several references share: accumulation type, bilinear resizing, L2 normalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: what sums are kept in, and what comes back."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def resize(maps: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear resizing of ``maps`` [B,*,h,w] to [B,*,H,W], exactly ``F.interpolate`` (nothing to do at equal size)."""
    if maps.shape[-2:] == tuple(size):
        return maps
    if 0 in maps.shape[1:] or 0 in size:  # F.interpolate refuses these; an empty batch it takes
        return maps.new_zeros(*maps.shape[:-2], *size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


def l2_normalize(x: Tensor, dim: int, eps: float) -> Tensor:
    """x / ‖x‖ along ``dim``; where ‖x‖ ≤ eps, zero with zero gradient.

    ``F.normalize`` differs there alone: it divides by eps, so that its gradient at a zero vector is 1/eps = 1e12.
    The inner ``where`` keeps the square root's infinite slope at 0 out of the gradient.
    """
    squared = (x * x).sum(dim, keepdim=True)
    zero = squared <= eps * eps
    return torch.where(zero, 0.0, x * torch.where(zero, 1.0, squared).rsqrt())
