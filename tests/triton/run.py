"""Runs the operators' own tests over the Triton kernels, in Triton's interpreter (triton_on_cpu.py).

    python tests/triton/run.py                 more arguments are pytest's: -k contrast
    python tests/triton/run.py --whole         see tests/emulation.py

Exit status 1: it failed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulation import run_pytest

HERE = Path(__file__).resolve().parent
TITLE = "Triton kernels in the interpreter"


def main(arguments: list[str]) -> int:
    if importlib.util.find_spec("triton") is None:
        print(f"{TITLE}: skipped, triton is not installed")
        return 0
    folders = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    where = ["tests/ops", "tests/triton/interpreted.py"]
    passed, closing = run_pytest(
        TITLE,
        # the interpreter has one thread
        ["-p", "triton_on_cpu", "-m", "not slow", "-k", "not number_of_threads", *where, *arguments],
        {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
    )
    print(closing)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
