"""Whether CUDA is compiled, with which nvcc and for which GPUs; and the error that ends a build."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pssl_backend import Torch

DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


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
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: '{entry}' is no architecture; write for example '8.0;9.0+PTX'"
            )
        if found[1] + found[2] not in supported:
            choices = ", ".join(f"{name[:-1]}.{name[-1]}" for name in sorted(supported, key=int))
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: this nvcc cannot compile for {entry}; it can for {choices}"
            )
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
        return (
            None,
            f"{where}; install the CUDA toolkit (torch has CUDA {torch.cuda}) or set CUDA_HOME, and reinstall",
        )
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    supported = set(re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch")))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:  # the default list goes as far as this nvcc does
        known = [
            a
            for a in DEFAULT_ARCHITECTURES.split(";")
            if a.removesuffix("+PTX").replace(".", "") in supported
        ]
        asked = ";".join(known)
    return Cuda(nvcc, version[1] if version else "unknown", parse_architectures(asked, supported)), None
