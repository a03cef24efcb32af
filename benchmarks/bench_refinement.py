"""The two refinements of CAMs, random_walk and pixel_refine, against what people write.

    python benchmarks/bench_refinement.py     # prints the tables, writes runs/bench/refinement-<device>.json

random_walk: ``dense`` is IRN's transition matrix, squared; ``sparse`` its few non-zeros as a CSR matrix, multiplied
2^8 times; ``sliced`` our reference. On IRN's map of 94×125 cells the dense matrix takes minutes: there one squaring is
timed, and the whole is given as the matrix's making and 8 of them (--dense runs it instead). pixel_refine: ``par``
gathers all neighbours of all masks in every iteration, by a convolution a dilation; ``sliced`` is our reference and
``compiled`` that through torch.compile. Ours comes last, named after the backend that ran.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from harness import Problem, Result, arguments, ours, run
from torch import Tensor
from torch.nn import functional as F

from pssl_ext import pixel_refine, random_walk
from pssl_ext.registry import OPS

RADIUS, BETA, LOG2_STEPS = 5, 10.0, 8
DILATIONS, ITERATIONS = (1, 2, 4, 8, 12, 24), 10
COLOUR_SCALE, POSITION_WEIGHT = 0.3, 0.01


# -- random_walk: (cams [k,h,w], edge [h,w]) -> [k,h,w] ----------------------------------------------------------------


def pairs(edge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(source, destination, affinity) of all pairs of neighbours, one way: IRN's path index."""
    h, w = edge.shape
    cells = torch.arange(h * w, device=edge.device).view(h, w)
    found = []
    for dy in range(RADIUS):
        for dx in range(1 - RADIUS, RADIUS):
            if (dy == 0 and dx <= 0) or dy * dy + dx * dx >= RADIUS**2:
                continue
            left, right = max(0, -dx), w - max(0, dx)
            path = [
                edge[y : h - dy + y, left + x : right + x]
                for y in range(dy + 1)
                for x in range(min(dx, 0), max(dx, 0) + 1)
                if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
            ]
            affinity = (1 - torch.stack(path).amax(0)) ** BETA
            ends = cells[: h - dy, left:right], cells[dy:, left + dx : right + dx]
            found.append([t.flatten() for t in (*ends, affinity)])
    source, destination, affinity = (torch.cat(t) for t in zip(*found, strict=True))
    return source, destination, affinity


def transition(edge: Tensor) -> Tensor:  # [h·w,h·w]
    source, destination, affinity = pairs(edge)
    matrix = torch.eye(edge.numel(), device=edge.device)
    matrix[source, destination] = matrix[destination, source] = affinity
    return matrix.div_(matrix.sum(0))


def walk_dense(cams: Tensor, edge: Tensor) -> Tensor:
    matrix = transition(edge)
    for _ in range(LOG2_STEPS):
        matrix = matrix @ matrix
    return ((cams * (1 - edge)).flatten(1) @ matrix).view_as(cams)


def walk_sparse(cams: Tensor, edge: Tensor) -> Tensor:
    source, destination, affinity = pairs(edge)
    n = edge.numel()
    itself = torch.arange(n, device=edge.device)
    rows, columns = torch.cat([source, destination, itself]), torch.cat([destination, source, itself])
    values = torch.cat([affinity, affinity, torch.ones_like(itself, dtype=edge.dtype)])
    total = torch.zeros(n, device=edge.device).index_add_(0, rows, values)
    matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), values / total[rows], (n, n))
    matrix = matrix.coalesce().to_sparse_csr()
    walked = (cams * (1 - edge)).flatten(1).T.contiguous()  # [h·w,k]
    for _ in range(2**LOG2_STEPS):
        walked = matrix @ walked
    return walked.T.reshape(cams.shape)


def walk_sliced(cams: Tensor, edge: Tensor) -> Tensor:
    return random_walk(cams, edge, radius=RADIUS, beta=BETA, log2_steps=LOG2_STEPS, backend="reference")


def walk_ours(cams: Tensor, edge: Tensor) -> Tensor:
    return random_walk(cams, edge, radius=RADIUS, beta=BETA, log2_steps=LOG2_STEPS)


def walk_problem(h: int, w: int, k: int, device: str, dense: bool) -> Problem:
    g = torch.Generator().manual_seed(0)
    # a boundary map is mostly open: a few ridges between smooth areas
    edge = F.interpolate(torch.rand(1, 1, h // 4, w // 4, generator=g), size=(h, w), mode="bicubic")[0, 0]
    inputs = dict(
        cams=torch.rand(k, h, w, generator=g).to(device), edge=(edge.clamp(0, 1) ** 3).contiguous().to(device)
    )
    providers = {"dense": walk_dense} if dense else {}
    providers |= {"sparse": walk_sparse, "sliced": walk_sliced}
    what = f"{h}×{w} cells, k={k}, 2^{LOG2_STEPS} steps"
    # in float32 the roundings of 256 sparse steps, and those of a dense matrix squared 8 times, come to 2e-4
    return problem("random_walk", what, inputs, providers, walk_ours, tolerance=1e-3)


def dense_estimate(inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Seconds that the matrix's making, and one squaring of it, take."""
    start = time.perf_counter()
    matrix = transition(inputs["edge"])
    made = time.perf_counter()
    matrix = matrix @ matrix
    float(matrix[0, 0])  # waits for the GPU
    return made - start, time.perf_counter() - made


# -- pixel_refine: (images [B,3,H,W], masks [B,k,h,w]) -> [B,k,H,W] ----------------------------------------------------


def gathered(maps: Tensor) -> Tensor:  # [B,c,H,W] -> [B,c,N,H,W]
    b, c, h, w = maps.shape
    kernels = torch.eye(9, device=maps.device)[[0, 1, 2, 3, 5, 6, 7, 8]].view(8, 1, 3, 3)
    found = []
    for d in DILATIONS:
        padded = F.pad(maps, [d] * 4, mode="replicate").flatten(0, 1)[:, None]
        found.append(F.conv2d(padded, kernels, dilation=d).view(b, c, 8, h, w))
    return torch.cat(found, 2)


def refine_par(images: Tensor, masks: Tensor) -> Tensor:
    masks = F.interpolate(masks, size=images.shape[-2:], mode="bilinear", align_corners=True)
    colours = gathered(images)
    spread = torch.std(colours, dim=2, keepdim=True) + 1e-8
    colour = -(((colours - images[:, :, None]).abs() / spread / COLOUR_SCALE) ** 2)
    corners = torch.tensor([2.0, 1, 2, 1, 1, 2, 1, 2], device=images.device).sqrt()
    distance = torch.cat([corners * d for d in DILATIONS])[:, None, None]
    position = -((distance / (distance.std() + 1e-8) / COLOUR_SCALE) ** 2)
    affinity = colour.mean(1, keepdim=True).softmax(2) + POSITION_WEIGHT * position.softmax(0)
    for _ in range(ITERATIONS):
        masks = (gathered(masks) * affinity).sum(2)
    return masks


def refine_sliced(images: Tensor, masks: Tensor) -> Tensor:
    return OPS["pixel_refine"].reference(
        images, masks, list(DILATIONS), ITERATIONS, COLOUR_SCALE, POSITION_WEIGHT
    )


def refine_ours(images: Tensor, masks: Tensor) -> Tensor:
    return pixel_refine(
        images,
        masks,
        dilations=DILATIONS,
        iterations=ITERATIONS,
        colour_scale=COLOUR_SCALE,
        position_weight=POSITION_WEIGHT,
    )


def refine_problem(batch: int, k: int, size: int, device: str, compiled: bool) -> Problem:
    g = torch.Generator().manual_seed(0)
    # smooth colours with noise upon them, as photographs have
    smooth = F.interpolate(torch.rand(batch, 3, 9, 9, generator=g), size=(size, size), mode="bilinear")
    images = 255 * (smooth + 0.05 * torch.randn(batch, 3, size, size, generator=g)).clamp(0, 1)
    masks = torch.rand(batch, k, size // 8, size // 8, generator=g)
    inputs = dict(images=images.to(device), masks=masks.to(device))
    providers = {"par": refine_par, "sliced": refine_sliced}
    if compiled:
        providers["compiled"] = torch.compile(refine_sliced, dynamic=False)
    what = (
        f"B={batch}, k={k}, {size // 8}² → {size}², {8 * len(DILATIONS)} neighbours, {ITERATIONS} iterations"
    )
    return problem("pixel_refine", what, inputs, providers, refine_ours, tolerance=1e-4)


# -- both --------------------------------------------------------------------------------------------------------------


def problem(
    op: str,
    what: str,
    inputs: dict[str, Tensor],
    providers: dict[str, Callable],
    own: Callable,
    tolerance: float,
) -> Problem:
    device = next(iter(inputs.values())).device
    name = ours(op, device)
    moved = OPS[op].bytes_moved(**inputs)
    return Problem(f"{op}, {what}", inputs, (), {**providers, name: own}, name, moved, tolerance=tolerance)


def main() -> None:
    parser = arguments(__doc__, "refinement")
    parser.add_argument("--dense", action="store_true", help="run the dense walk on 94×125 cells as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse")  # torch's CSR matrices are in beta
    large = walk_problem(94, 125, 3, args.device, args.dense)
    chosen = [
        walk_problem(24, 32, 3, args.device, dense=True),
        large,
        refine_problem(1, 4, 224, args.device, not args.no_compile),
        refine_problem(1, 21, 448, args.device, compiled=False),
    ]

    def estimate(problem: Problem, found: list[Result]) -> None:
        if problem is not large or args.dense:
            return
        making, squaring = dense_estimate(problem.inputs)
        whole, own = making + LOG2_STEPS * squaring, found[-1].p50
        print(
            f"dense: {making:.1f} s for the matrix and {squaring:.1f} s for one squaring of it, so "
            f"{whole:.0f} s for {LOG2_STEPS}: {whole / own:.0f} × ours"
        )

    run(
        "refinement",
        chosen,
        device=args.device,
        seconds=args.seconds,
        out=args.out,
        only=args.only,
        after=estimate,
    )


if __name__ == "__main__":
    main()
