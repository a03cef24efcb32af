"""Times on a GPU: the device's, while the host is ahead of it, and the host's, which issues the calls.

A call of these operators takes the device less time than Python takes to issue it. In a training step the host is ahead
of the device, and only the device's time counts; so the device is first put to sleep until all calls wait in its queue.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[Callable[[], None]], object]  # calls its argument when the forward pass is done

CYCLES_PER_SECOND = 2e9  # of the clock that torch.cuda._sleep counts, about; a longer sleep does no harm
AHEAD = 1.5  # times the seconds that issuing takes
LONGEST_SLEEP = 0.1  # seconds: a call that waits for the device itself is not ahead of it anyway


def sleep(seconds: float) -> None:
    """Keeps the current stream busy with nothing."""
    if seconds > 0:
        torch.cuda._sleep(int(min(seconds, LONGEST_SLEEP) * CYCLES_PER_SECOND))


def device_times(calls: list[Call], issuing: float) -> tuple[float, float, float]:
    """Means over ``calls``, run one after the other: seconds of the forward pass and of both on the device, and of the
    host. ``issuing``: seconds that the host takes for one call, about; 0: unknown."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in calls]
    torch.cuda.synchronize()
    sleep(AHEAD * issuing * len(calls))
    begin = time.perf_counter()
    for call, (start, middle, end) in zip(calls, events, strict=True):
        start.record()
        call(middle.record)
        end.record()
    host = (time.perf_counter() - begin) / len(calls)
    torch.cuda.synchronize()
    forward = statistics.mean(start.elapsed_time(middle) for start, middle, _ in events)
    both = statistics.mean(start.elapsed_time(end) for start, _, end in events)
    return forward / 1e3, both / 1e3, host
