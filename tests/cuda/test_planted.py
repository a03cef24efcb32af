"""The machinery that runs CUDA kernels on the CPU: a kernel with a planted fault does not get past it."""

import os
import re
import subprocess

import pytest

import build

SUM = "3003"
FAULTS = {
    "global overrun": "heap-buffer-overflow",
    "dynamic shared overrun": "heap-buffer-overflow",
    "static shared overrun": "index 3 out of bounds|AddressSanitizer",
    "much static shared": "static shared memory of 4112 bytes beside dynamic, at most 4096",
    "missing barrier": "^-?nan",
    "uninitialised": "^-?nan",
    "returned before a barrier": r"divergent barrier: 64 of 96 threads reached it",
    "two barriers": r"divergent barrier: threads wait at planted.cpp:\d+ and at planted.cpp:\d+",
    "shuffle of returned lanes": "the mask names a lane that has returned",
    "shuffle out of the mask": "shuffle reads a lane that the mask leaves out",
    "deadlock": "deadlock: a thread waits in a warp collective for lanes that never come",
    "lanes disagree": "lanes disagree on the mask or the operation|own lane is not in the mask",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Runs planted.cpp's kernel with a fault: (exit status, what it printed)."""
    build.skip_where_it_cannot()
    program = build.build_program("planted.cpp", tmp_path_factory.mktemp("planted") / "planted")

    def run(fault: str, seed: int = 1) -> tuple[int, str]:
        variables = dict(os.environ, PSSL_CUDA_ON_CPU_SEED=str(seed), ASAN_OPTIONS="detect_leaks=0")
        found = subprocess.run([program, fault], capture_output=True, text=True, env=variables, check=False)
        return found.returncode, found.stdout + found.stderr

    return run


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_sound_kernel(planted, seed):
    assert planted("none", seed) == (0, f"{SUM}\n" * 4)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(planted, fault, seed):
    _, printed = planted(fault, seed)
    assert SUM not in printed.split() and re.search(FAULTS[fault], printed, re.M), printed


@pytest.mark.parametrize("seed", [1, 2])
def test_an_order_of_blocks_that_matters_is_found(planted, seed):
    """Every launch draws another order: the same kernel gives several results."""
    status, printed = planted("order of blocks", seed)
    assert status == 0 and len(set(printed.split())) > 1
