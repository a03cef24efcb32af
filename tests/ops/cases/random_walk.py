"""random_walk's own: bad calls, the size of training, planted faults, the dense transition matrix."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_inputs import FEATURES, FLOATS, LABELS, META
from support import BACKENDS, Fault, assert_near, check_shared_by_threads, uniform

from pssl_ext import nn as pssl_nn
from pssl_ext import random_walk
from pssl_ext.ops import random_walk as module

SIZES = pytest.mark.parametrize("size", [(7, 9), (12, 4), (1, 6), (1, 1)])

SOUND = dict(cams=torch.zeros(2, 4, 5), edge=torch.zeros(4, 5))

BAD_CALLS = [
    (dict(cams=LABELS), f"cams must be {FLOATS}, got torch.int64"),
    (dict(cams=FEATURES), "cams must be [k,h,w], got [2, 4, 3, 3] torch.float32 on cpu"),
    (dict(edge=None), "edge must be given, or else features, got 'none'"),
    (dict(features=torch.zeros(1, 4, 5)), "edge must be given, or else features, got 'both'"),
    (dict(edge=torch.zeros(5, 4)), "edge must be [h,w]=[4,5], got [5, 4] torch.float32 on cpu"),
    (dict(edge=LABELS[0]), f"edge must be {FLOATS}, got torch.int64"),
    (
        dict(edge=torch.zeros(4, 5, device=META)),
        "edge must be on cpu as the first argument, got [4, 5] torch.float32 on meta",
    ),
    (
        dict(edge=None, features=torch.zeros(0, 4, 5)),
        "features must be [D,h,w]=[*,4,5] with D >= 1, got [0, 4, 5] torch.float32 on cpu",
    ),
    (dict(radius=0), "radius must be at least 1, got 0"),
    (dict(beta=0.0), "beta must be greater than 0, got 0.0"),
    (dict(log2_steps=-1), "log2_steps must be in 0..30, got -1"),
    (dict(log2_steps=31), "log2_steps must be in 0..30, got 31"),
    (dict(edge=torch.full((4, 5), 1.5)), "edge must hold values in 0..1, got [1.5]"),
    (dict(edge=torch.full((4, 5), -0.5)), "edge must hold values in 0..1, got [-0.5]"),
    (dict(edge=torch.full((4, 5), torch.nan)), "edge must hold values in 0..1, got [nan]"),
]

MODULE = pssl_nn.RandomWalk


def training_size(g):
    return dict(cams=torch.rand(3, 94, 125, generator=g), edge=torch.rand(94, 125, generator=g) ** 4)


def through_walls(*args):
    """The edges between two cells left out, their ends alone counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "path", lambda dy, dx: [(0, 0), (dy, dx)])
        return module.reference(*args)


FAULTS = [Fault(through_walls, ("edges", "walls"), "output 0")]
GRADIENT_SAMPLE = None


@BACKENDS
@SIZES
@pytest.mark.parametrize("radius, beta, log2_steps", [(5, 10, 8), (4, 8, 3), (2, 0.5, 0), (9, 3, 5)])
def test_walk_on_edges(backend, size, radius, beta, log2_steps):
    cams, edge = uniform(3, *size), uniform(*size, seed=67) ** 3
    got = random_walk(cams, edge, radius=radius, beta=beta, log2_steps=log2_steps, backend=backend)
    matrix = oracle.edge_affinity(edge.numpy(), radius, beta)
    assert_near(got, oracle.dense_walk((cams * (1 - edge)).numpy(), matrix, log2_steps))


@BACKENDS
@SIZES
@pytest.mark.parametrize("radius, beta, log2_steps", [(5, 8, 8), (3, 2.5, 3)])
def test_walk_on_features(backend, size, radius, beta, log2_steps):
    cams, features = uniform(2, *size), uniform(19, *size, seed=71)
    got = random_walk(
        cams, features=features, radius=radius, beta=beta, log2_steps=log2_steps, backend=backend
    )
    matrix = oracle.feature_affinity(features.numpy(), radius, beta)
    assert_near(got, oracle.dense_walk(cams.numpy(), matrix, log2_steps))


@BACKENDS
def test_nothing_passes_a_wall(backend):
    """A closed line keeps what is left of it there, and cells of the line itself hold nothing."""
    cams, edge = torch.zeros(1, 9, 11), torch.zeros(9, 11)
    cams[..., :5], edge[:, 5] = 1, 1
    walked = random_walk(cams, edge, backend=backend)
    assert torch.equal(walked, cams)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_laws_of_the_walk(h, w, radius, seed, on_edges):
    """Mirrored inputs give mirrored outputs; classes do not see each other, and NaN stays in its own; the walk
    conserves what every cell holds times the sum of its affinities."""
    source = uniform(h, w, seed=seed) ** 3 if on_edges else uniform(4, h, w, seed=seed)
    cams = uniform(5, h, w, seed=seed + 1)
    name, options = "edge" if on_edges else "features", dict(radius=radius, log2_steps=3)
    walked = random_walk(cams, **{name: source}, **options)
    assert_near(random_walk(cams.mT, **{name: source.mT}, **options).mT, walked)
    assert_near(random_walk(cams.flip(1, 2), **{name: source.flip(-1, -2)}, **options).flip(1, 2), walked)
    assert torch.equal(random_walk(cams[3:4], **{name: source}, **options)[0], walked[3])
    cams[1] = torch.nan
    with_nan = random_walk(cams, **{name: source}, **options)
    assert bool(with_nan[1].isnan().any()) and torch.equal(with_nan[[0, 2, 3, 4]], walked[[0, 2, 3, 4]])
    affinity = oracle.edge_affinity if on_edges else oracle.feature_affinity
    mass = torch.as_tensor(affinity(source.numpy(), radius, 10.0).sum(0)).view(h, w)
    cams = uniform(5, h, w, seed=seed + 1) * (1 - source if on_edges else 1)
    assert_near((walked * mass).sum((1, 2)), (cams * mass).sum((1, 2)))


@pytest.mark.parametrize("source", ["edge", "features"])
def test_maps_that_threads_share(source):
    """Large enough that rows are shared out, and one class only, so that classes cannot be."""
    size = (150, 211)
    affinities = uniform(*size, seed=67) ** 3 if source == "edge" else uniform(20, *size)
    check_shared_by_threads("random_walk", {"cams": uniform(1, *size), source: affinities, "log2_steps": 1})
