"""Runs every operator's kernels once, forward and backward, on small inputs: what compute-sanitizer watches.

    python tests/gpu/drive.py [--device cuda] [--ops random_walk,dense_crf] [--dtypes float32,bfloat16]

Triton kernels too, where there are any. Ends with an error if an operator has no native kernel on the device, or if it
is asked for one that does not exist.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from pssl_ext import dispatch
from pssl_ext.op import OPS
from pssl_ext.testing import run, samples


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--dtypes", default="float32,bfloat16,float64")
    options = parser.parse_args(arguments)
    calls = 0
    for op in options.ops.split(","):
        if op not in OPS:
            parser.error(f"--ops: no operator {op!r}; there are {', '.join(OPS)}")
        refused = {
            backend: dispatch.why_not(OPS[op], backend, options.device) for backend in ("native", "triton")
        }
        if refused["native"] is not None:
            print(f"{op}: {refused['native']}", file=sys.stderr)
            return 1
        ran = [backend for backend, reason in refused.items() if reason is None]
        for backend, dtype in itertools.product(ran, options.dtypes.split(",")):
            if backend == "triton" and dtype == "float64":
                continue  # Triton kernels take none
            for sample in samples(op, options.device, getattr(torch, dtype), "contiguous"):
                run(OPS[op], sample.args, backend)
                calls += 1
        print(f"{op}: {', '.join(ran)}", flush=True)
    if torch.device(options.device).type == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {options.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
