"""The operators' kernels under compute-sanitizer, and the script that runs them."""

import os
import subprocess
import sys
from pathlib import Path

import drive
import machine
import pytest

from pssl_ext.op import OPS

HERE = Path(__file__).resolve().parent


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool, op):
    sanitizer = machine.find_sanitizer()
    assert sanitizer, "compute-sanitizer is neither on PATH nor in the CUDA toolkit"
    watch = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    # torch asks the driver for what may not be there
    watch += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [*watch, sys.executable, str(HERE / "drive.py"), "--ops", op, "--dtypes", "float32,bfloat16"]
    # memory from torch's cache would hide what runs over the end of a tensor
    variables = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " calls on cuda" in found.stdout, found.stdout[-2000:]


def test_the_script_runs_operators(capsys):
    arguments = ["--device", "cpu", "--dtypes", "float32", "--ops", "cam_regions,pixel_refine"]
    assert drive.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("cam_regions: native") and said[1].startswith("pixel_refine: native")
    assert said[-1].endswith(" calls on cpu")


def test_the_script_says_what_it_cannot_run(capsys):
    with pytest.raises(SystemExit):
        drive.main(["--device", "cpu", "--ops", "conv"])
    assert "no operator 'conv'" in capsys.readouterr().err
    assert drive.main(["--device", "meta", "--ops", "cam_regions"]) == 1
    assert "holds no meta kernel for cam_regions" in capsys.readouterr().err


def test_the_machine_is_told(capsys):
    """`make test-gpu` begins with this script, and ends where something is missing."""
    status, lacks = machine.main([]), machine.missing()
    out, err = capsys.readouterr()
    assert (status == 0) == (not lacks)
    assert err.startswith("test-gpu: this machine lacks ") if lacks else out.startswith("test-gpu: ")
    assert all(problem in err for problem in lacks)
