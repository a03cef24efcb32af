"""cam_compare's own: bad calls, the size of training, planted faults, the literal loop."""

import numpy as np
import oracle
import pytest
import torch
from problems import present_classes
from small_inputs import CAMS, FLOATS, LABELS, PRESENT
from support import BACKENDS, TWO_IMAGES, Fault, normal_maps

from pssl_ext import cam_compare
from pssl_ext import nn as pssl_nn
from pssl_ext.ops.cam_compare import reference

SOUND = dict(main=CAMS, support=CAMS, image_labels=PRESENT, size=(4, 4))

BAD_CALLS = [
    (dict(main=[]), "main must be at least one map, got []"),
    (dict(main=[LABELS]), f"main[0] must be {FLOATS}, got torch.int64"),
    (
        dict(support=[*CAMS, torch.zeros(2, 4, 4, 4)]),
        "support[1] must be [B,K,h,w]=[2,3,*,*], got [2, 4, 4, 4] torch.float32 on cpu",
    ),
    (dict(image_labels=torch.ones(3)), "image_labels must be [B,K], got [3] torch.float32 on cpu"),
    (dict(size=(4, 0)), "size must be (H,W), two integers of at least 1, got (4, 0)"),
    (dict(size=4), "size must be (H,W), two integers of at least 1, got 4"),
    (dict(size=(4.0, 4)), "size must be (H,W), two integers of at least 1, got (4.0, 4)"),
    (
        dict(main=[torch.zeros(2, 3, 4, 0)]),
        "main[0] must be of at least 1×1 cells, got [2, 3, 4, 0] torch.float32 on cpu",
    ),
    (dict(attention="dot"), "attention must be one of none, cosine, got 'dot'"),
    (dict(reduction="max"), "reduction must be one of mean, sum, none, got 'max'"),
]

MODULE = pssl_nn.CamCompare


def training_size(g):
    main = [torch.randn(4, 20, n, n, generator=g) for n in (28, 56, 112)]
    support = [torch.randn(4, 20, n, n, generator=g) for n in (28, 56, 84, 112)]
    return dict(main=main, support=support, image_labels=present_classes(g), size=(56, 56))


def no_attention(main, support, image_labels, height, width, cosine):
    return reference(main, support, image_labels, height, width, False)


def absent_classes(main, support, image_labels, *rest):
    """Every class counted as present."""
    return reference(main, support, torch.ones_like(image_labels), *rest)


FAULTS = [Fault(kernel, ("multi_scale",), "output 0") for kernel in (no_attention, absent_classes)]
GRADIENT_SAMPLE = "multi_scale"


@BACKENDS
@pytest.mark.parametrize("attention", ["cosine", "none"])
def test_compare(attention, backend):
    main, support = normal_maps((2, 3, 2, 3), (2, 3, 4, 6)), normal_maps((2, 3, 3, 2), (2, 3, 4, 6), seed=43)
    loss, _ = oracle.compare(
        [m.numpy() for m in main], [s.numpy() for s in support], TWO_IMAGES.numpy(), (4, 6), attention
    )
    args = dict(size=(4, 6), attention=attention, backend=backend)
    for reduction, expected in [("none", loss), ("sum", loss.sum()), ("mean", loss.sum() / (2 * 3 * 4 * 6))]:
        got = cam_compare(main, support, TWO_IMAGES, reduction=reduction, **args)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@BACKENDS
def test_gradient_of_compare_holds_the_attention(backend):
    """Finite differences of the literal loss with its attention held, for every element of both sides."""
    main, support = normal_maps((2, 3, 2, 2), (2, 3, 3, 4)), normal_maps((2, 3, 2, 3), seed=47)
    arrays = [m.numpy() for m in (*main, *support)]
    literal = lambda attention: oracle.compare(arrays[:2], arrays[2:], TWO_IMAGES.numpy(), (3, 4), attention)  # noqa: E731
    _, held = literal("cosine")
    leaves = [m.requires_grad_() for m in (*main, *support)]
    loss = cam_compare(leaves[:2], leaves[2:], TWO_IMAGES, size=(3, 4), reduction="sum", backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    for grad, array in zip(grads, [leaf.detach().numpy() for leaf in leaves], strict=True):
        for index in np.ndindex(*array.shape):
            value, sides = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = value + step
                sides.append(literal(held)[0].sum())
            array[index] = value
            assert abs((sides[0] - sides[1]) / 2e-6 - float(grad[index])) < 1e-6
