"""What a run says of its progress where nobody can see a bar."""

import io

import pytest
from rich.console import Console

from pssl.core import log as log_module
from pssl.core.log import Log


def said(terminal, resumed=0):
    """Lines of five steps, a clock's 40 seconds each, of which some were done before."""
    stream = io.StringIO()
    log = Log(Console(file=stream, width=120, force_terminal=terminal))
    with log.progress("train rcm", 5) as bar:
        for step in range(resumed, 5):
            bar.reach(step + 1, f"loss {step / 10}")
    return stream.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch):
    """40 seconds go by at every look."""
    times = iter(range(0, 10**6, 40))
    monkeypatch.setattr(log_module.time, "monotonic", lambda: float(next(times)))


def test_a_line_a_minute_without_a_terminal(clock):
    lines = said(terminal=False)
    about = [line.split() for line in lines if "left" in line]
    assert about == [
        "train rcm 2/5 loss 0.1, 120 s left".split(),
        "train rcm 4/5 loss 0.3, 40 s left".split(),
    ]
    assert "5/5" in lines[-1]


def test_steps_that_were_resumed_took_no_time(clock):
    assert [line.split()[-3:] for line in said(terminal=False, resumed=2) if "left" in line] == [
        ["40", "s", "left"]
    ]


def test_a_terminal_has_its_bar(clock):
    assert not any("left" in line for line in said(terminal=True))
