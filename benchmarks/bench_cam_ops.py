"""The operators on CAMs against other code: MAM's loss and the threshold sweep (the region mask is in bench_rcm.py).

    python benchmarks/bench_cam_ops.py                      # tables, goals, runs/bench/cam_ops.json, .csv, .png
    python benchmarks/bench_cam_ops.py --sweep thresholds   # cost against pixels, classes or thresholds

Providers: `peers` resizes all maps of all classes and multiplies absent ones by 0, `present` gathers the present ones
first; the sweep's are numpy and torchmetrics, as evaluation scripts are: `peers` an argmax and a confusion matrix a
threshold, `one_pass` one histogram for all. Ours is named after its backend. See benchmarks/peers/cams.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness.problem import Lineup, Problem, missing
from harness.runner import Deferred, parser, run
from peers import cams as peers
from peers.rcm import IGNORE
from scenes import SCALES, blobs, cam_pyramid, generator, image_labels, on
from torch import Tensor

from pssl_ext import cam_compare, cam_sweep
from pssl_ext.op import OPS

C = 21  # PASCAL VOC's classes and background
VOC = (375, 500)  # the size of its images, mostly
T = 60
SWEEPS = {"pixels": (128, 256, 512, 1024), "classes": (2, 5, 20, 80), "thresholds": (10, 30, 100, 300)}


def compare_with(backend: str, size: tuple[int, int]) -> Callable[..., Tensor]:
    return lambda image_labels, **maps: cam_compare(
        *peers.split(maps), image_labels, size=size, backend=backend
    )


def compare_problem(args: argparse.Namespace, base: int = 56) -> Problem:
    g, k, size = generator(), C - 1, (base, base)
    labels = image_labels(g, args.batch, k)
    maps = {
        n: t for side in ("main", "support") for n, t in cam_pyramid(g, side, args.batch, k, base).items()
    }
    lineup = Lineup(not args.no_compile)
    lineup.add("peers", peers.compare_all(size), compiled=True).add("present", peers.compare_present(size))
    ours = lineup.own("cam_compare", args.device, lambda b: compare_with(b, size))
    main, support = peers.split(maps)
    return Problem(
        "cam_compare",
        f"cam_compare, {base}² × {SCALES}, B={args.batch}, K={k}",
        on(args.device, image_labels=labels, **maps),
        tuple(maps),
        lineup.providers,
        ours,
        OPS["cam_compare"].bytes_moved(main=main, support=support, image_labels=labels),
        lineup.left_out,
    )


def sweep_problem(
    args: argparse.Namespace,
    name: str,
    k: int,
    *,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] = VOC,
    images: int = 1,
    thresholds: int = T,
    at: int | None = None,
) -> Problem:
    """``images`` with ``k`` CAMs each, of the grid's size (default: the image's)."""
    g, grid, c = generator(), grid or size, max(C, k + 1)
    tried, inputs = [i / thresholds for i in range(thresholds)], {}
    for i in range(images):
        truth = blobs(g, 1, c, *size)[0].argmax(0).to(torch.uint8)
        truth[torch.rand(size, generator=g) < 0.05] = IGNORE
        inputs[f"cam_{i}"] = blobs(g, 1, k, *grid)[0].sigmoid()
        inputs[f"ids_{i}"] = torch.randperm(c - 1, generator=g)[:k].sort().values + 1
        inputs[f"truth_{i}"] = truth
    lineup = Lineup()
    if images == 1:  # minutes a call otherwise
        lineup.add(
            "torchmetrics", peers.sweep_torchmetrics(tried, c), missing("torchmetrics", "torchmetrics")
        )
        lineup.add("peers", peers.sweep_loop(tried, c))
    lineup.add("one_pass", peers.sweep_one_pass(tried, c))

    def own(backend: str) -> Callable[..., Tensor]:
        return lambda **inputs: cam_sweep(
            *(list(t) for t in zip(*peers.images(inputs), strict=True)), tried, c, backend=backend
        )

    ours = lineup.own("cam_sweep", args.device, own)
    cams, ids, truth = (list(t) for t in zip(*peers.images(inputs), strict=True))
    several = f"{images} images of" if images > 1 else "image"
    return Problem(
        f"cam_sweep/{name}",
        f"cam_sweep, {k} CAMs {grid[0]}×{grid[1]}, {several} {size[0]}×{size[1]}, T={thresholds}, C={c}",
        on(args.device, **inputs),
        (),
        lineup.providers,
        ours,
        OPS["cam_sweep"].bytes_moved(cams, ids, truth, tried),
        lineup.left_out,
        in_numpy=("peers", "one_pass"),
        # resized, F.interpolate's last bits may put a pixel on the other side of a threshold
        tolerance=0.0 if grid == size else 1e-3,
        size=at,
    )


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    yield "cam_compare", partial(compare_problem, args)
    sizes = {
        "all-classes": dict(k=C - 1),
        "2-classes": dict(k=2),
        "2-coarse": dict(k=2, grid=(47, 63)),
        "32-images": dict(k=2, images=32),
    }
    for name, size in sizes.items():
        yield f"cam_sweep/{name}", partial(sweep_problem, args, name, **size)


def sweep(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    for value in SWEEPS[args.sweep]:
        size = {
            "pixels": dict(k=2, size=(value, value), at=value * value),
            "classes": dict(k=value, at=value),
            "thresholds": dict(k=2, thresholds=value, at=value),
        }[args.sweep]
        yield "cam_sweep/sweep", partial(sweep_problem, args, "sweep", **size)


def main() -> None:
    options = parser(__doc__, "cam_ops", seconds=120, sweeps=SWEEPS, compiles=True)
    options.add_argument("--batch", type=int, default=16, help="images of MAM's loss (default: 16)")
    args = options.parse_args()
    run(args, sweep(args) if args.sweep else problems(args))


if __name__ == "__main__":
    main()
