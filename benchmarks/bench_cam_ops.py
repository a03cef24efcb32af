"""The three CAM operators against what people write: MAM's loss, the region mask, the threshold sweep.

    python benchmarks/bench_cam_ops.py        # prints the tables, writes runs/bench/cam-ops-<device>.json

Providers. ``peers`` resizes all maps of all classes and multiplies absent ones by 0; ``compiled`` is that through
torch.compile; ``eager`` is the best without a kernel of its own (present classes alone, gathered first). The sweep's
are numpy, as evaluation scripts are: ``peers`` an argmax and a confusion matrix for each threshold, ``one_pass`` one
histogram for all of them. Ours comes last, named after the backend that ran.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from harness import Problem, arguments, ours, run
from torch import Tensor
from torch.nn import functional as F

from pssl_ext import cam_compare, cam_regions, cam_sweep
from pssl_ext.registry import OPS

IGNORE = 255
SCALES = (0.5, 1.0, 1.5, 2.0)
FOREGROUND = 0.3
C = 21  # PASCAL VOC's classes and background
VOC = (375, 500)
THRESHOLDS = [i / 100 for i in range(60)]


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:  # [*,*,h,w] -> [*,*,H,W]
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear")


def split(maps: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(main, support) of the inputs main_0 … support_0 …"""
    sides = ([t for n, t in maps.items() if n.startswith(side)] for side in ("main", "support"))
    main, support = sides
    return main, support


# -- cam_compare: (labels [B,K], main_i, support_i [B,K,h,w]) -> [] ----------------------------------------------------


def attended_l1(main: list[Tensor], support: list[Tensor]) -> list[Tensor]:
    """|M_s − mean_t w_st S_t| for resized maps [*,*,H,W]."""
    found = []
    for m in main:
        target = torch.zeros_like(m)
        for s in support:
            with torch.no_grad():
                attention = 2 - F.cosine_similarity(m.flatten(2), s.flatten(2), dim=2)
            target = target + attention[:, :, None, None] * s / len(support)
        found.append((m - target).abs())
    return found


def compare_peers(size: tuple[int, int]) -> Callable[..., Tensor]:
    def loss(labels: Tensor, **maps: Tensor) -> Tensor:
        masked = ([upsample(c, size).relu() * labels[:, :, None, None] for c in cams] for cams in split(maps))
        return sum(d.mean() for d in attended_l1(*masked))

    return loss


def compare_present(size: tuple[int, int]) -> Callable[..., Tensor]:
    def loss(labels: Tensor, **maps: Tensor) -> Tensor:
        where = labels.nonzero(as_tuple=True)
        present = ([upsample(c[where][None], size).relu() for c in cams] for cams in split(maps))
        return sum(d.sum() for d in attended_l1(*present)) / (labels.numel() * size[0] * size[1])

    return loss


def compare_ours(size: tuple[int, int]) -> Callable[..., Tensor]:
    return lambda labels, **maps: cam_compare(*split(maps), labels, size=size)


# -- cam_regions: (labels [B,K], cam_i [B,K,h,w]) -> uint8 [B,H,W] -----------------------------------------------------


def regions_peers(size: tuple[int, int]) -> Callable[..., Tensor]:
    def mask(labels: Tensor, **cams: Tensor) -> Tensor:
        total = sum(upsample(c, size).relu() for c in cams.values()) * labels[:, :, None, None]
        total = total / (total.amax((2, 3), keepdim=True) + 1e-5)
        best, index = total.max(1)
        return torch.where(best >= FOREGROUND, index + 1, 0).to(torch.uint8)

    return mask


def regions_ours(size: tuple[int, int]) -> Callable[..., Tensor]:
    return lambda labels, **cams: cam_regions(list(cams.values()), labels, size=size, foreground=FOREGROUND)


# -- cam_sweep: (cam [k,h,w], ids [k], truth [H,W]) -> int64 [T,C,C] ---------------------------------------------------


def resized(cam: Tensor, truth: Tensor) -> np.ndarray:
    return upsample(cam[None], tuple(truth.shape))[0].numpy()


def sweep_peers(cam: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
    scores = np.zeros((C, *truth.shape), np.float32)
    scores[ids.numpy()] = resized(cam, truth)
    labels, counts = truth.numpy(), []
    for threshold in THRESHOLDS:
        scores[0] = threshold
        prediction = scores.argmax(0)
        counted = labels < IGNORE
        cells = C * labels[counted].astype(np.int64) + prediction[counted]
        counts.append(np.bincount(cells, minlength=C * C).reshape(C, C))
    return torch.from_numpy(np.stack(counts))


def sweep_one_pass(cam: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
    maps, labels, bins = resized(cam, truth), truth.numpy(), len(THRESHOLDS) + 1
    best, region = maps.max(0), ids.numpy()[maps.argmax(0)]
    below = np.searchsorted(np.asarray(THRESHOLDS, np.float32), best)
    counted = labels < IGNORE
    cells = (labels[counted].astype(np.int64) * C + region[counted]) * bins + below[counted]
    histogram = np.bincount(cells, minlength=C * C * bins).reshape(C, C, bins)
    up_to = histogram.cumsum(2)[..., :-1]
    counts = histogram.sum(2, keepdims=True) - up_to
    counts[:, 0] += up_to.sum(1)
    return torch.from_numpy(np.moveaxis(counts, 2, 0).copy())


def sweep_ours(cam: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
    return cam_sweep(cam, ids, truth, THRESHOLDS, C)


# -- problems ----------------------------------------------------------------------------------------------------------


def blobs(g: torch.Generator, *shape: int) -> Tensor:
    """Smooth maps, as CAMs are."""
    coarse = torch.randn(*shape[:-2], 6, 8, generator=g)
    return upsample(coarse, shape[-2:])


def image_labels(g: torch.Generator, batch: int, classes: int) -> Tensor:
    """One class or two an image, by turns."""
    labels = torch.zeros(batch, classes)
    for b in range(batch):
        labels[b, torch.randperm(classes, generator=g)[: 1 + b % 2]] = 1
    return labels


def grids(base: int) -> list[tuple[int, int]]:
    return [(round(base * s), round(base * s)) for s in SCALES]


def compare_problem(base: int, batch: int, classes: int, device: str, compiled: bool) -> Problem:
    g = torch.Generator().manual_seed(0)
    size = (base, base)
    maps = {
        f"{side}_{i}": blobs(g, batch, classes, *grid)
        for side in ("main", "support")
        for i, grid in enumerate(grids(base))
    }
    inputs = dict(labels=image_labels(g, batch, classes), **maps)
    providers = {"peers": compare_peers(size)}
    if compiled:
        providers["compiled"] = torch.compile(compare_peers(size), dynamic=False)
    providers |= {"eager": compare_present(size), ours("cam_compare", device): compare_ours(size)}
    main, support = split(maps)
    bytes_moved = OPS["cam_compare"].bytes_moved(main=main, support=support, image_labels=inputs["labels"])
    title = f"cam_compare, {base}² × {SCALES}, B={batch}, K={classes}"
    inputs = {n: t.to(device) for n, t in inputs.items()}
    return Problem(title, inputs, tuple(maps), providers, ours("cam_compare", device), bytes_moved)


def regions_problem(base: int, size: int, batch: int, classes: int, device: str, compiled: bool) -> Problem:
    g = torch.Generator().manual_seed(0)
    cams = {f"cam_{i}": blobs(g, batch, classes, *grid).to(device) for i, grid in enumerate(grids(base))}
    labels = image_labels(g, batch, classes).to(device)
    providers = {"peers": regions_peers((size, size))}
    if compiled:
        providers["compiled"] = torch.compile(regions_peers((size, size)), dynamic=False)
    name = ours("cam_regions", device)
    providers[name] = regions_ours((size, size))
    bytes_moved = OPS["cam_regions"].bytes_moved(list(cams.values()), labels, (size, size))
    title = f"cam_regions, {base}² × {SCALES} → {size}², B={batch}, K={classes}"
    # F.interpolate's last bits may put a pixel on the other side of the threshold
    inputs = dict(labels=labels, **cams)
    return Problem(title, inputs, (), providers, name, bytes_moved, exceptions=1e-4)


def sweep_problem(k: int, grid: tuple[int, int], device: str) -> Problem:
    g = torch.Generator().manual_seed(0)
    truth = blobs(g, 1, C, *VOC)[0].argmax(0).to(torch.uint8)
    truth[torch.rand(VOC, generator=g) < 0.05] = IGNORE
    cam, ids = blobs(g, 1, k, *grid)[0].sigmoid(), torch.randperm(C - 1, generator=g)[:k].sort().values + 1
    name = ours("cam_sweep", device)
    inputs = dict(cam=cam.to(device), ids=ids.to(device), truth=truth.to(device))
    return Problem(
        f"cam_sweep, {k} CAMs {grid[0]}×{grid[1]}, image {VOC[0]}×{VOC[1]}, T={len(THRESHOLDS)}, C={C}",
        inputs,
        (),
        {"peers": sweep_peers, "one_pass": sweep_one_pass, name: sweep_ours},
        name,
        OPS["cam_sweep"].bytes_moved(cam, ids, truth),
        in_numpy=("peers", "one_pass"),
        # resized, the last bits differ as there
        tolerance=0.0 if grid == VOC else 1e-3,
    )


def main() -> None:
    parser = arguments(__doc__, "cam-ops")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    compiled = not args.no_compile
    problems = [
        compare_problem(56, args.batch, C - 1, args.device, compiled),
        regions_problem(56, 448, args.batch, C - 1, args.device, compiled),
        *(sweep_problem(k, grid, "cpu") for k, grid in ((C - 1, VOC), (2, VOC), (2, (47, 63)))),
    ]
    run("cam-ops", problems, device=args.device, seconds=args.seconds, out=args.out, only=args.only)


if __name__ == "__main__":
    main()
