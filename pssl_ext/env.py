"""`python -m pssl_ext.env`: what was built, what runs, and why not more. `--json` for programs and bug reports."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from pssl_ext.op import OPS, explain

RECORD = Path(__file__).with_name("_build.json")
VARIABLES = re.compile(
    r"PSSL_\w+|FORCE_CUDA|CUDA_HOME|CUDA_VISIBLE_DEVICES|TORCH_CUDA_ARCH_LIST|MAX_JOBS|CXX|CXXFLAGS|LDFLAGS"
    r"|OMP_NUM_THREADS|TRITON_INTERPRET"
)


def processor() -> str:
    """The processor's name; platform.processor() is empty on most Linux systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return name[1] if name else platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """The CUDA devices that torch sees."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
        )
    return found


def build_record() -> dict[str, Any] | None:
    """What the last installation noted about its build; None if it never ran here (a bare source tree)."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else None


def extension() -> dict[str, Any]:
    """build_info() of the compiled extension, or why there is none."""
    try:
        return {"found": True, **importlib.import_module("pssl_ext._C").build_info()}
    except ImportError as error:
        record = build_record()
        if isinstance(error, ModuleNotFoundError):
            why = record["native_reason"] if record else None
            why = why or "it was not built for this Python: run `pip install -e .` in the source tree"
        else:
            why = str(error)
        return {"found": False, "reason": why}


def collect() -> dict[str, Any]:
    """The whole report as plain data."""
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cuda_available": torch.cuda.is_available(),
            "threads": torch.get_num_threads(),
        },
        "gpus": gpus(),
        "extension": extension(),
        "build": build_record(),
        "ops": {name: {device: explain(name, device) for device in ("cpu", "cuda")} for name in OPS},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)
        },
    }


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader would want to know but could not read off one line."""
    built, running, record = report["extension"], report["torch"], report["build"] or {}
    notes = []
    if not built["found"]:
        notes.append(f"no native code: {built['reason']}")
    elif not built["cuda"]:
        notes.append(
            f"no CUDA kernels: {record.get('cuda_reason') or 'not recorded; reinstall to see the reason'}"
        )
    else:
        covered = [re.sub(r"[af]?(\+PTX)?$", "", name) for name in built["cuda_architectures"]]
        newest = max(tuple(map(int, name.split("."))) for name in covered)
        later = any(name.endswith("+PTX") for name in built["cuda_architectures"])
        for gpu in report["gpus"]:
            have = tuple(map(int, gpu["capability"].split(".")))
            same_major = [
                c for c in covered if int(c.split(".")[0]) == have[0] and int(c.split(".")[1]) <= have[1]
            ]
            if not same_major and not (later and have >= newest):
                notes.append(
                    f"{gpu['name']} ({gpu['capability']}) is not among the compiled architectures: reinstall with "
                    f"TORCH_CUDA_ARCH_LIST={gpu['capability']}"
                )
    if built["found"] and built["torch"] != running["version"]:
        notes.append(
            f"built against torch {built['torch']}, running {running['version']}: fine, the stable ABI serves both"
        )
    if running["cuda"] and not running["cuda_available"]:
        notes.append(f"torch was built with CUDA {running['cuda']} but finds no usable GPU or driver")
    return notes


def section(title: str, rows: dict[str, Any]) -> list[str]:
    """One block of the report; long values keep their own lines, indented."""
    width = max((len(name) for name in rows), default=0)
    lines = [title]
    for name, value in rows.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"  {name:<{width}}  " + text.replace("\n", "\n" + " " * (width + 4)))
    return [*lines, ""]


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    running, built, record = report["torch"], report["extension"], report["build"] or {}
    machine = {
        "python": f"{report['python']} ({report['executable']})",
        "system": report["system"],
        "processor": f"{report['processor']}, {report['cores']} cores usable",
    }
    gpu_names = [f"{gpu['name']} ({gpu['capability']}, {gpu['memory_gib']} GiB)" for gpu in report["gpus"]]
    pytorch = {
        "version": running["version"],
        "CUDA": running["cuda"] or "none (CPU build)",
        "GPUs": gpu_names or "none",
        "threads": running["threads"],
    }
    native = {"found": "yes" if built["found"] else "no"}
    if built["found"]:
        native |= {
            "version": built["version"],
            "compiler": f"{built['compiler']}, C++ {str(built['cxx_standard'])[2:4]}",
            "built against": f"torch {built['torch']} (stable ABI, target {built['torch_target_version']})",
            "CUDA": built["cuda"] or "none",
            "architectures": built["cuda_architectures"] or "none",
            "SIMD": f"{built['simd']['chosen']} of {', '.join(built['simd']['compiled'])}"
            f" (this processor: up to {built['simd']['supported']})",
            "threads": f"{built['threads']}, torch's own",
        }
    if record.get("log"):
        native["build log"] = record["log"]
    lines = section("Machine", machine) + section("PyTorch", pytorch) + section("Native code", native)
    lines += ["Operators", *(f"  {text}" for texts in report["ops"].values() for text in texts.values()), ""]
    if report["environment"]:
        lines += section("Environment variables", report["environment"])
    notes = remarks(report)
    lines += ["Remarks", *(f"  - {note}" for note in notes)] if notes else ["Nothing to remark."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(prog="python -m pssl_ext.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print plain data")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))


if __name__ == "__main__":
    main()
