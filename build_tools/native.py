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
from dataclasses import dataclass
from pathlib import Path

from pssl_backend import ROOT, Torch, torch_minimum

DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
SIMD_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split(),
}
# Values stay what the source says: contraction into fused multiply-add and "nobody reads errno or traps" are the only
# liberties; -ffast-math would let NaN, infinities and the order of sums go.
OPTIMISE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class BuildError(SystemExit):
    """Ends the build with the message alone: a traceback through setuptools tells the reader nothing."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"\npssl: {problem}\n"
            "pssl: to install without native code on purpose (references only, slow): PSSL_NATIVE=0 pip install ...\n"
        )


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler and what it is to compile for."""

    nvcc: str
    version: str
    architectures: list[str]

    @property
    def library_dir(self) -> Path:
        """Where libcudart_static.a lies; nvcc on PATH may be a wrapper script, hence the two tries."""
        homes = [Path(self.nvcc).resolve().parent.parent, Path("/usr/local/cuda")]
        dirs = [home / "lib64" for home in homes]
        return next((d for d in dirs if (d / "libcudart_static.a").exists()), dirs[0])


def find_nvcc() -> str | None:
    """nvcc in CUDA_HOME, else in the usual place, else on PATH."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.access(f"{home}/bin/nvcc", os.X_OK):
            return f"{home}/bin/nvcc"
    return shutil.which("nvcc")


def parse_architectures(text: str, supported: set[str]) -> list[str]:
    """'8.0 9.0a;12.0+PTX' as a list; an entry that cannot be compiled for is an error, not left out in silence."""
    entries = [entry for entry in re.split(r"[;,\s]+", text) if entry]
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not found:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: '{entry}' is no architecture; write for example '8.0;9.0+PTX'")
        if found[1] + found[2] not in supported:
            choices = ", ".join(f"{name[:-1]}.{name[-1]}" for name in sorted(supported, key=int))
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: this nvcc cannot compile for {entry}; it can for {choices}")
    if not entries:
        raise BuildError("TORCH_CUDA_ARCH_LIST is empty")
    return entries


def architecture_flags(architectures: list[str]) -> list[str]:
    """nvcc's -gencode flags; +PTX adds code that later GPUs can translate for themselves."""
    flags = []
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def output_of(*command: str) -> str:
    """What a compiler says about itself."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{shlex.join(command)} failed: {error}") from None


def find_cuda(torch: Torch) -> tuple[Cuda | None, str | None]:
    """The CUDA compiler to use, or None and why CUDA is left out."""
    if os.environ.get("PSSL_CUDA", "1") == "0":
        return None, "PSSL_CUDA=0 was set when it was built"
    forced = os.environ.get("FORCE_CUDA") == "1"
    if torch.cuda is None and not forced:
        return None, f"torch {torch.version} is a CPU build and FORCE_CUDA=1 was not set"
    nvcc = find_nvcc()
    if nvcc is None:
        where = "no nvcc in CUDA_HOME, in /usr/local/cuda or on PATH"
        if forced:
            raise BuildError(f"FORCE_CUDA=1, but {where}: install the CUDA toolkit or set CUDA_HOME")
        return None, f"{where}; install the CUDA toolkit (torch has CUDA {torch.cuda}) or set CUDA_HOME, and reinstall"
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    supported = set(re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch")))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:  # the default list goes as far as this nvcc does
        known = [a for a in DEFAULT_ARCHITECTURES.split(";") if a.removesuffix("+PTX").replace(".", "") in supported]
        asked = ";".join(known)
    return Cuda(nvcc, version[1] if version else "unknown", parse_architectures(asked, supported)), None


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


def ninja_file(output: Path, torch: Torch, cuda: Cuda | None, objects: Path) -> str:
    """The build plan as text."""
    cxx = find_cxx()
    common = ["-std=c++20", f"-DTORCH_TARGET_VERSION={torch_target()}", "-DTORCH_STABLE_ONLY", f"-I{ROOT / 'csrc'}"]
    common += ["-isystem", str(torch.directory / "include")]
    # Error texts carry __FILE__: without the map they would carry this machine's folders, and differ between builds.
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-ffile-prefix-map={ROOT}/="]
    strict = os.environ.get("PSSL_WERROR") == "1"
    cxxflags = common + OPTIMISE + host + (["-Werror"] if strict else []) + shlex.split(os.environ.get("CXXFLAGS", ""))
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
    pybind = pybind11_include()
    module_flags = ["-isystem", str(pybind)] if pybind else []
    module_flags += ["-isystem", sysconfig.get_path("include"), f"-I{objects}"]
    compile_to("module.o", "cxx", ROOT / "csrc/module.cpp", module_flags)
    for source in sorted((ROOT / "csrc/common").glob("*.cpp")):
        compile_to(f"common/{source.stem}.o", "cxx", source, [])
    for level in simd_levels():
        for source in sorted((ROOT / "csrc").glob("*_cpu.cpp")):
            flags = [f"-DPSSL_SIMD={level}", *SIMD_FLAGS[level]]
            compile_to(f"{level}/{source.stem}.o", "cxx", source, flags, f"({level})")

    # libtorch.so has to stay among the needed libraries although nothing is used from it directly: it brings in
    # libtorch_cuda, which the CUDA sources' weak symbols bind to in a CUDA torch.
    libraries = [f"-L{torch.directory / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
    libraries += ["-lc10"]
    if cuda:
        nvcc = [cuda.nvcc, *common, "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", *architecture_flags(cuda.architectures)]
        nvcc += ["-Xcompiler=" + ",".join(host), "--threads", os.environ.get("NVCC_THREADS", "2")]
        nvcc += ["-ccbin", cxx[-1]] if "CXX" in os.environ else []
        nvcc += ["-Werror", "all-warnings"] if strict else []
        lines.append(f"rule nvcc\n  command = {shell(nvcc)} $flags -MD -MF $out.d -c $in -o $out")
        lines.append("  depfile = $out.d\n  deps = gcc\n  description = $in")
        for source in sorted((ROOT / "csrc").glob("*_cuda.cu")):
            compile_to(f"cuda/{source.stem}.o", "nvcc", source, [])
        libraries += [f"-L{cuda.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link = shell([*cxx, "-shared"]) + " $in -o $out " + shell(libraries + shlex.split(os.environ.get("LDFLAGS", "")))
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
            f"compiling the native code failed{' at ' + ', '.join(failed) if failed else ''}. Last lines of the log:\n\n"
            + "\n".join(last)
            + f"\n\npssl: the whole log: {log}"
        )
    return log


def build(output: Path, version: str, torch: Torch | None) -> dict:
    """Builds the extension module at `output`; returns the record that `python -m pssl_ext.env` shows."""
    if torch is None:
        raise BuildError("torch not found: pip install torch first, or build with isolation (plain pip install)")
    cuda, cuda_reason = find_cuda(torch)
    base = Path(os.environ.get("PSSL_BUILD_DIR") or ROOT / "build").resolve()
    folder = base / f"pssl-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
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
