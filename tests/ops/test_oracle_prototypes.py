"""The references of prototype_pool and prototype_contrast against literal loops, and against peers'
formulas."""

import numpy as np
import oracle
import pytest
import torch
from torch.nn import functional as F

from pssl_ext import prototype_contrast, prototype_pool

GRIDS = [
    ((3, 4), (3, 4)),
    ((2, 3), (8, 12)),
    ((3, 2), (7, 5)),
    ((5, 4), (2, 3)),
    ((1, 1), (3, 2)),
    ((2, 5), (1, 1)),
]


def inputs(grid, size, b=2, d=4, c=3):
    g = torch.Generator().manual_seed(29)
    features = torch.randn(b, d, *grid, generator=g, dtype=torch.float64)
    regions = torch.randint(0, c, (b, *size), generator=g)
    regions[torch.rand(b, *size, generator=g) < 0.2] = 255
    return features, regions, torch.rand(b, *size, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grid, size", GRIDS)
def test_pool(grid, size, align_corners, normalize):
    features, regions, weights = inputs(grid, size)
    for given in (None, weights):
        options = dict(normalize=normalize, align_corners=align_corners)
        got = prototype_pool(features, regions, 3, weights=given, **options, backend="reference")
        literal = oracle.pool(
            features.numpy(), regions.numpy(), 3, None if given is None else given.numpy(), **options
        )
        for a, e in zip(got, literal, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def test_pool_with_soft_masks():
    features, _, weights = inputs((2, 3), (5, 7))
    masks = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = prototype_pool(features, masks, 3, weights=weights, backend="reference")
    literal = oracle.pool(features.numpy(), masks.numpy(), 3, weights.numpy())
    for a, e in zip(got, literal, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def test_pool_is_the_one_hot_product():
    """As most code bases write it: upsample, F.normalize, one_hot, matmul."""
    features, regions, _ = inputs((4, 6), (16, 24))
    up = F.normalize(F.interpolate(features, size=(16, 24), mode="bilinear", align_corners=False), dim=1)
    one_hot = F.one_hot(torch.where(regions == 255, 3, regions), 4)[..., :3].double()
    sums, mass = prototype_pool(features, regions, 3)
    torch.testing.assert_close(sums, one_hot.flatten(1, 2).mT @ up.flatten(2).mT)
    torch.testing.assert_close(mass, one_hot.sum((1, 2)))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grid, size", GRIDS)
def test_contrast(grid, size, align_corners):
    features, regions, weights = inputs(grid, size)
    g = torch.Generator().manual_seed(31)
    shared, own = (torch.randn(*s, 3, 4, generator=g, dtype=torch.float64) for s in ((), (2,)))
    valid = torch.tensor([[True, False, True], [True, True, True]])
    for prototypes, v, w in [(shared, None, None), (own, valid, weights), (shared, valid[0], weights)]:
        loss, total = oracle.contrast(
            features.numpy(),
            prototypes.numpy(),
            regions.numpy(),
            0.3,
            None if v is None else v.numpy(),
            None if w is None else w.numpy(),
            align_corners,
        )
        args = dict(valid=v, weights=w, temperature=0.3, align_corners=align_corners, backend="reference")
        expected = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total.sum() if total.sum() else 0.0}
        for reduction, value in expected.items():
            got = prototype_contrast(features, prototypes, regions, reduction=reduction, **args)
            np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-12)


def test_contrast_is_the_cross_entropy_of_cosines():
    """As peers write it: upsample, F.normalize, matmul, F.cross_entropy."""
    features, regions, _ = inputs((4, 6), (16, 24))
    prototypes = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(37))
    up = F.normalize(F.interpolate(features, size=(16, 24), mode="bilinear", align_corners=False), dim=1)
    logits = torch.einsum("bdhw,cd->bchw", up, F.normalize(prototypes, dim=1)) / 0.5
    expected = F.cross_entropy(logits, regions, ignore_index=255)
    torch.testing.assert_close(prototype_contrast(features, prototypes, regions), expected)
