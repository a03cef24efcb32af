"""Work on many images at once, in threads: operators, decoders and encoders release Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from pssl.core.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


def worker_count(workers: int | None) -> int:
    """Return `workers`, or the number of processors that this process may use; InputError below 1."""
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise InputError(f"workers: expected at least 1, got {workers}")
    return workers


@contextmanager
def one_thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give a pool whose threads run operators on one thread each; work not begun when the block ends is dropped."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def over_images(work: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """Yield `work(item)` for each item, in order, `workers` at a time (None: as many as processors).

    At most twice as many results as workers wait to be taken. With one worker all runs in this thread, the operators
    with as many threads as PyTorch is set to. The first exception is raised, and what has not begun is not.
    """
    workers = worker_count(workers)
    if workers == 1:
        yield from map(work, items)
        return
    with one_thread_pool(workers) as pool:
        yield from read_ahead(pool, work, items, 2 * workers)


def read_ahead(pool: Executor, work: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Yield `work(item)` of each item, in order, by a pool that is given `depth` items more than have been taken."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
