"""The Regional Contrastive Module's step (region mask → pooling → contrast) and its operators, against other code.

    python benchmarks/bench_rcm.py                    # tables, goals, runs/bench/rcm.json, .csv, .png
    python benchmarks/bench_rcm.py --sweep channels   # cost against pixels, channels or classes

Providers: `peers` is the usual code, features upsampled, unit features and logits materialised; `eager` the best
without a kernel of one's own (the norm applied to masks and logits); `+compile` each through torch.compile; `ppc`,
`class_loop` and `sipe` what those methods' code does; ours is named after its backend. See benchmarks/peers/rcm.py.
Problems: labels on the feature grid (`same-grid`), and 8 times as fine (`8x`). All of one problem agree before any is
timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness.problem import Lineup, Problem, missing
from harness.runner import Deferred, parser, run
from peers import cams as cam_peers
from peers import rcm as peers
from scenes import cam_pyramid, generator, image_labels, on, region_mask
from torch import Tensor

from pssl_ext import cam_regions, prototype_contrast, prototype_pool
from pssl_ext.op import OPS

C, D = 21, 256  # PASCAL VOC's classes and background; the method's channels
SWEEPS = {  # grid side; same grid, since other code cannot go far beyond it
    "pixels": (32, 64, 128, 256),
    "channels": (64, 256, 1024),
    "classes": (2, 21, 81, 201),
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def pool_with(backend: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda features, regions, c: prototype_pool(features, regions, c, backend=backend)[0]


def contrast_with(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return partial(prototype_contrast, temperature=peers.TEMPERATURE, backend=backend)


def mask_with(backend: str, size: int) -> Callable[..., Tensor]:
    def mask(image_labels: Tensor, **cams: Tensor) -> Tensor:
        maps = list(cams.values())
        settings = dict(size=(size, size), foreground=cam_peers.FOREGROUND, backend=backend)
        return cam_regions(maps, image_labels, **settings)

    return mask


class Size:
    """A problem's sizes and their name: a grid of side h, labels of side H, B images, D channels, C regions."""

    def __init__(
        self, name: str, grid: int, size: int, args: argparse.Namespace, *, d: int = D, c: int = C
    ) -> None:
        self.grid, self.size, self.batch, self.d, self.c = grid, size, args.batch, d, c
        self.device, self.compiled, self.dtype = args.device, not args.no_compile, args.dtype
        self.type_name = str(self.dtype).removeprefix("torch.")
        self.name = name + ("" if self.dtype == torch.float32 else f"/{self.type_name}")
        self.label = f"{grid}² → {size}², B={self.batch}, D={d}, C={c}, {self.type_name}"
        self.same = grid == size

    def features(self, g: torch.Generator) -> Tensor:
        return torch.randn(self.batch, self.d, self.grid, self.grid, generator=g).to(self.dtype)

    def problem(
        self, op: str, inputs: dict, wanted: tuple, lineup: Lineup, ours: str, moved, **more
    ) -> Problem:
        return Problem(
            f"{op}/{self.name}",
            f"{op}, {self.label}",
            inputs,
            wanted,
            lineup.providers,
            ours,
            moved,
            lineup.left_out,
            **{"tolerance": TOLERANCE[self.dtype], **more},
        )


def pool_problem(size: Size, at: int | None = None) -> Problem:
    g, lineup = generator(), Lineup(size.compiled)
    features, regions = size.features(g), region_mask(g, size.batch, size.c, size.size)
    seeds = torch.randn(size.batch, size.c, size.d, generator=g)
    too_much = None if size.same else "upsampled features once a class: half a minute a call"
    if at is None:
        lineup.add("class_loop", peers.pooled(peers.pool_class_loop, size.c), too_much)
        lineup.add("sipe", peers.pooled(peers.pool_broadcast, size.c), too_much)
    lineup.add("peers", peers.pooled(peers.pool_one_hot, size.c), compiled=True)
    lineup.add("eager", peers.pooled(peers.pool_norm_in_mask, size.c), compiled=True)
    ours = lineup.own("prototype_pool", size.device, lambda b: peers.pooled(pool_with(b), size.c))
    moved = OPS["prototype_pool"].bytes_moved(features=features, regions=regions, num_regions=size.c)
    inputs = on(size.device, features=features, regions=regions, seeds=seeds)
    return size.problem("prototype_pool", inputs, ("features",), lineup, ours, moved, size=at)


def contrast_problem(size: Size, at: int | None = None) -> Problem:
    g, lineup = generator(), Lineup(size.compiled)
    features, regions = size.features(g), region_mask(g, size.batch, size.c, size.size)
    prototypes = torch.randn(size.c, size.d, generator=g).to(size.dtype)
    on_gpu = None if torch.device(size.device).type == "cuda" else "its kernels are for GPUs"
    lineup.add("peers", peers.contrast_materialised, compiled=True)
    if at is None:
        rough = "its gather adds up the prototypes' gradients in half precision: 10 % off"
        lineup.add("ppc", peers.contrast_ppc, None if size.dtype == torch.float32 else rough)
        old = None if hasattr(torch.nn.functional, "linear_cross_entropy") else "torch 2.13 and later have it"
        lineup.add("linear_cross_entropy", peers.contrast_linear_cross_entropy, old)
        lineup.add("liger", peers.contrast_liger, missing("liger_kernel", "liger-kernel") or on_gpu)
        cut = missing("cut_cross_entropy", "cut-cross-entropy") or on_gpu
        lineup.add("cut_cross_entropy", peers.contrast_cut_cross_entropy, cut)
    lineup.add("eager", peers.contrast_norm_on_logits, compiled=True)
    ours = lineup.own("prototype_contrast", size.device, contrast_with)
    moved = OPS["prototype_contrast"].bytes_moved(features=features, prototypes=prototypes, regions=regions)
    inputs = on(size.device, features=features, prototypes=prototypes, regions=regions)
    wanted = ("features", "prototypes")
    return size.problem("prototype_contrast", inputs, wanted, lineup, ours, moved, size=at)


def mask_problem(size: Size, at: int | None = None) -> Problem:
    """From CAMs on the feature grid and its multiples, as SupportNet's are."""
    g, lineup, k = generator(), Lineup(size.compiled), size.c - 1
    labels, cams = image_labels(g, size.batch, k), cam_pyramid(g, "cam", size.batch, k, size.grid)
    shape = (size.size, size.size)
    lineup.add("peers", cam_peers.regions_all(shape), compiled=True)
    lineup.add("eager", cam_peers.regions_present(shape))
    ours = lineup.own("cam_regions", size.device, lambda b: mask_with(b, size.size))
    moved = OPS["cam_regions"].bytes_moved(list(cams.values()), labels, shape)
    # F.interpolate's last bits may put a pixel on the other side of the threshold
    return size.problem(
        "cam_regions",
        on(size.device, image_labels=labels, **cams),
        (),
        lineup,
        ours,
        moved,
        exceptions=1e-4,
        size=at,
    )


def step_problem(size: Size, at: int | None = None) -> Problem:
    """The whole step, with a gradient to MainNet's features."""
    g, lineup, k = generator(), Lineup(size.compiled), size.c - 1
    shape = (size.size, size.size)
    labels, cams = image_labels(g, size.batch, k), cam_pyramid(g, "cam", size.batch, k, size.grid)
    features, support = size.features(g), size.features(g).relu()
    memory = torch.randn(size.c, size.d, generator=g)
    plain = cam_peers.regions_all(shape), peers.pool_one_hot, peers.contrast_materialised
    best = cam_peers.regions_present(shape), peers.pool_norm_in_mask, peers.contrast_norm_on_logits
    lineup.add("peers", peers.step(*plain), compiled=True)
    lineup.add("eager", peers.step(*best))
    if lineup.compiled:
        together = torch.compile(peers.step(plain[0], *best[1:]), dynamic=False, fullgraph=True)
        lineup.add("eager+compile", together)
    ours = lineup.own(
        "prototype_contrast",
        size.device,
        lambda b: peers.step(mask_with("auto", size.size), pool_with(b), contrast_with(b)),
    )
    mask = torch.empty(size.batch, *shape, dtype=torch.uint8)
    pool = OPS["prototype_pool"].bytes_moved(features=support, regions=mask, num_regions=size.c)
    contrast = OPS["prototype_contrast"].bytes_moved(features=features, prototypes=memory, regions=mask)
    cam_bytes = OPS["cam_regions"].bytes_moved(list(cams.values()), labels, shape)[0]
    moved = (cam_bytes + pool[0] + contrast[0], contrast[1])
    inputs = on(size.device, features=features, support=support, memory=memory, image_labels=labels, **cams)
    return size.problem("rcm_step", inputs, ("features",), lineup, ours, moved, exceptions=1e-3, size=at)


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    # The last ones' peers take seconds a call, whatever time is left; before the others they would leave them none.
    grid, fine = Size("same-grid", 128, 128, args), Size("8x", 56, 448, args)
    yield f"prototype_pool/{grid.name}", partial(pool_problem, grid)
    yield f"prototype_contrast/{grid.name}", partial(contrast_problem, grid)
    yield f"cam_regions/{fine.name}", partial(mask_problem, fine)
    yield f"rcm_step/{fine.name}", partial(step_problem, fine)
    yield f"prototype_pool/{fine.name}", partial(pool_problem, fine)
    yield f"prototype_contrast/{fine.name}", partial(contrast_problem, fine)


def sweep(args: argparse.Namespace) -> Iterator[tuple[str, Deferred]]:
    for value in SWEEPS[args.sweep]:
        side = value if args.sweep == "pixels" else 64
        more = {"channels": dict(d=value), "classes": dict(c=value)}.get(args.sweep, {})
        size = Size("same-grid", side, side, args, **more)
        at = value * value if args.sweep == "pixels" else value
        yield f"rcm_step/{size.name}", partial(step_problem, size, at)
        yield f"prototype_pool/{size.name}", partial(pool_problem, size, at)
        yield f"prototype_contrast/{size.name}", partial(contrast_problem, size, at)


def main() -> None:
    options = parser(__doc__, "rcm", seconds=160, sweeps=SWEEPS, compiles=True)
    options.add_argument("--batch", type=int, help="images (default: 2 on a CPU, 8 on a GPU)")
    types = {str(t).removeprefix("torch."): t for t in TOLERANCE}
    options.add_argument(
        "--dtype", choices=tuple(types), default="float32", help="of features and prototypes"
    )
    args = options.parse_args()
    args.batch = args.batch or (8 if torch.device(args.device).type == "cuda" else 2)
    if args.dtype != "float32":
        args.group += f"-{args.dtype}"  # beside the other's results, not in their place
    args.dtype = types[args.dtype]
    run(args, sweep(args) if args.sweep else problems(args))


if __name__ == "__main__":
    main()
