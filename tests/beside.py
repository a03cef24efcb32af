"""Runs of pytest in processes of their own, beside the other tests.

    @pytest.mark.beside(run=run)
    def test(beside): ...

`run` starts, in a thread, as soon as the session's tests do; tests with the mark come last and get what it returned as
`beside`. It is called with the test's parameters, and may skip the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


class Runs:
    """As many at a time as there are cores: the processes take turns with the tests that they run beside."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self.found: dict[str, Future] = {}

    def of(self, item: pytest.Item) -> Future:
        """Starts it, where that has not been done."""
        if item.nodeid not in self.found:
            run = item.get_closest_marker("beside").kwargs["run"]
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            self.found[item.nodeid] = self.pool.submit(run, **parameters)
        return self.found[item.nodeid]


class Processes:
    """What run_pytest has started. Once stopped, it starts no more."""

    def __init__(self) -> None:
        self.lock, self.running, self.stopped = threading.Lock(), set(), False

    def start(self, command: list[str], **how: object) -> subprocess.Popen:
        with self.lock:
            if self.stopped:
                raise CancelledError
            process = subprocess.Popen(command, **how)
            self.running.add(process)
            return process

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.kill()  # does nothing to one that has ended


processes = Processes()


def run_pytest(*arguments: str, variables: dict[str, str]) -> tuple[int, str]:
    """Exit status and output."""
    process = processes.start(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=REPOSITORY,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate()
    return process.returncode, output


RUNS = pytest.StashKey[Runs]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "beside(run=function): what runs in other processes beside the other tests"
    )
    config.stash[RUNS] = Runs()


def _marked(item: pytest.Item) -> bool:
    return item.get_closest_marker("beside") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_marked)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    # pytest-xdist's workers have all the tests each: there a run starts where its test does
    elsewhere = hasattr(session.config, "workerinput")
    if not (elsewhere or session.testsfailed or session.config.option.collectonly):
        for item in filter(_marked, session.items):
            session.config.stash[RUNS].of(item)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing goes on where the session ends before its tests do."""
    session.config.stash[RUNS].pool.shutdown(wait=False, cancel_futures=True)
    processes.stop()


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> object:
    return request.config.stash[RUNS].of(request.node).result()
