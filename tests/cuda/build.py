"""Compiles csrc/*_cuda.cu by g++ into an extension module whose CUDA kernels run on the CPU (cuda_on_cpu.h).

    python tests/cuda/build.py                   prints the module's path, in build/
    python tests/cuda/build.py --environment     prints what a process needs to import it, as NAME=VALUE
    PSSL_SANITIZE=0 python ...                   without sanitizers: three times faster, and nothing to preload

The module is another pssl_ext._C: module.cpp as ever, and instead of the C++ kernels the CUDA ones, registered for CPU
tensors.
"""

from __future__ import annotations

import fcntl
import importlib.machinery
import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build_tools"))

import native
import pssl_backend
from pssl_backend import ROOT

HERE = Path(__file__).resolve().parent
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
# -O1 and no -march: nothing here contracts products and sums, as STEPWISE asks for. The TLS model spares a call into
# AddressSanitizer for every threadIdx.
FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fPIC", "-fvisibility=hidden", "-ftls-model=initial-exec"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def sanitized() -> bool:
    return os.environ.get("PSSL_SANITIZE", "1") != "0"


def build() -> Path:
    """The module's path; compiles what has changed since the last time, for one caller at a time."""
    torch = pssl_backend.find_torch()
    folder = ROOT / "build" / ("cuda_on_cpu" if sanitized() else "cuda_on_cpu-plain")
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        native.write_if_changed(folder / "pssl_build_config.h", native.build_config("tests", torch, None))
        native.write_if_changed(folder / "build.ninja", _plan(output, torch, folder))
        native.run_ninja(folder)
    return output


def cuda_sources() -> dict[str, Path]:
    """The file of each operator that has CUDA kernels."""
    return {path.stem.removesuffix("_cuda"): path for path in sorted((ROOT / "csrc").glob("*_cuda.cu"))}


def build_program(source: str, output: Path) -> Path:
    """A program of one file of this folder, always with the sanitizers."""
    torch = pssl_backend.find_torch()
    libraries = [*native.torch_libraries(torch), f"-Wl,-rpath,{torch.directory / 'lib'}"]
    command = [
        *native.find_cxx(),
        *_flags(torch),
        *SANITIZERS,
        str(HERE / source),
        "-o",
        str(output),
        *libraries,
    ]
    subprocess.run(command, check=True)
    return output


def _flags(torch: pssl_backend.Torch) -> list[str]:
    return [*native.common_flags(torch), *FLAGS, *WARNINGS, "-DPSSL_CUDA_ON_CPU", f"-I{HERE}"]


def _plan(output: Path, torch: pssl_backend.Torch, folder: Path) -> str:
    cxx = native.find_cxx()
    sanitizers = SANITIZERS if sanitized() else []
    flags = [*_flags(torch), *sanitizers]
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {native.shell([*cxx, *flags])} $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
    ]
    objects = []

    def compile_to(name: str, source: Path, more: list[str]) -> None:
        lines.append(f"build {name}: cxx {native.ninja_path(source)}\n  flags = {native.shell(more)}")
        objects.append(name)

    compile_to("module.o", ROOT / "csrc/module.cpp", native.module_flags(folder))
    for source in native.common_sources():
        compile_to(f"{source.stem}.o", source, [])
    for source in cuda_sources().values():
        compile_to(f"{source.stem}.o", source, native.operator_flags("cxx", source))
    link = native.shell([*cxx, "-shared", *sanitizers]) + " $in -o $out "
    lines.append(f"rule link\n  command = {link}{native.shell(native.torch_libraries(torch))}")
    target = native.ninja_path(output)
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}"]
    return "\n".join(lines) + "\n"


def environment() -> dict[str, str]:
    """The variables under which a process can import the module, and under which it looks closely."""
    variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(HERE)}
    if sanitized():
        # libstdc++ beside libasan: or AddressSanitizer does not find the function that throws exceptions
        variables["LD_PRELOAD"] = ":".join(_library(name) for name in ("libasan.so", "libstdc++.so"))
        variables["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1"
        variables["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return variables


def why_not() -> str | None:
    """Why nothing can be built and run on this machine; None where it can."""
    if platform.machine() != "x86_64":
        return "cuda_on_cpu.h is written for x86-64"
    if not all(_library(name).startswith("/") for name in ("libasan.so", "libubsan.so")):
        return "the compiler has no libasan and libubsan"
    return None


def _library(name: str) -> str:
    command = [*native.find_cxx(), f"-print-file-name={name}"]
    return str(
        Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).resolve()
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--environment"]:
        print("\n".join(f"{name}={value}" for name, value in environment().items()))
    else:
        print(build())
