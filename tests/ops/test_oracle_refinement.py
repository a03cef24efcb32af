"""The refinement operators against what peers write: a dense transition matrix, gathered neighbours."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pssl_ext import random_walk

BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])
SIZES = pytest.mark.parametrize("size", [(7, 9), (12, 4), (1, 6), (1, 1)])


def rand(*shape, seed=61):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(got, expected, tolerance=1e-12):
    error = float((got - torch.as_tensor(expected)).abs().max())
    assert error <= tolerance * float(abs(expected).max()), error


@BACKENDS
@SIZES
@pytest.mark.parametrize("radius, beta, log2_steps", [(5, 10, 8), (4, 8, 3), (2, 0.5, 0), (9, 3, 5)])
def test_walk_on_edges(backend, size, radius, beta, log2_steps):
    cams, edge = rand(3, *size), rand(*size, seed=67) ** 3
    got = random_walk(cams, edge, radius=radius, beta=beta, log2_steps=log2_steps, backend=backend)
    matrix = oracle.edge_affinity(edge.numpy(), radius, beta)
    assert_near(got, oracle.dense_walk((cams * (1 - edge)).numpy(), matrix, log2_steps))


@BACKENDS
@SIZES
@pytest.mark.parametrize("radius, beta, log2_steps", [(5, 8, 8), (3, 2.5, 3)])
def test_walk_on_features(backend, size, radius, beta, log2_steps):
    cams, features = rand(2, *size), rand(19, *size, seed=71)
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
    source = rand(h, w, seed=seed) ** 3 if on_edges else rand(4, h, w, seed=seed)
    cams = rand(5, h, w, seed=seed + 1)
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
    cams = rand(5, h, w, seed=seed + 1) * (1 - source if on_edges else 1)
    assert_near((walked * mass).sum((1, 2)), (cams * mass).sum((1, 2)))
