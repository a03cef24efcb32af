"""Each operator at the size that training has, on any device: many blocks, many tiles, some labels ignored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


def real_size(op: str, device: str = "cuda") -> dict[str, Any]:
    """The public function's arguments by name; the same values on every device."""
    return tree_map_only(Tensor, lambda t: t.to(device), _MAKERS[op](torch.Generator().manual_seed(41)))


def _areas(g: torch.Generator, channels: int, height: int, width: int) -> Tensor:
    """[channels,H,W] in 0..1, smooth."""
    rough = torch.rand(1, channels, height // 24, width // 24, generator=g)
    return F.interpolate(rough, size=(height, width), mode="bilinear")[0]


def _labels(g: torch.Generator, count: int, regions: int, height: int, width: int) -> Tensor:
    """uint8 [count,H,W]: areas of one label, a tenth of the pixels ignored."""
    labels = torch.stack([_areas(g, regions, height, width).argmax(0) for _ in range(count)])
    return labels.where(torch.rand(labels.shape, generator=g) > 0.1, 255).to(torch.uint8)


def _pool(g):
    features = torch.randn(2, 256, 56, 56, generator=g)
    weights = torch.rand(2, 448, 448, generator=g)
    return dict(features=features, regions=_labels(g, 2, 21, 448, 448), num_regions=21, weights=weights)


def _contrast(g):
    args = _pool(g)
    del args["num_regions"]
    return args | dict(prototypes=torch.randn(21, 256, generator=g))


def _present(g):
    return (torch.rand(4, 20, generator=g) < 0.15).float()


def _compare(g):
    main = [torch.randn(4, 20, n, n, generator=g) for n in (28, 56, 112)]
    support = [torch.randn(4, 20, n, n, generator=g) for n in (28, 56, 84, 112)]
    return dict(main=main, support=support, image_labels=_present(g), size=(56, 56))


def _regions(g):
    cams = [torch.randn(4, 20, n, n, generator=g) for n in (28, 56, 84, 112)]
    return dict(cams=cams, image_labels=_present(g), size=(448, 448))


def _sweep(g):
    return dict(
        cams=[torch.rand(1 + i, 56, 56, generator=g) for i in range(4)],
        class_ids=[torch.randperm(20, generator=g)[: 1 + i] + 1 for i in range(4)],
        ground_truth=list(_labels(g, 4, 21, 375, 500)),
        thresholds=torch.linspace(0, 1, 60),
        num_regions=21,
    )


def _walk(g):
    return dict(cams=torch.rand(3, 94, 125, generator=g), edge=torch.rand(94, 125, generator=g) ** 4)


def _refine(g):
    images = torch.stack([_areas(g, 3, 448, 448) for _ in range(2)])
    return dict(images=images, masks=torch.rand(2, 5, 112, 112, generator=g))


def _crf(g):
    """Kernels that leave the result between the classes, where a pixel does not fall to either for next to nothing."""
    image = 255 * _areas(g, 3, 375, 500) + 8 * torch.randn(3, 375, 500, generator=g)
    scores = 6 * _areas(g, 21, 375, 500) + torch.randn(21, 375, 500, generator=g)
    weak = dict(gaussian=(3.0, 0.6), bilateral=(25.0, 20.0, 1.2), iterations=5)
    return dict(
        images=image.clamp(0, 255).to(torch.uint8)[None], probabilities=scores.softmax(0)[None], **weak
    )


_MAKERS = {
    "prototype_pool": _pool,
    "prototype_contrast": _contrast,
    "cam_compare": _compare,
    "cam_regions": _regions,
    "cam_sweep": _sweep,
    "random_walk": _walk,
    "pixel_refine": _refine,
    "dense_crf": _crf,
}
