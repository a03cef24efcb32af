"""What the runs of the operators' tests over emulated kernels share: CUDA on the CPU, Triton in its interpreter.

An emulated kernel is some hundred times slower than a real one, so such a run takes what looks at a kernel's values.
What is around a kernel (checks, the dispatcher, torch.compile, autocast) is the same for all of them: of the tests
marked `interface` it takes an operator's first case, and none that have no cases. ``--whole`` takes them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def of_a_kernel(item, taken: set[tuple[str, str]]) -> bool:
    """Return whether a run without ``--whole`` takes the test; ``taken`` are the interface's (test, operator)."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("backend") == "reference":
        return False
    if item.get_closest_marker("interface") is None:
        return True
    case = parameters.get("case")
    if case is None or (item.function.__qualname__, case.op) in taken:
        return False
    taken.add((item.function.__qualname__, case.op))
    return True


def run_pytest(title: str, arguments: list[str], variables: dict[str, str]) -> tuple[bool, str]:
    """Run pytest in a process of its own, print what it prints, and return whether it passed and its closing line.

    A run of no tests has not passed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=REPOSITORY,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    closing = "no tests ran"
    for line in process.stdout:
        print(line, end="", flush=True)
        closing = line.strip("= \n") or closing
    return process.wait() == 0, f"{title}: {closing}"
