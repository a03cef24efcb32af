"""The operators' own tests over the CUDA kernels, run on the CPU under AddressSanitizer and UBSan.

Each run is a pytest of its own: the module under test takes the place of pssl_ext._C. Every launch draws another order
of threads and blocks, so that the tests of determinism compare two of them. The settings stand for devices of several
sizes, for the launch choices that depend on them.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import build

SUBSET = "test_every_dtype or test_twice or test_poisoned"
# name: (pytest's arguments, settings)
RUNS = {
    # all but what tests the tester, and threads of which kernels on the CPU have one
    "suite": (["-m", "not slow", "-k", "not test_op_planted and not number_of_threads"], {}),
    "one_processor": (["-k", SUBSET], {"PROCESSORS": "1", "SEED": "2"}),
    "large_device": (["-k", SUBSET], {"PROCESSORS": "132", "SHARED": str(227 << 10), "SEED": "3"}),
    # chunks of 8 channels, and coefficients of some classes at a time
    "small_tiles": (["-k", "prototype_ and test_every_dtype"], {"SHARED": str(34 << 10), "SEED": "5"}),
    "little_shared_memory": (["-k", f"cam_sweep and ({SUBSET})"], {"SHARED": "2000", "SEED": "4"}),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(needed):
    """The runs, two at a time, each a future of (exit status, output)."""
    module = build.build()

    def run(arguments: list[str], settings: dict[str, str]) -> tuple[int, str]:
        variables = dict(os.environ, **build.environment())
        variables |= {f"PSSL_CUDA_ON_CPU_{name}": value for name, value in settings.items()}
        plugin = ["-p", "cuda_on_cpu", "--cuda-on-cpu", str(module), "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *plugin, "-q", "tests/ops", *arguments]
        found = subprocess.run(
            command, cwd=build.ROOT, env=variables, capture_output=True, text=True, check=False
        )
        return found.returncode, found.stdout + found.stderr

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield {name: pool.submit(run, *how) for name, how in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_operators_tests_pass(runs, name, capsys):
    status, output = runs[name].result()
    lines = output.strip().splitlines()
    with capsys.disabled():
        print(f"\n  CUDA kernels on the CPU, {name}: {lines[-1].strip('= ') if lines else 'nothing'}")
    passed = re.search(r"(\d+) passed", output)
    assert status == 0 and passed and int(passed[1]) > 0, output[-10000:]


def test_the_skipped_say_why(runs):
    """An operator whose CUDA kernel is missing is skipped, in words that name it; one that has a .cu file is not."""
    _, output = runs["suite"].result()
    missing = set(re.findall(r"no CUDA kernel yet: (\w+)", output))
    there = {path.stem.removesuffix("_cuda") for path in (build.ROOT / "csrc").glob("*_cuda.cu")}
    assert not missing & there
