"""What every CUDA kernel takes on every architecture: registers, spilled bytes, static shared memory.

    python build_tools/cuda_resources.py            also: make cuda-resources
    python build_tools/cuda_resources.py 8.0 9.0    on these; make cuda-resources ARGS="8.0 9.0"

Compiles csrc/*_cuda.cu as an installation with FORCE_CUDA=1 would, warnings as errors, for the architectures given
(without any for TORCH_CUDA_ARCH_LIST, by default all that are supported), and prints a table from what ptxas says.
Fails where a kernel spills more than SPILL_LIMIT, and where the library linked from it does not import in the torch
that is installed: in a CPU build the symbols of libtorch_cuda are missing. No GPU is needed. Without nvcc it says so
and does nothing.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import native
import pssl_backend
from cuda_toolkit import Cuda, find_cuda, find_nvcc
from pssl_backend import ROOT

# Bytes of spill stores in one kernel: some registers outside the loops. More is a kernel that wants another shape.
SPILL_LIMIT = 128

PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<spilled>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)

IMPORT = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("pssl_ext._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kernels = [k for k in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if k.startswith("pssl::")]
print(f"imports in torch {torch.__version__}: {len(kernels)} kernels for CUDA {module.build_info()['cuda']} registered")
sys.exit(not kernels)
"""


def plan(output: Path, torch: pssl_backend.Torch, cuda: Cuda, folder: Path) -> str:
    """The CUDA part of an installation; what ptxas says goes beside each object, for runs that compile nothing."""
    nvcc = native.shell([*native.nvcc_command(cuda, torch), "-Xptxas=-v"])
    cxx = native.shell([*native.find_cxx(), *native.common_flags(torch), *native.HOST_FLAGS])
    link = native.shell([*native.find_cxx(), *native.LINK_FLAGS])
    libraries = native.shell([*native.torch_libraries(torch), *native.cuda_libraries(cuda)])
    said = "2> $out.txt || (cat $out.txt; false)"
    lines = [
        "ninja_required_version = 1.5",
        f"rule nvcc\n  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out {said}",
        "  depfile = $out.d\n  deps = gcc",
        f"rule cxx\n  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {link} $in -o $out {libraries}",
    ]
    objects = {
        "module.o": ("cxx", ROOT / "csrc/module.cpp", native.module_flags(folder)),
        **{f"{source.stem}.o": ("cxx", source, []) for source in native.common_sources()},
    }
    for source in sorted((ROOT / "csrc").glob("*_cuda.cu")):
        objects[f"{source.stem}.o"] = ("nvcc", source, native.operator_flags("nvcc", source))
    for name, (rule, source, flags) in objects.items():
        lines.append(f"build {name}: {rule} {native.ninja_path(source)}\n  flags = {native.shell(flags)}")
    lines.append(f"build {native.ninja_path(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def short_names(kernels: set[str]) -> dict[str, str]:
    """`labels<float>` for the mangled name; the name as it is where there is no c++filt."""
    ordered = sorted(kernels)
    try:
        told = subprocess.run(
            ["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except OSError:
        told = ordered
    names = {}
    for kernel, full in zip(ordered, told, strict=True):
        plain = re.sub(r"\(anonymous namespace\)::|pssl::simd_any::|c10::|torch::headeronly::", "", full)
        names[kernel] = re.sub(r"^void ", "", plain).split("(")[0].strip()
    return names


def figures(folder: Path) -> list[dict]:
    """One entry a kernel and architecture, as ptxas told them."""
    found = []
    for log in sorted(folder.glob("*_cuda.o.txt")):
        for match in PTXAS.finditer(log.read_text(encoding="utf-8")):
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            entry = {
                "operator": log.name.removesuffix("_cuda.o.txt"),
                "kernel": match["kernel"],
                "architecture": match["architecture"],
                "registers": int(match["registers"]),
                "spilled": int(match["spilled"]),
                "shared": int(shared[1]) if shared else 0,
            }
            found.append(entry)
    names = short_names({entry["kernel"] for entry in found})
    return [entry | {"kernel": names[entry["kernel"]]} for entry in found]


def table(entries: list[dict]) -> str:
    """A line a kernel: registers on each architecture, with +n where n bytes are spilled."""
    architectures = sorted({e["architecture"] for e in entries}, key=lambda a: int(a.removeprefix("sm_")))
    rows = collections.defaultdict(dict)
    for e in entries:
        cell = f"{e['registers']}" + (f"+{e['spilled']}" if e["spilled"] else "")
        rows[e["operator"], e["kernel"]][e["architecture"]] = (cell, e["shared"])
    width = max(len(f"{operator} {kernel}") for operator, kernel in rows)
    lines = [f"{'kernel':<{width}} " + "".join(f"{a:>9}" for a in architectures) + "   static shared bytes"]
    for (operator, kernel), cells in rows.items():
        shared = max(s for _, s in cells.values())
        told = "".join(f"{cells.get(a, ('-', 0))[0]:>9}" for a in architectures)
        lines.append(f"{operator + ' ' + kernel:<{width}} {told}   {shared}")
    return "\n".join(lines)


def main(architectures: list[str]) -> int:
    """0 where everything compiles, fits and imports."""
    if find_nvcc() is None:
        print("cuda-resources: skipped, there is no nvcc in CUDA_HOME, in /usr/local/cuda or on PATH")
        return 0
    # one thread for each nvcc: what several of them say at a time would be mixed up
    os.environ |= {"FORCE_CUDA": "1", "PSSL_WERROR": "1", "NVCC_THREADS": "1"}
    os.environ.pop("PSSL_CUDA", None)
    if architectures:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
    torch = pssl_backend.find_torch()
    cuda, _ = find_cuda(torch)
    folder = Path(os.environ.get("PSSL_BUILD_DIR") or ROOT / "build").resolve() / "cuda_resources"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "_C.so"
    native.write_if_changed(folder / "pssl_build_config.h", native.build_config("resources", torch, cuda))
    native.write_if_changed(folder / "build.ninja", plan(output, torch, cuda, folder))
    native.run_ninja(folder)
    entries = figures(folder)
    print(f"Registers (+ spilled bytes), CUDA {cuda.version}, torch {torch.version}\n{table(entries)}")
    worst = max(entries, key=lambda e: e["spilled"])
    print(f"{len(entries)} kernels, most spilled: {worst['spilled']} bytes (limit {SPILL_LIMIT})", flush=True)
    for e in entries:
        if e["spilled"] > SPILL_LIMIT:
            print(f"{e['operator']} {e['kernel']} spills {e['spilled']} bytes on {e['architecture']}")
    imported = subprocess.run([sys.executable, "-c", IMPORT, str(output)], check=False).returncode
    return int(worst["spilled"] > SPILL_LIMIT or imported != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
