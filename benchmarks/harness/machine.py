"""What a run was made on and with."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from pssl.scoring.results import commit, versions

PEERS = (
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "torchmetrics",
    "pydensecrf2",
    "scipy",
)


def describe_machine(device: str, cache: int | None = None) -> dict[str, object]:
    """The machine: what results of one file have in common. ``cache``: its bytes, if Linux is not to be believed."""
    on_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{_processor()} {simd()}"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", _plain(name).lower()).strip("-")
        + ("" if on_gpu else f"-{cores()}-cores"),
        "device": torch.device(device).type,
        "processor": torch.cuda.get_device_name() if on_gpu else _processor(),
        "simd": simd(),
        "cores": cores(),
        "cache_bytes": cache or cache_bytes(torch.device(device)),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_run() -> dict[str, object]:
    """When, from which commit, with how many threads and which versions."""
    found = dict(versions())
    for peer in PEERS:
        try:
            found[peer] = metadata.version(peer)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(but="benchmarks/results") or "unknown",  # saving a run is no change
        "threads": torch.get_num_threads(),
        "versions": found,
    }


def cores() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def simd() -> str:
    return torch.backends.cpu.get_cpu_capability()


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: where Linux does not tell, 32 MiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=2**25)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _plain(name: str) -> str:
    """Without trade marks and words that every processor's name holds."""
    return re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*GHz", " ", name)
