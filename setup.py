"""The parts of the package that depend on the machine: the torch requirement and the native code.

Everything else is in pyproject.toml; how the native code is compiled is in build_tools/native.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))

import native
import pssl_backend

MODULE = "pssl_ext._C"
RECORD = "_build.json"


class BuildNative(build_ext):
    """Hands the one extension to native.build and leaves a record of what was built beside it."""

    record: dict

    def build_extension(self, ext: Extension) -> None:
        """With PSSL_NATIVE=0 nothing is compiled; the record then says that this was asked for."""
        if not pssl_backend.native_wanted():
            reason = "PSSL_NATIVE=0 was set when it was installed"
            self.record = {"native": False, "native_reason": reason, "cuda": None, "cuda_reason": reason}
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        self.record = native.build(output, self.distribution.get_version(), pssl_backend.find_torch())

    def run(self) -> None:
        """The record goes where the extension goes: into the wheel, for an editable install into the source tree."""
        super().run()
        package = Path(*MODULE.split(".")[:-1])
        targets = [Path(self.build_lib) / package]
        if self.inplace:
            targets.append(package)
            if not self.record["native"]:  # an extension left from an earlier install would still be imported
                for stale in package.glob("_C.*.so"):
                    stale.unlink()
        for target in targets:
            # The log's path means something in the source tree only; a wheel may go to another machine.
            record = {key: value for key, value in self.record.items() if key != "log" or target == package}
            target.mkdir(parents=True, exist_ok=True)
            (target / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


setup(
    install_requires=[
        pssl_backend.torch_requirement(pssl_backend.find_torch()),
        *pssl_backend.settings()["dependencies"],
    ],
    # `optional` keeps setuptools from insisting on a file that PSSL_NATIVE=0 does not make.
    ext_modules=[Extension(MODULE, ["csrc/module.cpp"], optional=not pssl_backend.native_wanted())],
    cmdclass={"build_ext": BuildNative},
)
