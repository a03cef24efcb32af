"""Whether this machine can run what `make test-gpu` runs: a GPU that torch sees, nvcc, compute-sanitizer, packages. A
script: ends with what is missing, before anything is built; --capability prints the GPU's, as TORCH_CUDA_ARCH_LIST
takes it, --workers what lets pytest run tests side by side, where pytest-xdist is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build_tools"))

from cuda_toolkit import find_nvcc

PACKAGES = ("setuptools", "pybind11", "ninja", "pytest", "hypothesis", "numpy")


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or in the toolkit of nvcc, where it lies in bin or in a folder of its own."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = find_nvcc()
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def missing() -> list[str]:
    found = []
    if torch.version.cuda is None:
        found.append(f"a CUDA build of torch (this is {torch.__version__})")
    elif not torch.cuda.is_available():
        found.append("a GPU that torch can use (torch.cuda.is_available() is False; see nvidia-smi)")
    if find_nvcc() is None:
        found.append("nvcc, in CUDA_HOME, /usr/local/cuda or on PATH")
    if find_sanitizer() is None:
        found.append("compute-sanitizer, on PATH or in the CUDA toolkit (CUDA_HOME)")
    found += [f"the package {name}" for name in PACKAGES if importlib.util.find_spec(name) is None]
    return found


def workers() -> str:
    """Most of the time goes to compiling Triton kernels and to starting processes, so that a GPU serves several."""
    count = min(8, (os.cpu_count() or 2) // 2)
    return f"-n {count}" if count > 1 and importlib.util.find_spec("xdist") else ""


def main(arguments: list[str]) -> int:
    if arguments == ["--workers"]:
        print(workers())
        return 0
    if problems := missing():
        print("test-gpu: this machine lacks " + "; ".join(problems), file=sys.stderr)
        return 1
    gpu = torch.cuda.get_device_properties(0)
    if arguments == ["--capability"]:
        print(f"{gpu.major}.{gpu.minor}")
    else:
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"test-gpu: {gpu.name}, {memory}, torch {torch.__version__}, {find_sanitizer()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
