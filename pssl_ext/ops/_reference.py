"""Pieces that several references share: accumulation type, bilinear resizing, neighbours, L2 normalisation."""

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


def resize_stepwise(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """``resize`` [*,h,w] to [*,H,W] in steps that every backend can repeat bit for bit: along y, then along x,
    (1 − t)·a + t·b with one rounding a step.

    F.interpolate computes the same, with last bits that depend on the processor's vector instructions. Where a
    threshold is compared with the result, those bits decide on a pixel.
    """
    if maps.shape[-2:] == tuple(size):
        return maps
    if 0 in maps.shape or 0 in size:
        return maps.new_zeros(*maps.shape[:-2], *size)
    for dim in (-2, -1):
        low, high, t = _taps(maps.shape[dim], size[dim], maps)
        t = t[:, None] if dim == -2 else t
        maps = (1 - t) * maps.index_select(dim, low) + t * maps.index_select(dim, high)
    return maps


def _taps(n: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``size`` outputs along an axis of ``n``: the two inputs and the share of the second."""
    out = torch.arange(size, dtype=torch.float64, device=like.device)
    # divided by a tensor: by a number, CUDA would multiply with the reciprocal
    source = ((out + 0.5) * n / torch.full_like(out, size) - 0.5).clamp_min(0)
    low = source.long().clamp_max(n - 1)
    share = torch.where(low == n - 1, 0.0, source - low)
    return low, (low + 1).clamp_max(n - 1), share.to(like.dtype)


def shifted(
    maps: Tensor,  # [*,h,w]
    offsets: list[tuple[int, int]],
    outside: float | str = 0.0,
) -> list[Tensor]:  # views [*,h,w], one an offset
    """For each offset (dy,dx) the maps with [y+dy,x+dx] at [y,x]; ``outside`` the map a number, or "replicate"."""
    h, w = maps.shape[-2:]
    reach = max([0, *(max(abs(dy), abs(dx)) for dy, dx in offsets)])
    if outside == "replicate":
        padded = F.pad(maps, [reach] * 4, mode="replicate")
    else:
        padded = F.pad(maps, [reach] * 4, value=outside)
    return [padded[..., reach + dy : reach + dy + h, reach + dx : reach + dx + w] for dy, dx in offsets]


def l2_normalize(x: Tensor, dim: int, eps: float) -> Tensor:
    """x / ‖x‖ along ``dim``; where ‖x‖ ≤ eps, zero with zero gradient.

    ``F.normalize`` differs there alone: it divides by eps, so that its gradient at a zero vector is 1/eps = 1e12.
    The inner ``where`` keeps the square root's infinite slope at 0 out of the gradient.
    """
    squared = (x * x).sum(dim, keepdim=True)
    zero = squared <= eps * eps
    return torch.where(zero, 0.0, x * torch.where(zero, 1.0, squared).rsqrt())
