"""pixel_refine's own: bad calls, the size of training, planted faults, neighbours gathered as peers do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import smooth_areas
from small_inputs import FEATURES, FLOATS, LABELS, META
from support import BACKENDS, Fault, assert_near, check_shared_by_threads, uniform
from torch.nn import functional as F

from pssl_ext import nn as pssl_nn
from pssl_ext import pixel_refine
from pssl_ext.ops import _reference
from pssl_ext.ops import pixel_refine as module

SOUND = dict(images=torch.zeros(2, 3, 6, 5), masks=torch.zeros(2, 4, 3, 3))

BAD_CALLS = [
    (dict(images=LABELS), f"images must be {FLOATS}, got torch.int64"),
    (
        dict(images=FEATURES),
        "images must be [B,3,H,W] of at least 1×1 pixels, got [2, 4, 3, 3] torch.float32 on cpu",
    ),
    (
        dict(images=torch.zeros(2, 3, 0, 5)),
        "images must be [B,3,H,W] of at least 1×1 pixels, got [2, 3, 0, 5] torch.float32 on cpu",
    ),
    (dict(masks=LABELS), f"masks must be {FLOATS}, got torch.int64"),
    (
        dict(masks=torch.zeros(1, 4, 3, 3)),
        "masks must be [B,k,h,w]=[2,*,*,*] of at least 1×1 cells, got [1, 4, 3, 3] torch.float32 on cpu",
    ),
    (
        dict(masks=torch.zeros(2, 4, 3, 0)),
        "masks must be [B,k,h,w]=[2,*,*,*] of at least 1×1 cells, got [2, 4, 3, 0] torch.float32 on cpu",
    ),
    (
        dict(masks=torch.zeros(2, 4, 3, 3, device=META)),
        "masks must be on cpu as the first argument, got [2, 4, 3, 3] torch.float32 on meta",
    ),
    (dict(dilations=()), "dilations must be one or more distances, each at least 1, got []"),
    (dict(dilations=(1, 0)), "dilations must be one or more distances, each at least 1, got [1, 0]"),
    (dict(iterations=0), "iterations must be at least 1, got 0"),
    (dict(colour_scale=0.0), "colour_scale must be greater than 0, got 0.0"),
]

MODULE = pssl_nn.PixelRefine


def training_size(g):
    images = torch.stack([smooth_areas(g, 3, 448, 448) for _ in range(2)])
    return dict(images=images, masks=torch.rand(2, 5, 112, 112, generator=g))


def dark_borders(*args):
    """Zeros where the borders should be replicated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "shifted", lambda maps, offsets, outside: _reference.shifted(maps, offsets))
        return module.reference(*args)


FAULTS = [Fault(dark_borders, ("same_size", "defaults"), "output 0")]
GRADIENT_SAMPLE = None


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
    images, masks = uniform(2, 3, *size).to(dtype), uniform(2, 5, *grid, seed=67).to(dtype)
    names = ("dilations", "iterations", "colour_scale", "position_weight")
    got = pixel_refine(images, masks, **dict(zip(names, settings, strict=True)), backend=backend)
    assert_near(got, par(images.double(), masks.double(), *settings), tolerance)


@BACKENDS
@pytest.mark.parametrize("k", [1, 8, 14])
def test_refinement_of_as_many_masks_as_threads_share(backend, k):
    images, masks = uniform(2, 3, 35, 40), uniform(2, k, 9, 11, seed=67)
    got = pixel_refine(images, masks, dilations=(1, 3, 11), iterations=3, backend=backend)
    assert_near(got, par(images, masks, (1, 3, 11), 3, 0.3, 0.01))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_laws_of_refinement(h, w, k, seed):
    """Equal masks grow by 1 + position_weight an iteration; mirrored inputs give mirrored outputs; the scale of the
    colours counts for nothing; images and masks do not see each other, and NaN stays in its own mask."""
    images, masks = uniform(2, 3, h, w, seed=seed), uniform(2, k, h, w, seed=seed + 1)
    options = dict(dilations=(1, 3), iterations=2)
    refined = pixel_refine(images, masks, **options)
    assert_near(pixel_refine(images, torch.ones_like(masks), **options), torch.full_like(masks, 1.01**2))
    assert_near(pixel_refine(images.mT, masks.mT, **options).mT, refined, 1e-9)
    assert_near(pixel_refine(images.flip(3), masks.flip(3), **options).flip(3), refined, 1e-9)
    assert_near(pixel_refine(images * 255 + 3, masks, **options), refined, 1e-4)
    assert torch.equal(pixel_refine(images[1:], masks[1:], **options), refined[1:])
    masks = torch.cat([torch.full_like(masks[:, :1], torch.nan), masks], 1)
    assert torch.equal(pixel_refine(images, masks, **options)[:, 1:], refined)


def test_maps_that_threads_share():
    """Large enough that rows are shared out."""
    args = dict(images=uniform(1, 3, 150, 211), masks=uniform(1, 2, 40, 50), iterations=2)
    check_shared_by_threads("pixel_refine", args)
