"""Compiles csrc/ into the extension module: which compilers, which flags, a ninja file, and errors that help.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST, NVCC_APPEND_FLAGS (read by nvcc itself)
and NVCC_THREADS as everywhere; FORCE_CUDA=1 compiles CUDA for a CPU torch too, PSSL_CUDA=0 never; PSSL_WERROR=1
makes warnings errors; PSSL_BUILD_DIR moves the objects and the log out of build/.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from cuda_toolkit import BuildError, Cuda, architecture_flags, find_cuda
from pssl_backend import ROOT, Torch, torch_minimum

SIMD_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split(),
}
# Values stay what the source says: contraction into fused multiply-add and "nobody reads errno or traps" are the only
# liberties; -ffast-math would let NaN, infinities and the order of sums go.
OPTIMISE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

# Error texts carry __FILE__: without the map they would carry this machine's folders, and differ between builds.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-ffile-prefix-map={ROOT}/="]

# Where libstdc++ is linked statically (LDFLAGS, or no libstdc++.so beside the compiler), its symbols stay inside: mixed
# with those of the copy that torch uses, they would crash at the first number in an error text.
LINK_FLAGS = ["-shared", "-Wl,--exclude-libs,ALL"]

# Operators that share csrc/common/stepwise.h: where results are compared with thresholds, they repeat their references'
# roundings one by one.
STEPWISE = ("cam_compare", "cam_regions", "cam_sweep")
STEPWISE_FLAGS = {
    "cxx": ["-ffp-contract=off", "-DPSSL_STEPWISE"],
    "nvcc": ["-fmad=false", "-DPSSL_STEPWISE"],
}


def find_cxx() -> list[str]:
    """The C++ compiler's command; CXX may hold more than one word ("ccache g++")."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"C++ compiler '{command[0]}' not found: install one (Debian: apt-get install g++) or set CXX to one"
        )
    return command


def find_ninja() -> str:
    """ninja from its Python package, whose folder is not on PATH unless the environment is activated; else PATH's."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja not found: pip install ninja")
    return found


def pybind11_include() -> Path | None:
    """pybind11's headers; None leaves it to the copy among torch's own headers (offline builds without isolation)."""
    spec = importlib.util.find_spec("pybind11")
    return Path(spec.origin).parent / "include" if spec and spec.origin else None


def simd_levels() -> list[str]:
    """The levels that every *_cpu.cpp is compiled for."""
    return list(SIMD_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def operator_flags(rule: str, source: Path) -> list[str]:
    """What a file <operator>_cpu.cpp or <operator>_cuda.cu is compiled with for its operator's sake."""
    return STEPWISE_FLAGS[rule] if source.stem.rpartition("_")[0] in STEPWISE else []


def torch_target() -> str:
    """TORCH_TARGET_VERSION for the oldest torch supported: the headers then use nothing that it lacks."""
    major, minor = torch_minimum()
    return f"0x{major:02x}{minor:02x}{0:012x}"


def build_config(version: str, torch: Torch, cuda: Cuda | None) -> str:
    """The header that module.cpp reads; a header, so that a change recompiles one file and not all."""
    values = {
        "PSSL_VERSION": version,
        "PSSL_TORCH_VERSION": torch.version,
        "PSSL_TORCH_TARGET": torch_target(),
        "PSSL_CUDA_VERSION": cuda.version if cuda else "",
        "PSSL_CUDA_ARCHITECTURES": ";".join(cuda.architectures) if cuda else "",
        "PSSL_SIMD_LEVELS": ";".join(simd_levels()),
    }
    return "#pragma once\n" + "".join(f'#define {name} "{value}"\n' for name, value in values.items())


def shell(words: list[str]) -> str:
    """Words of a command as ninja wants them: quoted for the shell it starts, with its own $ doubled."""
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    """A path as ninja's build lines want it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def common_flags(torch: Torch) -> list[str]:
    """What every source file is compiled with, whatever the compiler."""
    return [
        "-std=c++20",
        f"-DTORCH_TARGET_VERSION={torch_target()}",
        "-DTORCH_STABLE_ONLY",
        f"-I{ROOT / 'csrc'}",
        *("-isystem", str(torch.directory / "include")),
    ]


def module_flags(folder: Path) -> list[str]:
    """What module.cpp needs beside: pybind11, Python, and the configuration in `folder`. The copy of pybind11 among the
    headers of torch 2.11 is an error where the macros of the stable ABI are defined."""
    pybind = pybind11_include()
    flags = ["-UTORCH_STABLE_ONLY", "-UTORCH_TARGET_VERSION", *(["-isystem", str(pybind)] if pybind else [])]
    return [*flags, "-isystem", sysconfig.get_path("include"), f"-I{folder}"]


def common_sources() -> list[Path]:
    """What belongs to no operator, compiled once."""
    return sorted((ROOT / "csrc/common").glob("*.cpp"))


def torch_libraries(torch: Torch) -> list[str]:
    """libtorch.so has to stay among the needed libraries although nothing is used from it directly: it brings in
    libtorch_cuda, which the CUDA sources' weak symbols bind to in a CUDA torch."""
    folder = f"-L{torch.directory / 'lib'}"
    return [folder, "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]


def warnings_are_errors() -> bool:
    return os.environ.get("PSSL_WERROR") == "1"


def nvcc_command(cuda: Cuda, torch: Torch) -> list[str]:
    """What every .cu file is compiled with."""
    command = [cuda.nvcc, *common_flags(torch), "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr"]
    command += architecture_flags(cuda.architectures)
    command += ["-Xcompiler=" + ",".join(HOST_FLAGS), "--threads", os.environ.get("NVCC_THREADS", "2")]
    command += ["-ccbin", find_cxx()[-1]] if "CXX" in os.environ else []
    command += ["-Werror", "all-warnings"] if warnings_are_errors() else []
    return command


def cuda_libraries(cuda: Cuda) -> list[str]:
    return [f"-L{cuda.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def ninja_file(output: Path, torch: Torch, cuda: Cuda | None, objects: Path) -> str:
    """The build plan as text."""
    cxx = find_cxx()
    cxxflags = [*common_flags(torch), *OPTIMISE, *HOST_FLAGS]
    cxxflags += ["-Werror"] if warnings_are_errors() else []
    cxxflags += shlex.split(os.environ.get("CXXFLAGS", ""))
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {shell([*cxx, *cxxflags])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $in $note",
    ]
    built = []

    def compile_to(name: str, rule: str, source: Path, flags: list[str], note: str = "") -> None:
        lines.append(f"build {name}: {rule} {ninja_path(source)}\n  flags = {shell(flags)}\n  note = {note}")
        built.append(name)

    # The order of `built` is the order of linking, and of one inline function found in several objects the linker
    # keeps the first: baseline comes before avx2 and avx512, or shared code could run instructions the CPU lacks.
    compile_to("module.o", "cxx", ROOT / "csrc/module.cpp", module_flags(objects))
    for source in common_sources():
        compile_to(f"common/{source.stem}.o", "cxx", source, [])
    for level in simd_levels():
        for source in sorted((ROOT / "csrc").glob("*_cpu.cpp")):
            flags = [f"-DPSSL_SIMD={level}", *SIMD_FLAGS[level]]
            flags += operator_flags("cxx", source)
            compile_to(f"{level}/{source.stem}.o", "cxx", source, flags, f"({level})")

    libraries = torch_libraries(torch)
    if cuda:
        nvcc = nvcc_command(cuda, torch)
        lines.append(f"rule nvcc\n  command = {shell(nvcc)} $flags -MD -MF $out.d -c $in -o $out")
        lines.append("  depfile = $out.d\n  deps = gcc\n  description = $in")
        for source in sorted((ROOT / "csrc").glob("*_cuda.cu")):
            compile_to(f"cuda/{source.stem}.o", "nvcc", source, operator_flags("nvcc", source))
        libraries += cuda_libraries(cuda)
    link = (
        shell([*cxx, *LINK_FLAGS])
        + " $in -o $out "
        + shell(libraries + shlex.split(os.environ.get("LDFLAGS", "")))
    )
    lines += [f"rule link\n  command = {link}\n  description = link $out"]
    lines += [f"build {ninja_path(output)}: link {' '.join(built)}", f"default {ninja_path(output)}"]
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Leaves the file's time alone when nothing changed, so that ninja has nothing to do."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def run_ninja(folder: Path) -> Path:
    """Runs the plan; the log holds every command. On failure says what failed, the last lines, and where the log is."""
    log = folder / "build.log"
    command = [find_ninja(), "-C", str(folder), "-v"]
    jobs = os.environ.get("MAX_JOBS")
    command += ["-j", jobs] if jobs else []
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"^FAILED: (?:\[code=\d+\] )?(.*?)\s*$", text, re.M)
        commands = re.compile(r"^(\[\d+/\d+\] |FAILED: ).*|^.{2000,}$")
        last = [line for line in text.splitlines() if not commands.match(line)][-30:]
        raise BuildError(
            f"compiling failed{' at ' + ', '.join(failed) if failed else ''}. Last lines of the log:\n\n"
            + "\n".join(last)
            + f"\n\npssl: the whole log: {log}"
        )
    return log


def build(output: Path, version: str, torch: Torch | None) -> dict:
    """Builds the extension module at `output`; returns the record that `python -m pssl_ext.env` shows."""
    if torch is None:
        raise BuildError(
            "torch not found: pip install torch first, or build with isolation (plain pip install)"
        )
    cuda, cuda_reason = find_cuda(torch)
    base = Path(os.environ.get("PSSL_BUILD_DIR") or ROOT / "build").resolve()
    folder = (
        base / f"pssl-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "pssl_build_config.h", build_config(version, torch, cuda))
    write_if_changed(folder / "build.ninja", ninja_file(output, torch, cuda, folder))
    what = f"CUDA {cuda.version} for {';'.join(cuda.architectures)}" if cuda else f"no CUDA ({cuda_reason})"
    print(f"pssl: compiling against torch {torch.version}, {what}; log: {folder / 'build.log'}", flush=True)
    log = run_ninja(folder)
    return {
        "native": True,
        "native_reason": None,
        "cuda": cuda.version if cuda else None,
        "cuda_reason": cuda_reason,
        "cuda_architectures": cuda.architectures if cuda else [],
        "torch": torch.version,
        "torch_cuda": torch.cuda,
        "log": str(log),
    }
