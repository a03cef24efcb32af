"""Several processes as one: `torchrun --nproc-per-node N -m pssl.train`.

Each rank takes a contiguous share of every batch, in rank order, so that gathered rows stand in the order of the
global batch. Counts are summed, prototypes gathered, batch-norm statistics averaged; gradients are
DistributedDataParallel's (:mod:`pssl.training.loop`). With one process every function here returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
    return items[slice(*part(len(items), world_size(), rank()))]


def part(count: int, parts: int, index: int) -> tuple[int, int]:
    """Begin and end of part `index` of `count` things in `parts` contiguous parts that differ by one at most."""
    return count * index // parts, count * (index + 1) // parts


def gather_rows(rows: Tensor) -> Tensor:  # [n,...]
    """All ranks' rows [N,...], in rank order, without gradient; ranks may have different numbers of them."""
    if world_size() == 1:
        return rows
    plain = rows.detach().to(torch.uint8) if rows.dtype == torch.bool else rows.detach()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, counts[0].new_tensor([len(plain)]))
    lengths = [int(count) for count in counts]
    padded = plain.new_zeros(max(lengths), *plain.shape[1:])
    padded[: len(plain)] = plain
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(rows.dtype)


def share_of_mean(mean: Tensor, count: Tensor | int) -> Tensor:
    """From the mean over this rank's `count` things, its part in the mean over all ranks' things, times the ranks.

    The average of these over the ranks is the mean over all things, so that averaged gradients are those of one process
    with the whole batch. With nothing anywhere it is 0, like the means.
    """
    if world_size() == 1:
        return mean
    own = torch.as_tensor(count, dtype=torch.float32, device=mean.device)
    return mean * (own * world_size() / sum_over_ranks(own).clamp(min=1))


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
