"""The Regional Contrastive Module's step and its two operators, against what people write.

    python benchmarks/bench_rcm.py            # prints the tables, writes runs/bench/rcm-<device>.json

Providers: ``peers`` upsamples the features, pools by a one-hot product, materialises unit features and logits;
``class_loop`` pools by a loop over the classes (same grid alone: at 8× it takes half a minute); ``eager`` is the best
without a kernel of its own (the norm applied to masks and logits); ``compiled`` is that through torch.compile (at 8×
its backward takes 20 s: each operator alone, not the step); ours comes last, named after the backend that ran.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Problem, arguments, ours, run
from torch import Tensor
from torch.nn import functional as F

import pssl_ext
from pssl_ext import prototype_contrast, prototype_pool
from pssl_ext.registry import OPS

TEMPERATURE = 0.5
IGNORE = 255
C = 21


def upsample(features: Tensor, size: tuple[int, ...]) -> Tensor:  # [B,D,h,w] -> [B,D,H,W]
    same = features.shape[-2:] == size
    return features if same else F.interpolate(features, size=size, mode="bilinear", align_corners=False)


# -- pooling: (features [B,D,h,w], regions [B,H,W]) -> sums [B,C,D] ----------------------------------------------------


def pool_class_loop(features: Tensor, regions: Tensor) -> Tensor:
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    return torch.stack([(unit * (regions == c)[:, None]).sum((2, 3)) for c in range(C)], 1)


def pool_one_hot(features: Tensor, regions: Tensor) -> Tensor:
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    masks = F.one_hot(torch.where(regions == IGNORE, C, regions), C + 1)[..., :C].to(unit.dtype)  # [B,H,W,C]
    return masks.flatten(1, 2).mT @ unit.flatten(2).mT


def pool_norm_in_mask(features: Tensor, regions: Tensor) -> Tensor:
    """The norm divides the masks [B,C,H,W], not the features."""
    up = upsample(features, regions.shape[-2:])
    norm = torch.linalg.vector_norm(up, dim=1).clamp_min(1e-12)  # [B,H,W]
    classes = torch.arange(C, device=up.device)[:, None, None]
    masks = (regions[:, None] == classes) / norm[:, None]
    return masks.flatten(2) @ up.flatten(2).mT


def pool_ours(features: Tensor, regions: Tensor) -> Tensor:
    return prototype_pool(features, regions, C)[0]


# -- contrast: (features, prototypes [C,D], regions) -> [] -------------------------------------------------------------


def contrast_materialised(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    unit = F.normalize(upsample(features, regions.shape[-2:]), dim=1)
    logits = torch.einsum("bdhw,cd->bchw", unit, F.normalize(prototypes, dim=1)) / TEMPERATURE
    return F.cross_entropy(logits, regions, ignore_index=IGNORE)


def contrast_norm_on_logits(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    """The dots are upsampled with the features they are linear in: D meets H×W in the norm alone."""
    dots = torch.einsum("bdhw,cd->bchw", features, F.normalize(prototypes, dim=1))
    norm = torch.linalg.vector_norm(upsample(features, regions.shape[-2:]), dim=1, keepdim=True)
    logits = upsample(dots, regions.shape[-2:]) / (norm.clamp_min(1e-12) * TEMPERATURE)
    return F.cross_entropy(logits, regions, ignore_index=IGNORE)


def contrast_ours(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    return prototype_contrast(features, prototypes, regions, temperature=TEMPERATURE)


# -- the step ----------------------------------------------------------------------------------------------------------


def scalar(pool: Callable) -> Callable[..., Tensor]:
    """A loss that reaches every sum with a weight of its own."""

    def loss(features: Tensor, regions: Tensor, seeds: Tensor) -> Tensor:
        return (pool(features, regions) * seeds).sum()

    return loss


def step(pool: Callable, contrast: Callable) -> Callable[..., Tensor]:
    """RCM in one batch: prototypes from SupportNet's features (no gradient), MainNet's pixels against them."""

    def loss(features: Tensor, support: Tensor, regions: Tensor) -> Tensor:
        with torch.no_grad():
            prototypes = F.normalize(pool(support, regions).sum(0), dim=1)  # [C,D]
        return contrast(features, prototypes, regions)

    return loss


def problems(
    grid: int, size: int, device: str, compiled: bool, batch: int = 2, d: int = 256
) -> list[Problem]:
    g = torch.Generator().manual_seed(0)
    features, support = (torch.randn(batch, d, grid, grid, generator=g).to(device) for _ in range(2))
    # blobs rather than noise: a region mask is made of areas
    scores = torch.randn(batch, C, 7, 7, generator=g)
    regions = F.interpolate(scores, size=(size, size), mode="bilinear").argmax(1)
    regions[torch.rand(regions.shape, generator=g) < 0.1] = IGNORE
    regions = regions.to(device)
    prototypes = torch.randn(C, d, generator=g).to(device)
    seeds = torch.randn(batch, C, d, generator=g).to(device)
    sides = {
        "class_loop": (pool_class_loop, contrast_materialised),
        "peers": (pool_one_hot, contrast_materialised),
        "eager": (pool_norm_in_mask, contrast_norm_on_logits),
    }
    name = ours("prototype_contrast", device)

    def providers(
        make: Callable, chosen: tuple[str, ...], own: Callable, compiled: bool = compiled
    ) -> dict[str, Callable]:
        found = {side: make(*sides[side]) for side in chosen}
        if compiled:
            found["compiled"] = torch.compile(make(*sides["eager"]), dynamic=False)
        return {**found, name: own}

    label = f"{grid}² → {size}², B={batch}, D={d}, C={C}"
    pool_bytes = OPS["prototype_pool"].bytes_moved(features=features, regions=regions, num_regions=C)
    contrast_bytes = OPS["prototype_contrast"].bytes_moved(
        features=features, prototypes=prototypes, regions=regions
    )
    pooling = tuple(sides) if grid == size else ("peers", "eager")
    return [
        Problem(
            f"prototype_pool, {label}",
            dict(features=features, regions=regions, seeds=seeds),
            ("features",),
            providers(lambda pool, _: scalar(pool), pooling, scalar(pool_ours)),
            name,
            pool_bytes,
        ),
        Problem(
            f"prototype_contrast, {label}",
            dict(features=features, prototypes=prototypes, regions=regions),
            ("features", "prototypes"),
            providers(lambda _, contrast: contrast, ("peers", "eager"), contrast_ours),
            name,
            contrast_bytes,
        ),
        Problem(
            f"RCM step (pool, then contrast), {label}",
            dict(features=features, support=support, regions=regions),
            ("features",),
            providers(step, ("peers", "eager"), step(pool_ours, contrast_ours), compiled and grid == size),
            name,
            (pool_bytes[0] + contrast_bytes[0], contrast_bytes[1]),
        ),
    ]


def main() -> None:
    parser = arguments(__doc__, "rcm")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    print(pssl_ext.explain("prototype_contrast", args.device))
    made = (
        problem
        for grid, size in ((128, 128), (56, 448))
        for problem in problems(grid, size, args.device, not args.no_compile, args.batch)
    )
    run("rcm", made, device=args.device, seconds=args.seconds, out=args.out, only=args.only)


if __name__ == "__main__":
    main()
