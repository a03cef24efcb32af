"""The build as far as it can be checked in seconds; real installations are made by .ci/run."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from new_python import in_new_python

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = {"75", "80", "86", "89", "90", "100", "120"}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """The in-tree build backend, imported as pip does: from its folder, outside any package."""
    pytest.importorskip("setuptools", minversion="77")
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    import pssl_backend

    return pssl_backend


@pytest.fixture
def native(backend):
    """The module that compiles."""
    import native

    return native


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that a failing build leaves this tree alone."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("build_tools", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def build_ext(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` as pip reaches it, with this test's environment variables only."""
    ours = re.compile(r"PSSL_|FORCE_CUDA$|TORCH_CUDA_ARCH_LIST$|CUDA_HOME$|CXX")
    inherited = {name: value for name, value in os.environ.items() if not ours.match(name)}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**inherited, "MAX_JOBS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_backend_finds_the_installed_torch(backend):
    import torch

    found = backend.find_torch()
    assert found.installed
    assert found.directory == Path(torch.__file__).parent
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert backend.get_requires_for_build_editable() == []
    assert backend.torch_requirement(found) == "torch>=2.11"


def test_backend_asks_for_torch_only_where_there_is_none(backend, monkeypatch):
    monkeypatch.setattr(backend, "installed_site_dirs", lambda: [])
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delenv("PSSL_NATIVE", raising=False)
    monkeypatch.delenv("PSSL_TORCH", raising=False)
    wanted = backend.settings()["torch-when-absent"]
    assert backend.get_requires_for_build_wheel() == [wanted]
    assert backend.torch_requirement(None) == wanted, "the package must ask for the torch it was built with"
    monkeypatch.setenv("PSSL_NATIVE", "0")
    assert backend.get_requires_for_build_wheel() == []


def test_torch_of_the_build_environment_does_not_count_as_installed(backend, monkeypatch):
    monkeypatch.setattr(backend, "installed_site_dirs", lambda: [])
    found = backend.find_torch()
    assert not found.installed
    assert backend.torch_requirement(found) == backend.settings()["torch-when-absent"]


def test_old_torch_is_named(backend, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.10.0+cu128'\ncuda: Optional[str] = '12.8'\n")
    assert backend.read_torch(tmp_path / "torch", True).cuda == "12.8"
    monkeypatch.setattr(backend, "installed_site_dirs", lambda: [str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"torch 2\.10\.0\+cu128 .* too old: pssl needs torch 2\.11 or newer"
    ):
        backend.find_torch()


@pytest.fixture
def cuda_toolkit(backend):
    """The module that decides on CUDA."""
    import cuda_toolkit

    return cuda_toolkit


def test_target_version_follows_from_the_requirement(native):
    assert native.torch_target() == "0x020b000000000000"


def test_architectures(cuda_toolkit):
    assert cuda_toolkit.parse_architectures("8.0 9.0a;12.0+PTX", SUPPORTED) == ["8.0", "9.0a", "12.0+PTX"]
    assert cuda_toolkit.architecture_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ampere", "'Ampere' is no architecture"),
        ("5.0", r"cannot compile for 5\.0; it can for 7\.5, "),
        (";", "is empty"),
    ],
)
def test_wrong_architectures_are_errors(cuda_toolkit, text, message):
    with pytest.raises(SystemExit, match=message):
        cuda_toolkit.parse_architectures(text, SUPPORTED)


def test_cuda_reasons(cuda_toolkit, backend, monkeypatch):
    cpu, gpu = (backend.Torch(Path("/torch"), "2.13.0", cuda, True) for cuda in (None, "13.0"))
    for name in ("FORCE_CUDA", "PSSL_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: None)
    assert "CPU build and FORCE_CUDA=1 was not set" in cuda_toolkit.find_cuda(cpu)[1]
    assert "no nvcc" in cuda_toolkit.find_cuda(gpu)[1]
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_CUDA=1, but no nvcc"):
        cuda_toolkit.find_cuda(cpu)
    monkeypatch.setenv("PSSL_CUDA", "0")
    assert cuda_toolkit.find_cuda(gpu) == (None, "PSSL_CUDA=0 was set when it was built")


def test_plan_quotes_folders_with_spaces(native, tmp_path):
    torch = native.Torch(tmp_path / "my torch", "2.13.0", None, True)
    plan = native.ninja_file(tmp_path / "out dir" / "_C.so", torch, None, tmp_path)
    assert f"'{tmp_path}/my torch/include'" in plan
    assert f"build {tmp_path}/out$ dir/_C.so: link" in plan
    assert plan.index("build module.o") < plan.index(": link module.o common/kept_memory.o common/simd.o")


@pytest.mark.slow_build
def test_the_module_is_compiled_apart_from_torch(native, tmp_path):
    """Torch 2.11 makes its copy of pybind11, which is found first, an error beside the macros of its stable ABI."""
    (tmp_path / "include/pybind11").mkdir(parents=True)
    refuses = "#if defined(TORCH_STABLE_ONLY) || defined(TORCH_TARGET_VERSION)\n#error refused\n#endif\n"
    (tmp_path / "include/pybind11/pybind11.h").write_text(f"{refuses}#include_next <pybind11/pybind11.h>\n")
    torch = native.Torch(tmp_path, "2.11.0", None, True)
    native.write_if_changed(tmp_path / "pssl_build_config.h", native.build_config("0", torch, None))
    flags = [*native.common_flags(torch), *native.module_flags(tmp_path), "-fsyntax-only"]
    subprocess.run([*native.find_cxx(), *flags, str(native.ROOT / "csrc/module.cpp")], check=True)


@pytest.mark.slow_build
def test_a_static_standard_library_stays_inside(native, tmp_path):
    """Mixed up with the shared one that is loaded already, it would find no way to print a number."""
    source, library = tmp_path / "text.cpp", tmp_path / "text.so"
    source.write_text(
        "#include <cstdio>\n#include <sstream>\n"
        'extern "C" void say(long n) { std::ostringstream s; s << "got " << n; std::puts(s.str().c_str()); }\n'
    )
    command = [*native.find_cxx(), "-fPIC", str(source), *native.LINK_FLAGS, "-static-libstdc++"]
    if subprocess.run([*command, "-o", str(library)], check=False).returncode:
        pytest.skip("the compiler has no static libstdc++")
    code = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]).say(ctypes.c_long(77))"
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "got 77\n"), done.stderr


def test_missing_compiler_is_named(source_copy):
    done = build_ext(source_copy, CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "C++ compiler '/nonexistent/c++' not found" in done.stderr
    assert "PSSL_NATIVE=0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow_build
def test_failing_compiler_names_the_file_and_the_log(source_copy):
    pytest.importorskip("ninja")
    (source_copy / "csrc/common/broken.cpp").write_text("int broken = undeclared_name;\n")
    done = build_ext(source_copy, CXX=shutil.which("c++") or shutil.which("g++"), CXXFLAGS="-O0")
    assert done.returncode != 0
    assert "common/broken.o" in done.stderr
    assert "undeclared_name" in done.stderr
    log = Path(re.search(r"the whole log: (\S+)", done.stderr)[1])
    assert log.is_relative_to(source_copy / "build")
    assert "-c " in log.read_text(), "the log holds the commands"
    assert "Traceback" not in done.stderr


def test_native_code_can_be_left_out(source_copy):
    package = source_copy / "pssl_ext"
    package.mkdir()
    (package / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    done = build_ext(source_copy, PSSL_NATIVE="0", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    record = json.loads((package / "_build.json").read_text())
    assert record["native"] is False and "PSSL_NATIVE=0" in record["native_reason"]
    assert not list(package.glob("_C.*")), "an extension from an earlier build would still be imported"


@pytest.fixture
def extension() -> None:
    """Skips where there is no compiled extension: a references-only installation is a supported one."""
    if importlib.util.find_spec("pssl_ext._C") is None:
        pytest.skip("the native extension is not built")


LOAD = """
import importlib.util, torch
spec = importlib.util.find_spec("pssl_ext._C")
import json; print(json.dumps(importlib.util.module_from_spec(spec).build_info()))
"""


@pytest.mark.usefixtures("extension")
def test_simd_level_can_be_lowered():
    done = in_new_python(LOAD, PSSL_SIMD="baseline")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["simd"]["chosen"] == "baseline"
    assert info["simd"]["compiled"][0] == "baseline"


@pytest.mark.usefixtures("extension")
def test_unknown_simd_level_names_the_choices():
    done = in_new_python(LOAD, PSSL_SIMD="sse9")
    assert done.returncode != 0
    assert "PSSL_SIMD must be one of baseline, avx2, avx512, got 'sse9'" in done.stderr


@pytest.mark.usefixtures("extension")
def test_build_info(backend):
    from pssl_ext import _C

    info = _C.build_info()
    assert info["version"] == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert info["cxx_standard"] >= 202002
    assert info["threads"] >= 1
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_loading_runs_no_vector_instructions():
    """The copies for avx2 and avx512 are initialised on every processor, also on one that lacks them."""
    objects = glob.glob(f"{ROOT}/build/pssl-*/avx*/*_cpu.o")
    if not objects or shutil.which("objdump") is None:
        pytest.skip("needs the objects of a build in this tree, and objdump")
    for path in objects:
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", "-j", ".text.startup", path],
            capture_output=True,
            text=True,
        ).stdout
        assert not re.search(r"%[xyz]mm\d", code), f"{path}: its static initialisers use vector registers"
