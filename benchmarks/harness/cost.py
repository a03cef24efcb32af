"""What a call costs beside its time: kernel launches, and the most bytes that it holds at one time beyond what was
there before it, results and gradients among them."""

from __future__ import annotations

import ctypes
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pssl_ext import release_memory

from .problem import Problem

Peaks = tuple[int, int]  # bytes of the forward pass, of both
Call = Callable[[Callable[[], None]], object]
_MARK = "benchmark: forward done"


def with_peaks(problem: Problem, provider: str) -> tuple[list[Tensor], Peaks]:
    """A call's results and its peaks. The call is the provider's first one on a CPU: it warms up and compiles.

    numpy: tracemalloc's peak. Else as ``peaks_of``, with ``resident`` for ours and for ``own_memory``.
    """
    found: list[list[Tensor]] = []

    def call(done: Callable[[], None] = lambda: None) -> None:
        found[:] = [problem.call(provider, problem.inputs, done)]

    if provider in problem.in_numpy:
        peaks = _in_numpy(call)
        return found[0], peaks
    peaks = peaks_of(call, problem.device, provider == problem.ours or provider in problem.own_memory)
    return found[0], peaks


def peaks_of(call: Call, device: torch.device, resident: bool) -> Peaks:
    """The peaks of a call, which is to call its argument when the forward pass is done.

    GPU: the caching allocator's peak, of a second call. CPU: running sum of the profiler's allocation events; it sees
    what goes through PyTorch's allocator, and no scratch that a kernel takes from malloc itself: with ``resident``, a
    further call shows by how much the process grows.
    """
    if device.type == "cuda":
        return _on_gpu(call)
    peaks = _in_torch(call)
    return tuple(max(pair) for pair in zip(peaks, _resident(call), strict=True)) if resident else peaks


def _on_gpu(call: Call) -> Peaks:
    call(lambda: None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, forward = torch.cuda.memory_allocated(), []
    call(lambda: forward.append(torch.cuda.max_memory_allocated()))
    return forward[0] - before, torch.cuda.max_memory_allocated() - before


def _in_numpy(call: Call) -> Peaks:
    tracemalloc.start()
    call(lambda: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, peak


def _in_torch(call: Call) -> Peaks:
    events, forward_end = _profiled(call, torch.profiler.ProfilerActivity.CPU)
    now = forward = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
            if event.start_ns() <= forward_end:
                forward = peak
    return forward, peak


def launches(problem: Problem, provider: str) -> tuple[int, int] | None:
    """Kernels that the forward pass launches, and both; None on a CPU."""
    if problem.device.type != "cuda":
        return None
    activities = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    events, forward_end = _profiled(lambda done: problem.call(provider, problem.inputs, done), *activities)
    starts = [e.start_ns() for e in events if "LaunchKernel" in e.name()]
    return sum(start <= forward_end for start in starts), len(starts)


def _profiled(call: Call, *activities: torch.profiler.ProfilerActivity) -> tuple[list, int]:
    """The profiler's events of a call in their order, and when its forward pass was done."""

    def mark() -> None:
        with torch.profiler.record_function(_MARK):
            pass

    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call(mark)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return events, next(e.start_ns() for e in events if e.name() == _MARK)


def _resident(call: Call) -> Peaks:
    """By how much the process's resident memory grows during a call; 0 where Linux does not tell."""
    try:
        # or memory that malloc or our kernels have kept would be taken again unseen
        ctypes.CDLL(None).malloc_trim(0)
        release_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, forward = _status("VmRSS"), []
        call(lambda: forward.append(_status("VmHWM")))
        return max(0, forward[0] - before), max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return 0, 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
