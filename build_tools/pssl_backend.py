"""In-tree PEP 517/660 backend: setuptools, plus "build against the torch that is already there".

pip builds in an isolated environment that hides the user's packages. Were torch listed under
`build-system.requires`, pip would download a second, newer torch and build against that one; left out, the build
finds none. So torch is looked up here, in the environment the package will be installed into. It is never imported:
the build needs its headers, its libraries and its version file. Only where there is none is one asked for.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent.parent


def settings() -> dict:
    """The [tool.pssl] table: what the standard tables cannot hold, because it depends on the torch that is found."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pssl"]


def torch_minimum() -> tuple[int, int]:
    """The oldest torch whose stable ABI the native code may use, as (major, minor)."""
    found = re.fullmatch(r"torch>=(\d+)\.(\d+)", settings()["torch-when-present"])
    if not found:
        raise SystemExit("pssl: [tool.pssl] torch-when-present must read 'torch>=MAJOR.MINOR'")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Torch:
    """A torch on disk. `installed` is false for one that was fetched into the build environment only."""

    directory: Path
    version: str
    cuda: str | None
    installed: bool


def installed_site_dirs() -> list[str]:
    """Where the packages of the environment being installed into live, seen from inside an isolated build.

    pip runs that environment's own interpreter, so sysconfig still names its folders although they are not on
    sys.path. Other tools (uv, build) run an interpreter of a throwaway environment: there the activated environment,
    or PSSL_TORCH_PREFIX, says which one is meant. Under pip the activated environment may be another one: ignored.
    """
    prefixes = [os.environ.get("PSSL_TORCH_PREFIX")]
    if "PIP_BUILD_TRACKER" not in os.environ:  # pip sets it for every build it starts
        prefixes += [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")]
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    dirs = [os.path.join(prefix, "lib", python, "site-packages") for prefix in prefixes if prefix]
    dirs += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # no virtual environment: `pip install --user` counts too
        dirs.append(site.getusersitepackages())
    return list(dict.fromkeys(d for d in dirs if os.path.isdir(d)))


def read_torch(directory: Path, installed: bool) -> Torch:
    """Version and CUDA of the torch in `directory`, from its version file; importing it would take seconds."""
    text = (directory / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.M)
    cuda = re.search(r"^cuda\b.*=\s*'([^']+)'", text, re.M)
    if not version:
        raise SystemExit(f"pssl: cannot read the version of torch from {directory / 'version.py'}")
    return Torch(directory, version[1], cuda and cuda[1], installed)


def find_torch() -> Torch | None:
    """The torch to build against: the installed one, else the build environment's, else None."""
    for path, installed in ((installed_site_dirs(), True), (None, False)):
        spec = importlib.machinery.PathFinder.find_spec("torch", path)
        if spec is not None and spec.origin:
            torch = read_torch(Path(spec.origin).parent, installed)
            have = tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2])
            if have < torch_minimum():
                need = ".".join(map(str, torch_minimum()))
                raise SystemExit(
                    f"pssl: torch {torch.version} in {torch.directory.parent} is too old: pssl needs torch {need} or "
                    "newer. Upgrade it (pip install --upgrade torch), or install into another environment."
                )
            return torch
    return None


def torch_requirement(torch: Torch | None) -> str:
    """What the installed package says about torch.

    With torch installed, any version the stable ABI allows: pip must not replace the user's. With none, the range
    that the build environment was given too, so that both get the same torch and it is fetched once.
    """
    if torch is not None and torch.installed:
        return settings()["torch-when-present"]
    return os.environ.get("PSSL_TORCH") or settings()["torch-when-absent"]


def native_wanted() -> bool:
    """PSSL_NATIVE=0 leaves the native code out on purpose."""
    return os.environ.get("PSSL_NATIVE", "1") != "0"


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """torch, only if native code will be built and there is no torch to build against."""
    torch = find_torch()
    return [torch_requirement(torch)] if torch is None and native_wanted() else []


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """As for a wheel."""
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: dict | None = None) -> list[str]:
    """Nothing: a source archive is packed, not compiled."""
    return []
