"""prototype_contrast's own: bad calls, the size of training, planted faults, the literal loop."""

import numpy as np
import oracle
import pytest
import torch
from problems import label_areas
from small_inputs import CELLS, FEATURES, FLOATS, LABELS, META, PROTOTYPES
from support import ORACLE_GRIDS, Fault, prototype_inputs, reference_gradients
from torch.nn import functional as F

from pssl_ext import nn as pssl_nn
from pssl_ext import prototype_contrast
from pssl_ext.ops.prototype_contrast import reference

SOUND = dict(features=FEATURES, prototypes=PROTOTYPES, regions=LABELS)

BAD_CALLS = [
    (dict(features=FEATURES[0]), "features must be [B,D,h,w], got [4, 3, 3] torch.float32 on cpu"),
    (dict(features=LABELS), f"features must be {FLOATS}, got torch.int64"),
    (
        dict(features=torch.zeros(2, 4, 3, 0)),
        f"{CELLS}, got [2, 4, 3, 0] torch.float32 on cpu",
    ),
    (dict(prototypes=PROTOTYPES.long()), f"prototypes must be {FLOATS}, got torch.int64"),
    (
        dict(prototypes=torch.zeros(3, 5)),
        "prototypes must be [C,D]=[*,4] or [B,C,D]=[2,*,4], got [3, 5] torch.float32 on cpu",
    ),
    (
        dict(prototypes=torch.zeros(1, 3, 4)),
        "prototypes must be [C,D]=[*,4] or [B,C,D]=[2,*,4], got [1, 3, 4] torch.float32 on cpu",
    ),
    (dict(regions=LABELS.float()), "regions must be of an integer type, got torch.float32"),
    (dict(regions=LABELS[0]), "regions must be [B,H,W]=[2,*,*], got [6, 6] torch.int64 on cpu"),
    (dict(temperature=0.0), "temperature must be greater than 0, got 0.0"),
    (
        dict(temperature=torch.ones(2)),
        "temperature must be a number or a tensor of one element, got [2] torch.float32 on cpu",
    ),
    (dict(temperature=torch.tensor(1)), f"temperature must be {FLOATS}, got torch.int64"),
    (dict(valid=[True]), "valid must be a tensor, got list"),
    (dict(valid=torch.ones(3)), "valid must be bool, got [3] torch.float32 on cpu"),
    (
        dict(valid=torch.ones(4, dtype=torch.bool)),
        "valid must be [C]=[3] or [B,C]=[2,3], got [4] torch.bool on cpu",
    ),
    (dict(weights=LABELS), f"weights must be {FLOATS}, got torch.int64"),
    (
        dict(weights=torch.zeros(2, 6)),
        "weights must be [B,H,W]=[2, 6, 6], got [2, 6] torch.float32 on cpu",
    ),
    (
        dict(prototypes=PROTOTYPES.to(META)),
        "prototypes must be on cpu as the first argument, got [3, 4] torch.float32 on meta",
    ),
    (dict(reduction="max"), "reduction must be one of mean, sum, none, got 'max'"),
    (dict(regions=LABELS + 254), "regions must hold labels 0..2 or ignore_index=255, got [254]"),
    (
        dict(regions=LABELS - 100, ignore_index=-1),
        "regions must hold labels 0..2 or ignore_index=-1, got [-100]",
    ),
]

MODULE = pssl_nn.PrototypeContrast


def training_size(g):
    features = torch.randn(2, 256, 56, 56, generator=g)
    weights = torch.rand(2, 448, 448, generator=g)
    args = dict(features=features, regions=label_areas(g, 2, 21, 448, 448), weights=weights)
    return args | dict(prototypes=torch.randn(21, 256, generator=g))


def invalid_in_the_denominator(features, prototypes, regions, temperature, valid, *rest):
    return reference(features, prototypes, regions, temperature, None, *rest)


def steep_temperature(*args):
    features, prototypes, temperature, weights = reference_gradients("prototype_contrast", *args)
    return features, prototypes, temperature * 1.001, weights


FAULTS = [
    Fault(invalid_in_the_denominator, ("invalid",), "output 0", unseen=("same_grid",)),
    Fault(steep_temperature, ("tensor_temperature",), "grad temperature", entry="_backward"),
]
GRADIENT_SAMPLE = "label_grid_8x"


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grid, size", ORACLE_GRIDS)
def test_contrast(grid, size, align_corners):
    features, regions, weights = prototype_inputs(grid, size)
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
    features, regions, _ = prototype_inputs((4, 6), (16, 24))
    prototypes = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(37))
    up = F.normalize(F.interpolate(features, size=(16, 24), mode="bilinear", align_corners=False), dim=1)
    logits = torch.einsum("bdhw,cd->bchw", up, F.normalize(prototypes, dim=1)) / 0.5
    expected = F.cross_entropy(logits, regions, ignore_index=255)
    torch.testing.assert_close(prototype_contrast(features, prototypes, regions), expected)
