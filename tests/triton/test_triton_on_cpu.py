"""The operators' own tests over the Triton kernels, in Triton's interpreter: a pytest of its own, see
triton_on_cpu.py."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
from beside import run_pytest

HERE = Path(__file__).resolve().parent


def run() -> tuple[int, str]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folders = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return run_pytest(
        *("-p", "triton_on_cpu", "-m", "not slow"),
        *(str(HERE.parent / "ops"), str(HERE / "interpreted.py")),
        variables={"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.beside(run=run)
def test_the_operators_tests_pass(beside, capsys):
    status, output = beside
    lines = output.strip().splitlines()
    with capsys.disabled():
        print(f"\n  Triton kernels in the interpreter: {lines[-1].strip('= ') if lines else 'nothing'}")
    passed = re.search(r"(\d+) passed", output)
    assert status == 0 and passed and int(passed[1]) > 0, output[-10000:]
