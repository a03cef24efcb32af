"""Several processes as one: `torchrun --nproc-per-node N -m pssl.train`.

Each rank takes a contiguous share of every batch, in rank order, so that gathered rows stand in the order of the
global batch. Gradients and batch-norm statistics are averaged, counts are summed, prototypes are gathered. With one
process every function here returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def start(device: torch.device) -> None:
    """Join the process group that torchrun announces in the environment; nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this rank writes the files and the log."""
    return rank() == 0


def wait() -> None:
    """Until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's contiguous share of `items`; shares differ in length by one at most."""
    ranks, own = world_size(), rank()
    return items[len(items) * own // ranks : len(items) * (own + 1) // ranks]


def gather_rows(rows: Tensor) -> Tensor:  # [n,...], n the same on all ranks
    """All ranks' rows [N,...], in rank order, without gradient."""
    if world_size() == 1:
        return rows
    plain = rows.detach().to(torch.uint8) if rows.dtype == torch.bool else rows.detach()
    parts = [torch.empty_like(plain) for _ in range(world_size())]
    dist.all_gather(parts, plain.contiguous())
    return torch.cat(parts).to(rows.dtype)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The element-wise sum over all ranks; a new tensor."""
    value = value.clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, all in one message."""
    tensors = list(tensors)
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def synchronise(net: nn.Module) -> None:
    """After backward: mean gradients and mean running statistics on every rank."""
    average_(p.grad for p in net.parameters() if p.grad is not None)
    average_(b for b in net.buffers() if b.is_floating_point())
