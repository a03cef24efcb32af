"""The operators' kernels under compute-sanitizer, and the script that runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import find_sanitizer, missing

from pssl_ext.registry import OPS

HERE = Path(__file__).resolve().parent


def script(name, *arguments, before=()):
    # memory from torch's cache would hide what runs over the end of a tensor
    variables = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    command = [*before, sys.executable, str(HERE / name), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool, op):
    sanitizer = find_sanitizer()
    assert sanitizer, "compute-sanitizer is neither on PATH nor in the CUDA toolkit"
    watch = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    # torch asks the driver for what may not be there
    watch += ["--report-api-errors", "no"] if tool == "memcheck" else []
    found = script("drive.py", "--ops", op, "--dtypes", "float32,bfloat16", before=watch)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " calls on cuda" in found.stdout, found.stdout[-2000:]


def test_the_script_runs_every_operator():
    found = script("drive.py", "--device", "cpu", "--dtypes", "float32", "--ops", "cam_regions,pixel_refine")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1].endswith(" calls on cpu")
    assert "pixel_refine: done" in found.stdout


def test_the_script_says_what_it_cannot_run():
    assert "no operator 'conv'" in script("drive.py", "--device", "cpu", "--ops", "conv").stderr
    found = script("drive.py", "--device", "meta", "--ops", "cam_regions")
    assert found.returncode == 1 and "holds no meta kernel for cam_regions" in found.stderr


def test_the_machine_is_told():
    """`make test-gpu` begins with this script, and ends where something is missing."""
    found, lacks = script("machine.py"), missing()
    assert (found.returncode == 0) == (not lacks)
    said = found.stderr if lacks else found.stdout
    assert said.startswith("test-gpu: this machine lacks " if lacks else "test-gpu: ")
    assert all(problem in said for problem in lacks)
