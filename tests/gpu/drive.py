"""Runs every operator's kernels once, forward and backward, on small inputs: what compute-sanitizer watches.

    python tests/gpu/drive.py [--device cuda] [--ops random_walk,dense_crf] [--dtypes float32,bfloat16]

Ends with an error if an operator has no kernel on the device, or if it is asked for one that does not exist.
"""

from __future__ import annotations

import argparse
import sys

import torch

from pssl_ext import backends
from pssl_ext.registry import OPS
from pssl_ext.testing import run, samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--dtypes", default="float32,bfloat16,float64")
    options = parser.parse_args()
    calls = 0
    for op in options.ops.split(","):
        if op not in OPS:
            parser.error(f"--ops: no operator {op!r}; there are {', '.join(OPS)}")
        reason = backends.why_not(op, "native", options.device)
        if reason is not None:
            print(f"{op}: {reason}", file=sys.stderr)
            return 1
        for dtype in options.dtypes.split(","):
            for sample in samples(op, options.device, getattr(torch, dtype), "contiguous"):
                run(OPS[op], sample.args, "native")
                calls += 1
        print(f"{op}: done", flush=True)
    if torch.device(options.device).type == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {options.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
