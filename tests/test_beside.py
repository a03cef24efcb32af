"""What runs beside the tests does run beside them, and ends where they do."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pathlib, time, pytest
from beside import run_pytest

STARTED = pathlib.Path("started")

def run():
    STARTED.touch()
    return run_pytest(r"{folder}/other.py", variables={{}})

@pytest.mark.beside(run=run)
def test_the_run(beside):
    assert beside[0] == 0 and "1 passed" in beside[1]

def test_beside_it():
    until = time.monotonic() + 60
    while not STARTED.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert {passes}
"""


@pytest.fixture
def outcomes(pytester, monkeypatch):
    """Runs TESTS, which run a test that takes ``seconds``."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(passes: bool, seconds: int) -> dict[str, int]:
        pytester.makepyfile(other=f"def test(): __import__('time').sleep({seconds})")
        pytester.makepyfile(TESTS.format(folder=pytester.path, passes=passes))
        found = pytester.runpytest_subprocess("-x", "-p", "beside", timeout=120)
        return found.parseoutcomes()

    return run


def test_a_run_starts_with_the_tests(outcomes):
    assert outcomes(passes=True, seconds=0) == {"passed": 2}


def test_nothing_goes_on_after_a_failure(outcomes):
    assert outcomes(passes=False, seconds=600) == {"failed": 1}
