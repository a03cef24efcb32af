"""prototype_pool's own: bad calls, the size of training, planted faults, the literal loop."""

import numpy as np
import oracle
import pytest
import torch
from problems import label_areas
from small_inputs import CELLS, FEATURES, FLOATS, LABELS, META
from support import ORACLE_GRIDS, Fault, prototype_inputs
from torch.nn import functional as F

from pssl_ext import nn as pssl_nn
from pssl_ext import prototype_pool
from pssl_ext.ops.prototype_pool import reference

SOUND = dict(features=FEATURES, regions=LABELS, num_regions=3)

BAD_CALLS = [
    (dict(features=[1]), "features must be a tensor, got list"),
    (dict(features=LABELS), f"features must be {FLOATS}, got torch.int64"),
    (dict(features=FEATURES[0]), "features must be [B,D,h,w], got [4, 3, 3] torch.float32 on cpu"),
    (
        dict(features=torch.zeros(2, 4, 0, 3)),
        f"{CELLS}, got [2, 4, 0, 3] torch.float32 on cpu",
    ),
    (dict(regions=None), "regions must be a tensor, got NoneType"),
    (dict(regions=LABELS.bool()), "regions must be of an integer type, got torch.bool"),
    (dict(regions=LABELS[:1]), "regions must be [B,H,W]=[2,*,*], got [1, 6, 6] torch.int64 on cpu"),
    (
        dict(regions=torch.zeros(2, 5, 6, 6)),
        "regions must be [B,C,H,W]=[2,3,*,*] (soft masks), got [2, 5, 6, 6] torch.float32 on cpu",
    ),
    (
        dict(regions=LABELS.to(META)),
        "regions must be on cpu as the first argument, got [2, 6, 6] torch.int64 on meta",
    ),
    (dict(num_regions=0), "num_regions must be at least 1, got 0"),
    (dict(weights=LABELS), f"weights must be {FLOATS}, got torch.int64"),
    (
        dict(weights=torch.zeros(2, 3, 6)),
        "weights must be [B,H,W]=[2, 6, 6], got [2, 3, 6] torch.float32 on cpu",
    ),
    (
        dict(weights=torch.zeros(2, 6, 6, device=META)),
        "weights must be on cpu as the first argument, got [2, 6, 6] torch.float32 on meta",
    ),
    (dict(regions=LABELS + 3), "regions must hold labels 0..2 or ignore_index=255, got [3]"),
    (dict(regions=LABELS - 1), "regions must hold labels 0..2 or ignore_index=255, got [-1]"),
]

MODULE = pssl_nn.PrototypePool


def training_size(g):
    features = torch.randn(2, 256, 56, 56, generator=g)
    weights = torch.rand(2, 448, 448, generator=g)
    return dict(features=features, regions=label_areas(g, 2, 21, 448, 448), num_regions=21, weights=weights)


def wrong_resize(*args):
    """Half-pixel centres forgotten: the bilinear weights are off by part of a cell."""
    return reference(*args[:6], not args[6], args[7])


def no_ignore_mask(features, regions, *rest):
    """Ignored pixels counted for region 0."""
    if regions.ndim == 3:
        regions = torch.where(regions == 255, 0, regions)
    return reference(features, regions, *rest)


def half_mass(*args):
    sums, mass = reference(*args)
    return sums, mass * 0.5


def half_precision_sum(features, *rest):
    sums, mass = reference(features, *rest)
    return sums.bfloat16().to(sums.dtype), mass


FAULTS = [
    Fault(kernel, ("label_grid_8x", "label_grid_odd"), "output")
    for kernel in (wrong_resize, no_ignore_mask, half_mass, half_precision_sum)
]
GRADIENT_SAMPLE = "label_grid_8x"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grid, size", ORACLE_GRIDS)
def test_pool(grid, size, align_corners, normalize):
    features, regions, weights = prototype_inputs(grid, size)
    for given in (None, weights):
        options = dict(normalize=normalize, align_corners=align_corners)
        got = prototype_pool(features, regions, 3, weights=given, **options, backend="reference")
        literal = oracle.pool(
            features.numpy(), regions.numpy(), 3, None if given is None else given.numpy(), **options
        )
        for a, e in zip(got, literal, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def test_pool_with_soft_masks():
    features, _, weights = prototype_inputs((2, 3), (5, 7))
    masks = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = prototype_pool(features, masks, 3, weights=weights, backend="reference")
    literal = oracle.pool(features.numpy(), masks.numpy(), 3, weights.numpy())
    for a, e in zip(got, literal, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def test_pool_is_the_one_hot_product():
    """As most code bases write it: upsample, F.normalize, one_hot, matmul."""
    features, regions, _ = prototype_inputs((4, 6), (16, 24))
    up = F.normalize(F.interpolate(features, size=(16, 24), mode="bilinear", align_corners=False), dim=1)
    one_hot = F.one_hot(torch.where(regions == 255, 3, regions), 4)[..., :3].double()
    sums, mass = prototype_pool(features, regions, 3)
    torch.testing.assert_close(sums, one_hot.flatten(1, 2).mT @ up.flatten(2).mT)
    torch.testing.assert_close(mass, one_hot.sum((1, 2)))
