"""dense_crf against pydensecrf, on a photograph where there are any, at the size of VOC's images.

    python benchmarks/bench_dense_crf.py --root <VOC folder>   # tables, goals, runs/bench/dense_crf.json, .csv, .png
    python benchmarks/bench_dense_crf.py --sweep pixels        # cost against pixels or classes

Equal parameters, the default ones. `pydensecrf` (pip install pydensecrf2) runs on one thread, ours on --threads; they
agree when 99.5 % of the labels do. The probabilities are ground truth blurred and disturbed; without photographs a
drawing stands in, and smaller photographs than --size are continued by their reflection.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from harness.problem import Lineup, Problem
from harness.runner import Deferred, parser, run
from peers import crf as peers
from scenes import on
from torch import Tensor

from pssl_ext import dense_crf
from pssl_ext.op import OPS

SWEEPS = {"pixels": (64, 128, 256, 512), "classes": (2, 5, 21, 81)}


def crf_with(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(dense_crf, backend=backend)


def problem_id(c: int, photograph: int) -> str:
    return f"dense_crf/{c}-classes" + (f"/{photograph}" if photograph else "")


def problem(
    args: argparse.Namespace,
    c: int,
    size: tuple[int, int],
    photograph: int = 0,
    at: int | None = None,
) -> Problem:
    picture = "a drawing"
    images, classes = peers.drawing(size)
    if args.root is not None:
        picture = f"photograph {photograph}"
        images, classes = peers.continued(*peers.photograph(args.root, photograph), size)
    probabilities = peers.disturbed(classes, c)
    inputs = on(args.device, images=images, probabilities=probabilities)
    lineup = Lineup().add("pydensecrf", peers.crf, peers.why_not())
    ours = lineup.own("dense_crf", args.device, crf_with)
    if "pydensecrf" in lineup.providers:
        labels = [f(**inputs) for f in (peers.crf, crf_with(ours))]
        agreement = peers.labels_agree(*labels)
        if agreement < peers.LEAST_AGREEMENT:
            raise SystemExit(
                f"dense_crf, {picture}, C={c}: {ours} disagrees with pydensecrf: {100 * agreement:.2f} % of the labels "
                f"are the same, expected {100 * peers.LEAST_AGREEMENT} %"
            )
        changed = 1 - peers.labels_agree(labels[1], inputs["probabilities"])
        print(f"{100 * agreement:.3f} % of the labels agree, {100 * changed:.1f} % were changed")
    return Problem(
        problem_id(c, photograph) if at is None else "dense_crf",
        f"dense_crf, {picture}, {size[0]}×{size[1]}, C={c}",
        inputs,
        (),
        lineup.providers,
        ours,
        OPS["dense_crf"].bytes_moved(**inputs),
        lineup.left_out,
        own_memory=("pydensecrf",),  # what PyTorch and numpy see of it is the result
        tolerance=1e-2,
        exceptions=1 - peers.LEAST_AGREEMENT,
        size=at,
    )


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    size = tuple(args.size)
    for photograph in (0, 2) if args.root is not None else (0,):
        for c in (21, 2):
            yield problem_id(c, photograph), partial(problem, args, c, size, photograph)


def sweep(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    for value in SWEEPS[args.sweep]:
        pixels = args.sweep == "pixels"
        side, c, at = (value, 21, value * value) if pixels else (128, value, value)
        yield "dense_crf", partial(problem, args, c, (side, side), 0, at)


def main() -> None:
    options = parser(__doc__, "dense_crf", seconds=60, sweeps=SWEEPS)
    options.add_argument("--root", type=Path, help="folder in the layout of VOC 2012; without it, a drawing")
    options.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"))
    args = options.parse_args()
    run(args, sweep(args) if args.sweep else problems(args))


if __name__ == "__main__":
    main()
