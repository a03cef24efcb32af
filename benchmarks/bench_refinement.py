"""The two refinements of CAMs, random_walk and pixel_refine, against other code.

    python benchmarks/bench_refinement.py                  # tables, goals, runs/bench/refinement.json, .csv, .png
    python benchmarks/bench_refinement.py --sweep pixels   # cost against pixels or classes

random_walk: `dense` is IRN's transition matrix, squared; `sparse` and `scipy` its few non-zeros as a CSR matrix,
multiplied 2^8 times; `sliced` our reference. On IRN's map of 94×125 cells the dense matrix takes minutes: there its
making and one squaring are timed, and the time of 8 is an estimate, marked so (--dense runs it whole). pixel_refine:
`par` gathers all neighbours of all masks in every iteration; `sliced` is our reference. Ours is named after its
backend.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness.problem import Lineup, Problem, Provider, missing
from harness.runner import Deferred, parser, run
from peers import refinement as peers
from scenes import generator, on
from torch import Tensor
from torch.nn import functional as F

from pssl_ext import pixel_refine, random_walk
from pssl_ext.op import OPS

SWEEPS = {"pixels": (32, 64, 128), "classes": (1, 4, 16)}  # pixels: the side
REFINE = dict(
    dilations=peers.DILATIONS,
    iterations=peers.ITERATIONS,
    colour_scale=peers.COLOUR_SCALE,
    position_weight=peers.POSITION_WEIGHT,
)


def walk_with(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    settings = dict(radius=peers.RADIUS, beta=peers.BETA, log2_steps=peers.LOG2_STEPS)
    return partial(random_walk, **settings, backend=backend)


def problem(
    name: str, title: str, inputs: dict[str, Tensor], lineup: Lineup, make: Callable[[str], Provider], **more
) -> Problem:
    op = name.split("/")[0]
    device = next(iter(inputs.values())).device
    lineup.add("sliced", make("reference"), compiled=op == "pixel_refine")
    ours = lineup.own(op, device, make)
    moved = OPS[op].bytes_moved(**inputs)
    return Problem(name, f"{op}, {title}", inputs, (), lineup.providers, ours, moved, lineup.left_out, **more)


def walk_problem(
    args: argparse.Namespace, h: int, w: int, k: int = 3, dense: bool = True, at: int | None = None
) -> Problem:
    g, lineup = generator(), Lineup()
    # a boundary map is mostly open: a few ridges between smooth areas
    edge = F.interpolate(torch.rand(1, 1, h // 4, w // 4, generator=g), size=(h, w), mode="bicubic")[0, 0]
    inputs = on(args.device, cams=torch.rand(k, h, w, generator=g), edge=(edge.clamp(0, 1) ** 3).contiguous())
    if dense:
        lineup.add("dense", peers.walk_dense)
    lineup.add("sparse", peers.walk_sparse).add("scipy", peers.walk_scipy, missing("scipy", "scipy"))
    return problem(
        f"random_walk/{h}x{w}" if at is None else "random_walk",
        f"{h}×{w} cells, k={k}, 2^{peers.LOG2_STEPS} steps",
        inputs,
        lineup,
        walk_with,
        # in float32 the roundings of 256 sparse steps, and those of a dense matrix squared 8 times, come to 2e-4
        tolerance=1e-3,
        in_numpy=("scipy",),
        estimates={} if dense else {"dense": dense_estimate},
        size=at,
    )


def dense_estimate(inputs: dict[str, Tensor]) -> tuple[float, str]:
    start = time.perf_counter()
    matrix = peers.transition(inputs["edge"])
    made = time.perf_counter()
    matrix = matrix @ matrix
    float(matrix[0, 0])  # waits for the GPU
    making, squaring = made - start, time.perf_counter() - made
    how = f"{making:.1f} s for the matrix, {squaring:.1f} s for one squaring of it, taken {peers.LOG2_STEPS} times"
    return making + peers.LOG2_STEPS * squaring, how


def refine_problem(
    args: argparse.Namespace, size: int, k: int, compiled: bool = True, at: int | None = None
) -> Problem:
    g, lineup = generator(), Lineup(compiled and not args.no_compile)
    # smooth colours with noise upon them, as photographs have
    smooth = F.interpolate(torch.rand(1, 3, 9, 9, generator=g), size=(size, size), mode="bilinear")
    images = 255 * (smooth + 0.05 * torch.randn(1, 3, size, size, generator=g)).clamp(0, 1)
    masks = torch.rand(1, k, max(size // 8, 1), max(size // 8, 1), generator=g)
    lineup.add("par", peers.refine_par)
    return problem(
        f"pixel_refine/{size}" if at is None else "pixel_refine",
        f"k={k}, {masks.shape[-1]}² → {size}², {8 * len(peers.DILATIONS)} neighbours, {peers.ITERATIONS} iterations",
        on(args.device, images=images, masks=masks),
        lineup,
        refine_with,
        size=at,
    )


def refine_with(backend: str) -> Provider:
    if backend == "reference":  # as it stands: torch.compile takes no operator apart
        return lambda images, masks: OPS["pixel_refine"].reference(
            images, masks, list(peers.DILATIONS), *list(REFINE.values())[1:]
        )
    return partial(pixel_refine, **REFINE, backend=backend)


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    yield "random_walk/24x32", partial(walk_problem, args, 24, 32)
    yield "random_walk/94x125", partial(walk_problem, args, 94, 125, dense=args.dense)
    yield "pixel_refine/224", partial(refine_problem, args, 224, 4)
    yield "pixel_refine/448", partial(refine_problem, args, 448, 21, compiled=False)


def sweep(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    for value in SWEEPS[args.sweep]:
        pixels = args.sweep == "pixels"
        side, k, at = (value, 3, value * value) if pixels else (64, value, value)
        yield "random_walk", partial(walk_problem, args, side, side, k, dense=side <= 32, at=at)
        yield (
            "pixel_refine",
            partial(refine_problem, args, 2 * side, k, compiled=False, at=4 * at if pixels else at),
        )


def main() -> None:
    options = parser(__doc__, "refinement", seconds=120, sweeps=SWEEPS, compiles=True)
    options.add_argument("--dense", action="store_true", help="run the dense walk on 94×125 cells whole")
    args = options.parse_args()
    warnings.filterwarnings("ignore", message="Sparse")  # torch's CSR matrices are in beta
    run(args, sweep(args) if args.sweep else problems(args))


if __name__ == "__main__":
    main()
