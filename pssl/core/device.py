"""The device that a run computes on."""

from __future__ import annotations

import os

import torch


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA (this rank's, under torchrun) where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory order of images and convolutions."""
    return torch.channels_last if channels_last else torch.contiguous_format
