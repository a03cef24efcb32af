"""Times of a problem's providers, taken by turns all through the same stretch of time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .cost import launches, with_peaks
from .device_time import device_times
from .problem import Problem, disagreement

PASSES = ("forward", "forward+backward")
MOST_CALLS = 60  # of each provider
LEAST_CALLS = 3  # where they take no more than four times the provider's share of the time
PARTS = 5  # of a run, whose medians' spread is the noise
MOST_COPIES = 256  # of the inputs, among which the calls rotate


@dataclass(frozen=True)
class Result:
    """One provider and pass: percentiles of its times in seconds; ``noise``, half the spread of the medians of five
    stretches of the run, relative (None with fewer than five calls); ``ratio``, p50 over that of ours; ``extra_bytes``
    at the peak; ``copy_share``, compulsory bytes over time as a share of the copy bandwidth (None where no bytes are
    compulsory); ``launches`` of kernels and ``host``, the host's seconds to issue the call's passes, None on a CPU;
    ``estimate``, how the time was estimated where it was not measured whole."""

    problem: str
    title: str
    provider: str
    work: str
    ours: bool
    calls: int
    p20: float
    p50: float
    p80: float
    noise: float | None
    ratio: float
    extra_bytes: int | None
    copy_share: float | None
    launches: int | None = None
    host: float | None = None
    size: int | None = None
    estimate: str = ""


def measure(problem: Problem, seconds: float, bandwidth: float, cache: int) -> list[Result]:
    """Agreement first, then times, within about ``seconds`` in all; every provider is timed once at least.

    ``bandwidth``: of a copy, bytes a second; ``cache``: bytes of the cache that the inputs are to exceed."""
    deadline = time.monotonic() + seconds
    torch._dynamo.reset()  # a function that is compiled for every problem would soon be compiled no more
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    peaks = check_agreement(problem)
    launched = {name: launches(problem, name) for name in problem.providers}
    sets = rotated(problem.inputs, 2 * cache)
    calls = _Calls(problem, sets, launched)
    times, spent = {}, {}
    for name in problem.providers:
        begin = time.monotonic()
        times[name] = [calls.time(name)]
        spent[name] = time.monotonic() - begin
    counts = _further_calls(spent, deadline - time.monotonic())
    for name in by_turns(counts):
        times[name].append(calls.time(name))
    for name, count in counts.items():
        if count >= PARTS:
            del times[name][0]  # the first one found its buffers and threads cold
    return _results(problem, times, peaks, launched, bandwidth)


def check_agreement(problem: Problem) -> dict[str, tuple[int, int]]:
    """Stops with the difference unless all providers agree with the first; returns the peak bytes of each."""
    first, expected, peaks = "", [], {}
    for provider in problem.providers:
        found, peaks[provider] = with_peaks(problem, provider)
        first, expected = first or provider, expected or found
        difference = disagreement(problem, found, expected, provider, first)
        if difference is not None:
            raise SystemExit(difference)
    return peaks


def rotated(inputs: dict[str, Tensor], least: int) -> list[dict[str, Tensor]]:
    """Copies of the inputs of ``least`` bytes together, so that a call finds none of its inputs in the cache."""
    one = sum(t.numel() * t.element_size() for t in inputs.values())
    count = min(max(-(-least // max(one, 1)), 2), MOST_COPIES)
    return [inputs, *({n: t.clone() for n, t in inputs.items()} for _ in range(count - 1))]


def _further_calls(once: dict[str, float], seconds: float) -> dict[str, int]:
    """How many more calls of each provider fit, from the time of one; what fast ones leave goes to slow ones.

    A quarter of the time of one call of each is always taken, so that the fast ones are never judged by a single call.
    """
    counts, left = {}, max(seconds, sum(once.values()) / 4)
    even = left / len(once)
    for position, name in enumerate(sorted(once, key=once.get)):
        share = left / (len(once) - position)
        fit = int(share / once[name])
        least = LEAST_CALLS - 1 if (LEAST_CALLS - 1) * once[name] <= 4 * even else 0
        counts[name] = min(max(fit, least), MOST_CALLS)
        left = max(left - counts[name] * once[name], 0.0)
    return counts


def by_turns(counts: dict[str, int]) -> Iterator[str]:
    """Each name as often as asked for, evenly spread, so that a slow phase of the machine hits every one."""
    turns = [((i + 0.5) / count, name) for name, count in counts.items() for i in range(count)]
    return (name for _, name in sorted(turns))


class _Calls:
    """Times single calls on inputs that rotate."""

    MOST_QUEUED = 50  # calls
    MOST_LAUNCHES = 500  # of the queued calls together: a full queue would hold up the host

    def __init__(
        self,
        problem: Problem,
        sets: list[dict[str, Tensor]],
        launched: dict[str, tuple[int, int] | None],
    ) -> None:
        self.problem, self.sets, self.position = problem, sets, 0
        self.launched = launched
        self.queued: dict[str, tuple[int, float]] = {}  # calls at a time; the host's seconds for one

    def time(self, provider: str) -> tuple[float, float, float | None]:
        """Seconds of the forward pass, of both, and on a GPU of the host for both."""
        if self.problem.device.type != "cuda":
            return self._on_cpu(provider)
        if provider not in self.queued:  # calls of a few microseconds are timed several at a time
            _, both, host = device_times([self._call(provider)], 0.0)
            most = min(self.MOST_QUEUED, self.MOST_LAUNCHES // max(self.launched[provider][1], 1))
            self.queued[provider] = min(max(int(1e-3 / both), 1), max(most, 1)), host
        count, host = self.queued[provider]
        return device_times([self._call(provider) for _ in range(count)], host)

    def _call(self, provider: str) -> Callable[[Callable[[], None]], object]:
        self.position = (self.position + 1) % len(self.sets)
        return partial(self.problem.call, provider, self.sets[self.position])

    def _on_cpu(self, provider: str) -> tuple[float, float, None]:
        call, marks = self._call(provider), []
        start = time.perf_counter()
        call(lambda: marks.append(time.perf_counter()))
        end = time.perf_counter()
        return marks[0] - start, end - start, None


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[round((len(values) - 1) * percent / 100)]


def noise(values: list[float]) -> float | None:
    """Half the spread of the medians of five stretches, relative to the median; None with fewer values than that."""
    if len(values) < PARTS:
        return None
    cuts = [round(i * len(values) / PARTS) for i in range(PARTS + 1)]
    medians = [statistics.median(values[a:b]) for a, b in itertools.pairwise(cuts)]
    return (max(medians) - min(medians)) / 2 / statistics.median(values)


def _results(
    problem: Problem,
    times: dict[str, list[tuple[float, float, float | None]]],
    peaks: dict,
    launched: dict,
    bandwidth: float,
) -> list[Result]:
    results = []
    for which, work in enumerate(PASSES if problem.wanted else PASSES[:1]):
        compulsory = sum(problem.bytes_moved[: which + 1])
        own = percentile([t[which] for t in times[problem.ours]], 50)

        def result(
            name: str, spread: list[float], which=which, work=work, own=own, compulsory=compulsory, **more
        ) -> Result:
            share = compulsory / spread[1] / bandwidth
            return Result(
                problem.id,
                problem.title,
                name,
                work,
                name == problem.ours,
                **more,
                **dict(zip(("p20", "p50", "p80"), spread, strict=True)),
                ratio=spread[1] / own,
                copy_share=share,
                size=problem.size,
            )

        if not which:
            for name, estimate in problem.estimates.items():
                whole, how = estimate(problem.inputs)
                results.append(result(name, [whole] * 3, calls=1, noise=None, extra_bytes=None, estimate=how))
        for name, pairs in times.items():
            values = [t[which] for t in pairs]
            spread = [percentile(values, p) for p in (20, 50, 80)]
            cost = dict(extra_bytes=peaks[name][which], launches=launched[name] and launched[name][which])
            if pairs[0][2] is not None:
                cost["host"] = percentile([t[2] for t in pairs], 50)
            results.append(result(name, spread, calls=len(values), noise=noise(values), **cost))
    return results


def copy_bandwidth(device: str | torch.device, cache: int, seconds: float = 0.5) -> float:
    """Bytes per second read and written by ``b.copy_(a)``, on two blocks as large as the ``cache`` each, on a GPU eight
    times as large: the fastest of several, since it stands for what the machine can do. The first is left out: it waits
    for its pages."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    a = torch.ones(max(cache, 2**22) // 4 * (8 if on_gpu else 1), device=device)
    b = torch.empty_like(a).copy_(a)
    times: list[float] = []
    while len(times) < 4 or sum(times) < (seconds / 10 if on_gpu else seconds):
        if on_gpu:
            times.append(device_times([lambda done: (b.copy_(a), done())], 1e-4)[1])
            continue
        start = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - start)
    return 2 * a.numel() * a.element_size() / min(times)
