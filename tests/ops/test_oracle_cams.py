"""The references of the CAM operators against literal loops."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pssl_ext import cam_compare, cam_regions, cam_sweep
from pssl_ext.ops._reference import resize, resize_stepwise
from pssl_ext.ops.cam_sweep import power_thresholds


def maps(*shapes, seed=41):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


LABELS = torch.tensor([[1, 0, 1], [0, 1, 1]])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


@BACKENDS
@pytest.mark.parametrize("attention", ["cosine", "none"])
def test_compare(attention, backend):
    main, support = maps((2, 3, 2, 3), (2, 3, 4, 6)), maps((2, 3, 3, 2), (2, 3, 4, 6), seed=43)
    loss, _ = oracle.compare(
        [m.numpy() for m in main], [s.numpy() for s in support], LABELS.numpy(), (4, 6), attention
    )
    args = dict(size=(4, 6), attention=attention, backend=backend)
    for reduction, expected in [("none", loss), ("sum", loss.sum()), ("mean", loss.sum() / (2 * 3 * 4 * 6))]:
        got = cam_compare(main, support, LABELS, reduction=reduction, **args)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@BACKENDS
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


@BACKENDS
@pytest.mark.parametrize("foreground, background", [(0.3, None), (0.6, 0.4)])
def test_regions(foreground, background, backend):
    cams = maps((2, 3, 3, 4), (2, 3, 6, 5))
    got = cam_regions(
        cams, LABELS, size=(6, 8), foreground=foreground, background=background, backend=backend
    )
    low = foreground if background is None else background
    expected = oracle.region_mask([c.numpy() for c in cams], LABELS.numpy(), (6, 8), foreground, low, 255)
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


@BACKENDS
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
def test_sweep(background, grid, normalize, backend):
    """Thresholds unsorted, doubled, and equal to values of the maps; ties between classes."""
    cams, ids, truth = images(grid, (6, 7), quantum=0.125)
    got = cam_sweep(cams, ids, truth, num_regions=5, normalize=normalize, **background, backend=backend)
    expected = oracle.sweep(
        *([t.numpy() for t in ts] for ts in (cams, ids, truth)), 5, normalize=normalize, **background
    )
    np.testing.assert_array_equal(got, expected)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid, size", [((3, 4), (13, 10)), ((9, 5), (4, 17)), ((1, 3), (6, 6))])
@pytest.mark.parametrize("normalize", [False, True])
def test_sweep_at_its_own_values(normalize, grid, size, dtype, backend):
    """Every value of the resized maps is a threshold: a last bit that differs is a pixel that differs."""
    cams, ids, truth = images(grid, size)
    cams = [c.to(dtype) for c in cams]
    arrays = [[t.numpy() for t in ts] for ts in (cams, ids, truth)]
    up = [oracle.bilinear_stepwise(c, size) for c in arrays[0]]
    values = np.concatenate(
        [(u / (u.max((1, 2), keepdims=True) + 1e-5) if normalize else u).ravel() for u in up]
    )
    assert all(v.dtype == arrays[0][0].dtype for v in (*up, values))
    values = values[:: len(values) // 40].astype(np.float64)
    got = cam_sweep(cams, ids, truth, values.tolist(), 5, normalize=normalize, backend=backend)
    np.testing.assert_array_equal(got, oracle.sweep(*arrays, 5, thresholds=values, normalize=normalize))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stepwise_resize_is_bilinear(dtype):
    for grid, size in [((3, 4), (13, 10)), ((9, 5), (4, 17)), ((1, 3), (6, 6)), ((40, 30), (375, 500))]:
        (cam,) = maps((2, *grid))
        got = resize_stepwise(cam.to(dtype), size)
        torch.testing.assert_close(got, resize(cam.to(dtype)[None], size)[0], rtol=1e-5, atol=1e-5)
        if size != (375, 500):
            np.testing.assert_array_equal(got, oracle.bilinear_stepwise(cam.to(dtype).numpy(), size))


def wider(t):
    """The same values in rows with room behind them, as a crop has."""
    return torch.nn.functional.pad(t, (0, 3))[..., :-3]


@given(st.data())
def test_sweep_is_the_reference_bit_for_bit(data):
    """Any sizes, classes, values (NaN and infinities among them) and thresholds, clustered or far apart; CAMs and
    ground truth with rows one behind the other or not."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    side, regions = st.integers(1, 12), data.draw(st.integers(2, 6))
    step = data.draw(st.sampled_from([0.0, 0.125]))
    cams, ids, truths = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        k, grid, size = data.draw(st.integers(0, 3)), (data.draw(side), data.draw(side)), None
        size = (
            grid
            if data.draw(st.booleans())
            else (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
        )
        cam = torch.rand(k, *grid, generator=g)
        cam = (cam / step).round() * step if step else cam
        if k and data.draw(st.booleans()):
            cam[0, 0, -1], cam[-1, -1, 0] = torch.nan, data.draw(st.sampled_from([torch.inf, -torch.inf]))
        truth = torch.randint(0, regions, size, generator=g)
        truth[torch.rand(size, generator=g) < 0.1] = 255
        cam, truth = (wider(t) if data.draw(st.booleans()) else t for t in (cam, truth))
        cams.append(cam), truths.append(truth), ids.append(torch.randint(1, regions, (k,), generator=g))
    values = st.one_of(
        st.floats(0, 1, width=32), st.floats(width=32), st.integers(-1, 9).map(lambda i: i / 8)
    )
    thresholds = data.draw(st.lists(values, max_size=90))
    args = (cams, ids, truths, thresholds, regions)
    for normalize in (False, True):
        expected = cam_sweep(*args, normalize=normalize, backend="reference")
        assert torch.equal(cam_sweep(*args, normalize=normalize), expected)


def test_sweep_of_an_image_of_many_pixels():
    """More than a histogram counts before it is added up, on however few threads; the two beside it share it."""
    g = torch.Generator().manual_seed(3)
    cams = [torch.rand(2, 3, 5, generator=g) for _ in range(3)]
    truths = [
        torch.randint(0, 4, size, generator=g, dtype=torch.uint8) for size in ((9, 7), (2300, 2000), (5, 5))
    ]
    ids = [torch.tensor([3, 1])] * 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        got = cam_sweep(cams, ids, truths, [0.7, 0.2], 4)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got, cam_sweep(cams, ids, truths, [0.7, 0.2], 4, backend="reference"))


def test_sweep_of_nothing():
    nothing = (torch.zeros(0, 2, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
    assert cam_sweep(*nothing, [0.1], 3)[0].tolist() == [[4, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, 24.0, 32.0])
def test_power_is_a_threshold(alpha):
    (point,) = power_thresholds([alpha])
    for m in np.linspace(0, 1, 1001):
        assert (m > (1 - m) ** alpha) == (m > point)
