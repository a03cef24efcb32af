"""The operators' own tests over the Triton kernels, in Triton's interpreter: a pytest of its own, see
triton_on_cpu.py."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_the_operators_tests_pass(capsys):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    plugin = ["-p", "triton_on_cpu", "-p", "no:cacheprovider", "-q", "-m", "not slow"]
    paths = [str(HERE.parent / "ops"), str(HERE / "interpreted.py")]
    folders = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, *paths],
        cwd=HERE.parents[1],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(folders), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    output = found.stdout + found.stderr
    lines = output.strip().splitlines()
    with capsys.disabled():
        print(f"\n  Triton kernels in the interpreter: {lines[-1].strip('= ') if lines else 'nothing'}")
    passed = re.search(r"(\d+) passed", output)
    assert found.returncode == 0 and passed and int(passed[1]) > 0, output[-10000:]
