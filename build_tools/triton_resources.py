"""What every Triton kernel takes: registers, spilled bytes, shared memory, and which matrix instructions it uses.

    python build_tools/triton_resources.py       also: make triton-resources
    python build_tools/triton_resources.py 90    on sm_90 alone; make triton-resources ARGS=90

Calls the operators' forward and backward on tensors without memory, takes down what they would launch, and compiles
that ahead of time as a launch on sm_80, sm_90 or sm_100 would, or on those given. Fails where a kernel spills more than
SPILL_LIMIT, where one that multiplies matrices has no matrix instruction, and where one does not compile. No GPU is
needed. Without Triton it says so and does nothing.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cuda_resources import SPILL_LIMIT, table
from pssl_backend import ROOT

from pssl_ext.op import OPS

# In the machine code: of Ampere and Ada, of Hopper, of Blackwell.
MATRIX_INSTRUCTION = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")

# All of the classes' tiles on the architecture in the middle; on the others the smallest, VOC's: the sizes of the
# tiles do not depend on the architecture. CLASSES are the number of regions of VOC, COCO and COCO-Stuff.
CLASSES = {80: (21,), 90: (21, 81, 171), 100: (21,)}


@dataclass
class Launch:
    """A kernel with the arguments of one call."""

    operator: str
    kernel: Any
    args: tuple
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's name with what sets this compilation apart."""
        named = {n: v for n, v in self.constants.items() if n not in ("num_warps", "num_stages")}
        told = [getattr(v, "__name__", None) or f"{n}={v:d}" for n, v in named.items() if v]
        types = (
            {a.dtype for a in self.args[0] if isinstance(a, torch.Tensor)}
            if isinstance(self.args[0], tuple)
            else ()
        )
        told += [str(t).removeprefix("torch.") for t in types]
        return f"{self.kernel.__name__.removesuffix('_kernel')} {' '.join(told)}"


class Target:
    """Stands in for Triton's driver: a device of ``architecture``, which is also its number."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def calls(classes: int) -> Iterator[tuple[str, str, tuple]]:
    """(operator, "forward" or "backward", arguments) of calls that between them launch every kernel."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, size in [(d, s) for d in (torch.bfloat16, torch.float32) for s in (56, 448)]:
        features = empty(2, 256, 56, 56, dtype=dtype)
        labels = empty(2, size, size, dtype=torch.int64)
        pool = OPS["prototype_pool"].arguments(features, labels, classes, None, True, 255, False, 1e-12)
        sums = (empty(2, classes, 256), empty(2, classes))
        yield "prototype_pool", "forward", (pool,)
        yield "prototype_pool", "backward", (*sums, pool, [True, False, False])
        contrast = OPS["prototype_contrast"].arguments(
            features, empty(classes, 256), labels, empty(), None, None, 255, False, 1e-12
        )
        yield "prototype_contrast", "forward", (contrast,)
        yield "prototype_contrast", "backward", (empty(2, size, size), None, contrast, [True] * 3 + [False])
    if classes == CLASSES[80][0]:  # its tiles depend on the number of maps: the method's three and four
        for dtype in (torch.bfloat16, torch.float32):
            main = [empty(2, 20, n, n, dtype=dtype) for n in (28, 56, 112)]
            support = [empty(2, 20, n, n, dtype=dtype) for n in (28, 56, 84, 112)]
            compare = OPS["cam_compare"].arguments(main, support, empty(2, 20), 56, 56, True)
            yield "cam_compare", "forward", (compare,)
            yield "cam_compare", "backward", (empty(2, 20), compare, [True, False])


def launches(classes: int) -> list[Launch]:
    """What ``calls`` launch, each kernel and kind of arguments once for an operator."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []
    unpatched = JITFunction.__getitem__
    for operator, direction, args in calls(classes):

        def record(kernel: Any, grid: tuple, operator: str = operator) -> Any:
            return lambda *given, **constants: found.append(Launch(operator, kernel, given, constants))

        JITFunction.__getitem__ = record
        try:
            getattr(importlib.import_module(f"pssl_ext.triton.{operator}"), direction)(*args)
        finally:
            JITFunction.__getitem__ = unpatched
    return found


def compile_all(pool: Executor, architectures: list[int]) -> list[dict]:
    """The figures of each kernel."""
    import triton

    found = {}
    with triton.AsyncCompileMode(pool):
        for architecture in architectures:
            triton.runtime.driver.set_active(Target(architecture))
            for launch in itertools.chain.from_iterable(map(launches, CLASSES[architecture])):
                compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.constants)
                # Triton itself keeps what it compiled, by the kinds of the arguments
                found.setdefault(id(compiled), (architecture, launch, compiled))
    return list(pool.map(lambda entry: describe(*entry), found.values()))


def describe(architecture: int, launch: Launch, compiled: Any) -> dict:
    """The figures of a kernel."""
    return {
        "operator": launch.operator,
        "kernel": launch.name,
        "architecture": f"sm_{architecture}",
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        **figures(compiled.asm["cubin"]),
        "multiplies": "tt.dot" in compiled.asm["ttir"],
        "bundled": all(bundled(a) for a in launch.args if isinstance(a, tuple)),
    }


def bundled(argument: tuple) -> bool:
    """Whether Triton 3.6 compiles it too: see ``bundle`` in pssl_ext/triton/launch.py."""
    return argument[-1] is None or not any(isinstance(a, tuple) for a in argument)


def figures(cubin: bytes) -> dict:
    """Registers, spilled bytes and matrix instructions of a compiled kernel, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / tool[0], *tool[1:], file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool in (("cuobjdump", "-res-usage"), ("nvdisasm",))
        )
    told = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(told["REG"]),
        "spilled": int(told["STACK"]) + int(told["LOCAL"]),
        "matrix": dict(collections.Counter(MATRIX_INSTRUCTION.findall(code))),
    }


def faults(entry: dict) -> list[str]:
    """What is wrong with a kernel."""
    found = []
    if entry["spilled"] > SPILL_LIMIT:
        found.append(f"spills {entry['spilled']} bytes, more than {SPILL_LIMIT}")
    if not entry["bundled"]:
        found.append("takes tuples in a tuple that bundle() has not made")
    if entry["multiplies"] and not entry["matrix"]:
        found.append("multiplies matrices without a matrix instruction")
    return found


def matrix_table(entries: list[dict]) -> str:
    """A line for each kernel that multiplies matrices: which instructions, and how many, on each architecture."""
    lines = collections.defaultdict(list)
    for e in entries:
        if e["multiplies"]:
            told = " ".join(f"{count} {name}" for name, count in e["matrix"].items())
            lines[e["operator"], e["kernel"]].append(f"{e['architecture']} {told or 'none'}")
    return "\n".join(f"{operator} {kernel}: {', '.join(told)}" for (operator, kernel), told in lines.items())


def main(arguments: list[str]) -> int:
    """0 where everything compiles and fits."""
    if unknown := sorted(set(arguments) - {str(a) for a in CLASSES}):
        known = ", ".join(map(str, CLASSES))
        print(
            f"triton-resources: architectures must be of {known}, got {', '.join(unknown)}", file=sys.stderr
        )
        return 2
    architectures = [int(a) for a in arguments] or list(CLASSES)
    if importlib.util.find_spec("triton") is None:
        print("triton-resources: skipped, triton is not installed")
        return 0
    os.environ.pop("TRITON_INTERPRET", None)
    folder = Path(os.environ.get("PSSL_BUILD_DIR") or ROOT / "build").resolve() / "triton_resources"
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    sys.path.insert(0, str(ROOT))
    import triton

    # threads: compiling holds Python's lock for a small part of its time
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))) as pool:
        entries = compile_all(pool, architectures)
    print(f"Registers (+ spilled bytes), Triton {triton.__version__}\n{table(entries)}")
    failed = 0
    for entry in entries:
        for fault in faults(entry):
            print(f"{entry['operator']} {entry['kernel']} on {entry['architecture']}: {fault}")
            failed += 1
    print(f"Matrix instructions\n{matrix_table(entries)}")
    print(f"{len(entries)} kernels compiled, {failed} faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
