"""The references of the CAM operators against literal loops."""

import numpy as np
import oracle
import pytest
import torch

from pssl_ext import cam_compare, cam_regions, cam_sweep
from pssl_ext.ops.cam_sweep import power_thresholds


def maps(*shapes, seed=41):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


LABELS = torch.tensor([[1, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize("attention", ["cosine", "none"])
def test_compare(attention):
    main, support = maps((2, 3, 2, 3), (2, 3, 4, 6)), maps((2, 3, 3, 2), (2, 3, 4, 6), seed=43)
    loss, _ = oracle.compare(
        [m.numpy() for m in main], [s.numpy() for s in support], LABELS.numpy(), (4, 6), attention
    )
    args = dict(size=(4, 6), attention=attention, backend="reference")
    for reduction, expected in [("none", loss), ("sum", loss.sum()), ("mean", loss.sum() / (2 * 3 * 4 * 6))]:
        got = cam_compare(main, support, LABELS, reduction=reduction, **args)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradient_of_compare_holds_the_attention(backend):
    """Finite differences of the literal loss with its attention held, for every element of both sides."""
    main, support = maps((2, 3, 2, 2), (2, 3, 3, 4)), maps((2, 3, 2, 3), seed=47)
    arrays = [m.numpy() for m in (*main, *support)]
    literal = lambda attention: oracle.compare(arrays[:2], arrays[2:], LABELS.numpy(), (3, 4), attention)  # noqa: E731
    _, held = literal("cosine")
    leaves = [m.requires_grad_() for m in (*main, *support)]
    loss = cam_compare(leaves[:2], leaves[2:], LABELS, size=(3, 4), reduction="sum", backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    for grad, array in zip(grads, [leaf.detach().numpy() for leaf in leaves], strict=True):
        for index in np.ndindex(*array.shape):
            value, sides = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = value + step
                sides.append(literal(held)[0].sum())
            array[index] = value
            assert abs((sides[0] - sides[1]) / 2e-6 - float(grad[index])) < 1e-6


@pytest.mark.parametrize("foreground, background", [(0.3, None), (0.6, 0.4)])
def test_regions(foreground, background):
    cams = maps((2, 3, 3, 4), (2, 3, 6, 5))
    got = cam_regions(
        cams, LABELS, size=(6, 8), foreground=foreground, background=background, backend="reference"
    )
    low = foreground if background is None else background
    expected = oracle.region_mask([c.numpy() for c in cams], LABELS.numpy(), (6, 8), foreground, low, 255)
    np.testing.assert_array_equal(got, expected)


def images(grid, size, quantum=None):
    """Two images; ``quantum`` rounds the maps, so that they tie with each other and with the thresholds."""
    g = torch.Generator().manual_seed(53)
    cams = [torch.rand(k, *grid, generator=g, dtype=torch.float64) for k in (3, 1)]
    if quantum:
        cams = [(c / quantum).round() * quantum for c in cams]
    truth = [torch.randint(0, 5, size, generator=g) for _ in cams]
    for t in truth:
        t[torch.rand(size, generator=g) < 0.15] = 255
    return cams, [torch.tensor([3, 1, 4]), torch.tensor([2])], truth


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("grid", [(6, 7), (3, 4)])
@pytest.mark.parametrize(
    "background",
    [
        dict(thresholds=[0.5, 0.25, 0.25, 0.75, 0.0, 1.0, -1.0, 2.0]),
        dict(thresholds=None, power=[1, 2.5, 16]),
    ],
    ids=["thresholds", "power"],
)
def test_sweep(background, grid, normalize):
    """Thresholds unsorted, doubled, and equal to values of the maps; ties between classes."""
    cams, ids, truth = images(grid, (6, 7), quantum=0.125)
    got = cam_sweep(cams, ids, truth, num_regions=5, normalize=normalize, **background, backend="reference")
    expected = oracle.sweep(
        *([t.numpy() for t in ts] for ts in (cams, ids, truth)), 5, normalize=normalize, **background
    )
    np.testing.assert_array_equal(got, expected)


def test_sweep_of_nothing():
    nothing = (torch.zeros(0, 2, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
    assert cam_sweep(*nothing, [0.1], 3)[0].tolist() == [[4, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, 24.0, 32.0])
def test_power_is_a_threshold(alpha):
    (point,) = power_thresholds([alpha])
    for m in np.linspace(0, 1, 1001):
        assert (m > (1 - m) ** alpha) == (m > point)
