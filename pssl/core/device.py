"""The device that a run computes on."""

from __future__ import annotations

import os

import torch

from pssl.core.errors import InputError


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA where there is one, else the CPU.

    "cuda" is this rank's device under torchrun, else the first. Raises InputError for a name that is no device, and for
    a device that is not there.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not cuda:
        raise InputError(f"device: expected auto or cpu, since torch sees no CUDA device here, got {name!r}")
    if device.type != "cuda":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices, got cuda:{index}"
        )
    return torch.device("cuda", index)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory order of images and convolutions."""
    return torch.channels_last if channels_last else torch.contiguous_format
