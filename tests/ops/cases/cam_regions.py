"""cam_regions' own: bad calls, the size of training, planted faults, the literal loop."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import present_classes
from small_inputs import CAMS, META, PRESENT
from support import BACKENDS, TWO_IMAGES, Fault, normal_maps

from pssl_ext import cam_regions
from pssl_ext import nn as pssl_nn
from pssl_ext.ops._reference import resize_stepwise
from pssl_ext.ops.cam_regions import reference

SOUND = dict(cams=CAMS, image_labels=PRESENT, size=(4, 4))

BAD_CALLS = [
    (dict(cams=[]), "cams must be at least one map, got []"),
    (dict(image_labels=None), "image_labels must be a tensor, got NoneType"),
    (
        dict(cams=[CAMS[0].to(META)]),
        "cams[0] must be on cpu as the first argument, got [2, 3, 4, 4] torch.float32 on meta",
    ),
    (
        dict(cams=[torch.zeros(1, 255, 2, 2)], image_labels=torch.ones(1, 255)),
        "cams must be of at most 254 classes (the mask is uint8), got 255",
    ),
    (dict(size=(4, 0)), "size must be (H,W), two integers of at least 1, got (4, 0)"),
    (dict(size=4), "size must be (H,W), two integers of at least 1, got 4"),
    (dict(size=(4.0, 4)), "size must be (H,W), two integers of at least 1, got (4.0, 4)"),
    (
        dict(cams=[torch.zeros(2, 3, 4, 0)]),
        "cams[0] must be of at least 1×1 cells, got [2, 3, 4, 0] torch.float32 on cpu",
    ),
    (dict(background=0.5), "background must be at most foreground=0.3, got 0.5"),
    (dict(ignore_index=256), "ignore_index must be in 0..255 (the mask is uint8), got 256"),
]

MODULE = pssl_nn.CamRegions


def training_size(g):
    cams = [torch.randn(4, 20, n, n, generator=g) for n in (28, 56, 84, 112)]
    return dict(cams=cams, image_labels=present_classes(g), size=(448, 448))


def absent_classes(cams, image_labels, *rest):
    """Every class counted as present."""
    return reference(cams, torch.ones_like(image_labels), *rest)


def no_ignore_band(cams, image_labels, height, width, foreground, background, ignore_index):
    return reference(cams, image_labels, height, width, foreground, foreground, ignore_index)


FAULTS = [
    Fault(absent_classes, ("multi_scale", "no_class"), "output 0"),
    Fault(no_ignore_band, ("ignore_band", "several_tasks"), "output 0", unseen=("multi_scale",)),
]
GRADIENT_SAMPLE = None


@BACKENDS
@pytest.mark.parametrize("foreground, background", [(0.3, None), (0.6, 0.4)])
def test_regions(foreground, background, backend):
    cams = normal_maps((2, 3, 3, 4), (2, 3, 6, 5))
    got = cam_regions(
        cams, TWO_IMAGES, size=(6, 8), foreground=foreground, background=background, backend=backend
    )
    low = foreground if background is None else background
    expected = oracle.region_mask([c.numpy() for c in cams], TWO_IMAGES.numpy(), (6, 8), foreground, low, 255)
    np.testing.assert_array_equal(got, expected)


@given(st.data())
def test_regions_are_the_references_bit_for_bit(data):
    """Maps that tie with each other and, where one class is alone, values that lie on a threshold."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    b, k, side = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), st.integers(1, 9)
    grids = [(data.draw(side), data.draw(side)) for _ in range(data.draw(st.integers(1, 3)))]
    size = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    cams = [(8 * torch.randn(b, k, *grid, generator=g)).round() / 8 for grid in grids]
    labels = torch.randint(0, 2, (b, k), generator=g)
    # A threshold on a value: the mask changes with its last bit
    total = sum(resize_stepwise(c[:1, :1], size).relu() for c in cams)
    foreground = float((total / (total.max() + 1e-5)).flatten()[data.draw(st.integers(0, total.numel() - 1))])
    levels = dict(size=size, foreground=foreground, background=foreground / 2)
    expected = cam_regions(cams, labels, **levels, backend="reference")
    assert torch.equal(cam_regions(cams, labels, **levels), expected)
