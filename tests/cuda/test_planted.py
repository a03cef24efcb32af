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


#: by what is planted: nothing, what changes the result from launch to launch, and what must be found
SEEDS = {"none": [0, 1, 2, 3], "order of blocks": [1, 2], **{f: [1, 2, 3] for f in FAULTS}}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """planted.cpp's kernel with a fault, from a seed: (exit status, what it printed)."""
    if reason := build.why_not():
        pytest.skip(reason)
    program = build.build_program("planted.cpp", tmp_path_factory.mktemp("planted") / "planted")
    pairs = [(fault, seed) for fault, seeds in SEEDS.items() for seed in seeds]
    arguments = [str(x) for pair in pairs for x in pair]
    variables = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")
    found = subprocess.run([program, *arguments], capture_output=True, text=True, env=variables, check=True)
    parts = re.split(r"^status (\d+)\n", found.stdout, flags=re.M)[:-1]
    results = {
        pair: (int(status), text) for pair, text, status in zip(pairs, parts[::2], parts[1::2], strict=True)
    }
    return lambda fault, seed: results[fault, seed]


@pytest.mark.parametrize("seed", SEEDS["none"])
def test_a_sound_kernel(planted, seed):
    assert planted("none", seed) == (0, f"{SUM}\n" * 4)


@pytest.mark.parametrize("fault, seed", [(fault, seed) for fault in FAULTS for seed in SEEDS[fault]])
def test_a_fault_is_found(planted, fault, seed):
    _, printed = planted(fault, seed)
    assert SUM not in printed.split() and re.search(FAULTS[fault], printed, re.M), printed


@pytest.mark.parametrize("seed", SEEDS["order of blocks"])
def test_an_order_of_blocks_that_matters_is_found(planted, seed):
    """Every launch draws another order: the same kernel gives several results."""
    status, printed = planted("order of blocks", seed)
    assert status == 0 and len(set(printed.split())) > 1
