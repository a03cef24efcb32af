"""cam_sweep's own: bad calls, the size of training, planted faults, the evaluation loop as peers write it."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import label_areas
from small_inputs import LABELS
from support import BACKENDS, Fault, normal_maps

from pssl_ext import cam_sweep
from pssl_ext.ops._reference import resize, resize_stepwise
from pssl_ext.ops.cam_sweep import power_thresholds, reference

SOUND = dict(
    cams=torch.zeros(1, 4, 4),
    class_ids=torch.tensor([1]),
    ground_truth=torch.zeros(4, 4, dtype=torch.uint8),
    thresholds=[0.5],
    num_regions=3,
)

BAD_CALLS = [
    (dict(cams=[]), "cams, class_ids, ground_truth must be lists of one length, got (0, 1, 4)"),
    (dict(cams=[], class_ids=[], ground_truth=[]), "cams must be at least one image, got []"),
    (dict(cams=torch.zeros(4, 4)), "cams[0] must be [k,h,w], got [4, 4] torch.float32 on cpu"),
    (dict(class_ids=torch.tensor([1, 2])), "class_ids[0] must be [k]=[1], got [2] torch.int64 on cpu"),
    (dict(class_ids=torch.ones(1)), "class_ids[0] must be of an integer type, got torch.float32"),
    (dict(class_ids=torch.tensor([0])), "class_ids[0] must hold region numbers 1..2, got [0]"),
    (dict(ground_truth=LABELS), "ground_truth[0] must be [H,W], got [2, 6, 6] torch.int64 on cpu"),
    (
        dict(ground_truth=torch.full((4, 4), 7)),
        "ground_truth[0] must hold labels 0..2 or ignore_index=255, got [7]",
    ),
    (dict(power=[1.0]), "power must be None where thresholds are given, got [1.0]"),
    (dict(thresholds=None), "thresholds must be given where power is not, got None"),
    (dict(num_regions=0), "num_regions must be at least 1, got 0"),
    (
        dict(cams=torch.zeros(1, 0, 4)),
        "cams[0] must be of at least 1×1 cells where there is ground truth, got [1, 0, 4] torch.float32 on cpu",
    ),
    (dict(thresholds=None, power=[0.0]), "power must be greater than 0, got 0.0"),
    (dict(thresholds=torch.zeros(1, 2)), "thresholds must be [T], got [1, 2] torch.float32 on cpu"),
]

MODULE = None  # counts of an evaluation: a function


def training_size(g):
    return dict(
        cams=[torch.rand(1 + i, 56, 56, generator=g) for i in range(4)],
        class_ids=[torch.randperm(20, generator=g)[: 1 + i] + 1 for i in range(4)],
        ground_truth=list(label_areas(g, 4, 21, 375, 500)),
        thresholds=torch.linspace(0, 1, 60),
        num_regions=21,
    )


def one_count_more(*args):
    counts = reference(*args)
    counts[0, 0, 0] += 1
    return counts


FAULTS = [Fault(one_count_more, ("one_image",), "1 of")]
GRADIENT_SAMPLE = None


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
        (cam,) = normal_maps((2, *grid))
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
