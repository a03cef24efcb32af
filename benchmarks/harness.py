"""Runs providers of one computation beside each other: first do they agree, then time, memory, share of a copy's speed.

A problem is a set of tensors with several providers, functions that all compute the same from them. Nothing is timed
before all of them agree; then they take turns, so that a slow phase of the machine hits every one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pssl_ext

PASSES = ("forward", "forward+backward")
MOST_CALLS = 50  # for each provider and pass


@dataclass(frozen=True)
class Problem:
    """``providers``: name to a function of ``inputs`` that returns one scalar loss, whose gradient is taken to the
    ``inputs`` named in ``wanted``; where there are none, any tensor, and there is no backward pass.
    ``ours``: the provider that the ratios refer to. ``bytes_moved``: compulsory bytes of (forward, backward).
    ``in_numpy``: the providers whose memory is numpy's; ``own_memory``: those, besides ours, that take theirs from
    malloc. ``tolerance`` and ``exceptions``: see ``check_agreement``.
    """

    name: str
    inputs: dict[str, Tensor]
    wanted: tuple[str, ...]
    providers: dict[str, Callable[..., Tensor]]
    ours: str
    bytes_moved: tuple[int, int]
    in_numpy: tuple[str, ...] = ()
    own_memory: tuple[str, ...] = ()
    tolerance: float = 1e-4
    exceptions: float = 0.0

    def step(self, provider: str, backward: bool) -> list[Tensor]:
        """[loss, gradients …] of one call."""
        inputs = {n: t.detach() for n, t in self.inputs.items()}
        leaves = [inputs[n].requires_grad_(backward) for n in self.wanted]
        loss = self.providers[provider](**inputs)
        grads = torch.autograd.grad(loss, leaves) if backward and leaves else ()
        return [loss.detach(), *grads]


@dataclass(frozen=True)
class Result:
    problem: str
    provider: str
    work: str
    calls: int
    p20: float  # seconds
    p50: float
    p80: float
    ratio: float  # p50 to ours
    extra_bytes: int
    copy_share: float  # compulsory bytes / time, as a share of the copy bandwidth


def check_agreement(problem: Problem) -> dict[str, int]:
    """Loss and gradients of every provider against the first one's; stops with the difference.

    The tolerance is relative to the largest value: loose enough for float32 sums in any order, far below any mistake;
    ``exceptions`` is the share of values that may be further off (labels, where a last bit decides on a pixel).
    How near each is to the truth in float64 is the tests' business. Returns the peak extra bytes of each provider.
    """
    names = ["loss", *(f"grad {n}" for n in problem.wanted)]
    first, expected, memory = "", [], {}
    for provider in problem.providers:
        found, memory[provider] = _with_peak_bytes(problem, provider, True)
        first, expected = first or provider, expected or found
        for name, got, other in zip(names, found, expected, strict=True):
            largest, error = float(other.abs().max()), (got.double() - other.double()).abs()
            near = error <= problem.tolerance * largest
            if float((~near).double().mean()) > problem.exceptions:
                raise SystemExit(
                    f"{problem.name}: {provider} disagrees with {first}: {name} is {float(error.max()):.3g} away, "
                    f"largest value {largest:.3g}"
                )
    return memory


def measure(problem: Problem, bandwidth: float, seconds: float) -> list[Result]:
    """Agreement, then times. Each provider gets about ``seconds`` for each pass, more for three calls if these fit in
    eight times that; one that is slower still is called once."""
    memory = {"forward+backward": check_agreement(problem)}
    memory["forward"] = {name: _with_peak_bytes(problem, name, False)[1] for name in problem.providers}
    results = []
    for work in PASSES if problem.wanted else PASSES[:1]:
        backward = work != "forward"
        times: dict[str, list[float]] = {name: [] for name in problem.providers}
        waiting = set(times)
        while waiting:
            for name in problem.providers:
                if name in waiting:
                    times[name].append(_time(problem, name, backward))
                    calls, total = len(times[name]), sum(times[name])
                    if (total > seconds and calls >= 3) or total > 8 * seconds or calls == MOST_CALLS:
                        waiting.remove(name)
        middle = {name: _percentile(t, 50) for name, t in times.items()}
        compulsory = problem.bytes_moved[0] + (problem.bytes_moved[1] if backward else 0)
        for name, t in times.items():
            spread = (_percentile(t, 20), middle[name], _percentile(t, 80))
            share = compulsory / middle[name] / bandwidth
            ratio = middle[name] / middle[problem.ours]
            results.append(
                Result(problem.name, name, work, len(t), *spread, ratio, memory[work][name], share)
            )
    return results


def _time(problem: Problem, provider: str, backward: bool) -> float:
    _synchronize(problem)
    start = time.perf_counter()
    problem.step(provider, backward)
    _synchronize(problem)
    return time.perf_counter() - start


def _synchronize(problem: Problem) -> bool:
    """Waits for the GPU; False where there is none to wait for."""
    on_gpu = next(iter(problem.inputs.values())).is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    return on_gpu


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[round((len(values) - 1) * percent / 100)]


def _with_peak_bytes(problem: Problem, provider: str, backward: bool) -> tuple[list[Tensor], int]:
    """The step's result, and the most bytes allocated at one time during it beyond what was there before.

    GPU: the caching allocator's peak. CPU: running sum of the profiler's allocation events; it sees what goes through
    PyTorch's allocator, and no scratch that a kernel takes from malloc itself: for ours and for ``own_memory``, a
    further call shows by how much the process grows. numpy: tracemalloc's peak. The first call warms up and compiles.
    """
    if _synchronize(problem):
        problem.step(provider, backward)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = problem.step(provider, backward)
        torch.cuda.synchronize()
        return found, torch.cuda.max_memory_allocated() - before
    if provider in problem.in_numpy:
        tracemalloc.start()
        found = problem.step(provider, backward)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        found = problem.step(provider, backward)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    if provider == problem.ours or provider in problem.own_memory:
        peak = max(peak, _resident_growth(lambda: problem.step(provider, backward)))
    return found, peak


def _resident_growth(call: Callable[[], object]) -> int:
    """The most bytes by which the process's resident memory grows during a call; 0 where Linux does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory that malloc has kept would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def copy_bandwidth(device: str, seconds: float = 1.0) -> float:
    """Bytes per second read and written by ``b.copy_(a)``, on blocks too large for any cache: the fastest of several,
    since it stands for what the machine can do. The first is left out: it waits for its pages."""
    a = torch.ones((256 if device == "cpu" else 2048) * 2**18, device=device)
    b = torch.empty_like(a).copy_(a)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        b.copy_(a)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * a.numel() * a.element_size() / min(times)


def show(title: str, results: list[Result]) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "provider",
        "pass",
        "calls",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "× ours",
        "extra MiB",
        "% of copy",
    ):
        table.add_column(column, justify="left" if column in ("provider", "pass") else "right")
    for r in results:
        times = [f"{1e3 * t:.1f}" for t in (r.p20, r.p50, r.p80)]
        memory, share = f"{r.extra_bytes / 2**20:.1f}", f"{100 * r.copy_share:.2f}"
        table.add_row(r.provider, r.work, str(r.calls), *times, f"{r.ratio:.2f}", memory, share)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def write(path: Path, results: list[Result], bandwidth: float, device: str) -> None:
    """One JSON file: the machine, the versions and the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**machine(device), "copy_bytes_per_second": bandwidth, "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


def machine(device: str) -> dict[str, object]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash, with a + where the working tree has changes."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -- the command of a script -------------------------------------------------------------------------------------------


def ours(op: str, device: str | torch.device = "cpu") -> str:
    """Our provider's name: the backend that runs ``op``."""
    return pssl_ext.explain(op, device).split(": ", 1)[1].split(" ")[0] + " (ours)"


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The options that the scripts share; ``name`` as for ``run``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help=f"results file (default: runs/bench/{name}-<device>.json)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each problem, provider and pass")
    parser.add_argument("--only", default="", help="the problems whose title holds this text")
    return parser


def run(
    name: str,
    problems: Iterable[Problem],
    *,
    device: str,
    seconds: float,
    out: Path | None = None,
    only: str = "",
    after: Callable[[Problem, list[Result]], None] | None = None,
) -> None:
    """Measures the problems whose title holds ``only``, one by one as they are made, shows each table and calls
    ``after`` with it; writes ``out``, or else runs/bench/<name>-<device>.json."""
    bandwidth = copy_bandwidth(device)
    results: list[Result] = []
    for problem in problems:
        if only not in problem.name:
            continue
        found = measure(problem, bandwidth, seconds)
        show(problem.name, found)
        results += found
        if after is not None:
            after(problem, found)
    print(f"copy: {bandwidth / 1e9:.2f} GB/s (bytes read and written)")
    write(out or Path("runs/bench") / f"{name}-{device}.json", results, bandwidth, device)
