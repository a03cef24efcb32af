"""The refinement operators against what peers write: a dense transition matrix, gathered neighbours."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import pssl_ext
from pssl_ext import pixel_refine, random_walk
from pssl_ext.op import OPS
from pssl_ext.testing import assert_same_bits, check_args, run

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


def gathered(maps, dilations):
    """The neighbours as PAR gathers them, [B,c,N,h,w]: replicated borders, then 3×3 windows at each dilation."""
    b, c, h, w = maps.shape
    found = []
    for d in dilations:
        windows = F.unfold(F.pad(maps, [d] * 4, mode="replicate"), 3, dilation=d).view(b, c, 9, h, w)
        found.append(windows[:, :, [0, 1, 2, 3, 5, 6, 7, 8]])
    return torch.cat(found, 2)


def par(images, masks, dilations, iterations, colour_scale, position_weight):
    masks = F.interpolate(masks, size=images.shape[-2:], mode="bilinear", align_corners=True)
    colours = gathered(images, dilations)
    difference = (colours - images[:, :, None]).abs()
    colour = -((difference / (colours.std(2, keepdim=True) + 1e-8) / colour_scale) ** 2)
    corners = torch.tensor([2.0, 1, 2, 1, 1, 2, 1, 2], dtype=images.dtype).sqrt()
    distance = torch.cat([corners * d for d in dilations])
    position = -((distance / (distance.std() + 1e-8) / colour_scale) ** 2)
    affinity = colour.mean(1, keepdim=True).softmax(2)
    affinity = affinity + position_weight * position.softmax(0)[:, None, None]
    for _ in range(iterations):
        masks = (gathered(masks, dilations) * affinity).sum(2)
    return masks


@BACKENDS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(
    "size, grid", [((31, 40), (8, 10)), ((9, 70), (9, 70)), ((2, 3), (5, 4)), ((1, 1), (3, 2))]
)
@pytest.mark.parametrize(
    "settings", [((1, 2, 4, 8, 12, 24), 10, 0.3, 0.01), ((5,), 1, 1.0, 0.5), ((3, 3, 1), 2, 0.2, 0.0)]
)
def test_refinement(backend, settings, size, grid, dtype, tolerance):
    images, masks = rand(2, 3, *size).to(dtype), rand(2, 5, *grid, seed=67).to(dtype)
    names = ("dilations", "iterations", "colour_scale", "position_weight")
    got = pixel_refine(images, masks, **dict(zip(names, settings, strict=True)), backend=backend)
    assert_near(got, par(images.double(), masks.double(), *settings), tolerance)


@BACKENDS
@pytest.mark.parametrize("k", [1, 8, 14])
def test_refinement_of_as_many_masks_as_threads_share(backend, k):
    images, masks = rand(2, 3, 35, 40), rand(2, k, 9, 11, seed=67)
    got = pixel_refine(images, masks, dilations=(1, 3, 11), iterations=3, backend=backend)
    assert_near(got, par(images, masks, (1, 3, 11), 3, 0.3, 0.01))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_laws_of_refinement(h, w, k, seed):
    """Equal masks grow by 1 + position_weight an iteration; mirrored inputs give mirrored outputs; the scale of the
    colours counts for nothing; images and masks do not see each other, and NaN stays in its own mask."""
    images, masks = rand(2, 3, h, w, seed=seed), rand(2, k, h, w, seed=seed + 1)
    options = dict(dilations=(1, 3), iterations=2)
    refined = pixel_refine(images, masks, **options)
    assert_near(pixel_refine(images, torch.ones_like(masks), **options), torch.full_like(masks, 1.01**2))
    assert_near(pixel_refine(images.mT, masks.mT, **options).mT, refined, 1e-9)
    assert_near(pixel_refine(images.flip(3), masks.flip(3), **options).flip(3), refined, 1e-9)
    assert_near(pixel_refine(images * 255 + 3, masks, **options), refined, 1e-4)
    assert torch.equal(pixel_refine(images[1:], masks[1:], **options), refined[1:])
    masks = torch.cat([torch.full_like(masks[:, :1], torch.nan), masks], 1)
    assert torch.equal(pixel_refine(images, masks, **options)[:, 1:], refined)


@pytest.mark.parametrize("op", ["edges", "features", "pixel_refine"])
def test_maps_that_threads_share(op):
    """Large enough that rows are shared out, and one class only, so that classes cannot be."""
    size = (150, 211)
    if op == "pixel_refine":
        args = dict(images=rand(1, 3, *size), masks=rand(1, 2, 40, 50), iterations=2)
    elif op == "edges":
        args = dict(cams=rand(1, *size), edge=rand(*size, seed=67) ** 3, log2_steps=1)
    else:
        args = dict(cams=rand(1, *size), features=rand(20, *size), log2_steps=1)
    args = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in args.items()}
    spec = OPS[op if op == "pixel_refine" else "random_walk"]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(spec, args, "auto"))
    finally:
        torch.set_num_threads(threads)
    check_args(spec, args, "auto", op)
    if pssl_ext.explain(spec.name) == f"{spec.name} on cpu: native":
        assert_same_bits(found[0], found[1], f"{op}, 1 and 2 threads")
        assert_same_bits(found[0], found[2], f"{op}, 1 and 3 threads")
