"""Runs the operators' own tests over the CUDA kernels on the CPU, under AddressSanitizer and UBSan.

    python tests/cuda/run.py                      all runs
    python tests/cuda/run.py suite                of the runs these; more arguments are pytest's
    python tests/cuda/run.py suite -- -k contrast
    python tests/cuda/run.py -- --whole           see tests/emulation.py

Each run is a pytest of its own: the module under test takes the place of pssl_ext._C. Every launch draws another order
of threads and blocks, so that the tests of determinism compare two of them. The settings stand for devices of several
sizes, for the launch choices that depend on them. Exit status 1: a run failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulation import run_pytest

import build

ALL = ["tests/ops"]
SUBSET = ["tests/ops/test_op_accuracy.py", "tests/ops/test_op_determinism.py"]
VALUES = "test_every_dtype or (test_twice and float32)"
# Left out: memory is poisoned all the time (cuda_on_cpu.py), and of the kernels for the CPU alone have threads and
# write past caches.
SUITE = "not test_poisoned and not number_of_threads and not larger_than_the_caches"
# name: (where, which tests, settings)
RUNS = {
    "suite": (ALL, SUITE, {}),
    "one_processor": (SUBSET, VALUES, {"PROCESSORS": "1", "SEED": "2"}),
    "large_device": (SUBSET, VALUES, {"PROCESSORS": "132", "SHARED": str(227 << 10), "SEED": "3"}),
    # chunks of 8 channels, and coefficients of some classes at a time
    "small_tiles": (SUBSET, "prototype_ and test_every_dtype", {"SHARED": str(34 << 10), "SEED": "5"}),
    "little_shared_memory": (SUBSET, f"cam_sweep and ({VALUES})", {"SHARED": "2000", "SEED": "4"}),
}


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    ours, more = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)}")
    names = parser.parse_args(ours).runs or list(RUNS)
    if unknown := set(names) - set(RUNS):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    if reason := build.why_not():
        print(f"CUDA kernels on the CPU: skipped, {reason}")
        return 0
    plugin = ["-p", "cuda_on_cpu", "--cuda-on-cpu", str(build.build())]
    results = [_run(name, plugin, more) for name in names]
    print("CUDA kernels on the CPU: " + "; ".join(closing for _, closing in results))
    return int(not all(passed for passed, _ in results))


def _run(name: str, plugin: list[str], more: list[str]) -> tuple[bool, str]:
    where, chosen, settings = RUNS[name]
    variables = {f"PSSL_CUDA_ON_CPU_{setting}": value for setting, value in settings.items()}
    return run_pytest(
        name, [*plugin, *where, "-m", "not slow", "-k", chosen, *more], build.environment() | variables
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
