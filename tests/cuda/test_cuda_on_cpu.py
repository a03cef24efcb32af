"""The operators' own tests over the CUDA kernels, run on the CPU under AddressSanitizer and UBSan.

Each run is a pytest of its own: the module under test takes the place of pssl_ext._C. Every launch draws another order
of threads and blocks, so that the tests of determinism compare two of them. The settings stand for devices of several
sizes, for the launch choices that depend on them.
"""

import re

import pytest
from beside import run_pytest

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


def run(name: str) -> tuple[int, str]:
    build.skip_where_it_cannot()
    arguments, settings = RUNS[name]
    variables = {f"PSSL_CUDA_ON_CPU_{setting}": value for setting, value in settings.items()}
    return run_pytest(
        *("-p", "cuda_on_cpu", "--cuda-on-cpu", str(build.build())),
        *("tests/ops", *arguments),
        variables=build.environment() | variables,
    )


@pytest.mark.beside(run=run)
@pytest.mark.parametrize("name", RUNS)
def test_the_operators_tests_pass(name, beside, capsys):
    """What is skipped says why: an operator whose CUDA kernel is missing, in words that name it; none that has a .cu
    file."""
    status, output = beside
    lines = output.strip().splitlines()
    with capsys.disabled():
        print(f"\n  CUDA kernels on the CPU, {name}: {lines[-1].strip('= ') if lines else 'nothing'}")
    passed = re.search(r"(\d+) passed", output)
    assert status == 0 and passed and int(passed[1]) > 0, output[-10000:]
    missing = set(re.findall(r"no CUDA kernel yet: (\w+)", output))
    there = {path.stem.removesuffix("_cuda") for path in (build.ROOT / "csrc").glob("*_cuda.cu")}
    assert not missing & there
