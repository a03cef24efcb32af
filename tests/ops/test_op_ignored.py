"""What does not count reaches nothing: NaN under ignored pixels and invalid prototypes, images with nothing
to count."""

import math

import pytest
import torch
from support import planted
from torch.nn import functional as F

from pssl_ext import dispatch, prototype_contrast, prototype_pool
from pssl_ext.op import OPS
from pssl_ext.ops.prototype_pool import resize
from pssl_ext.testing import devices, run

GRIDS = [
    ((5, 7), (40, 56)),
    ((6, 5), (23, 31)),
    ((9, 11), (9, 11)),
    ((8, 12), (8, 12)),  # whole vectors of pixels
    ((13, 9), (8, 6)),
    ((4, 6), (12, 18)),
]
OPERATORS = ["prototype_pool", "prototype_contrast"]


def touched(n, size, counted, align_corners):
    """The cells of 0..n-1 that the label pixels ``counted`` of 0..size-1 read, whatever their weight."""
    cells = set()
    for x in counted:
        if align_corners:
            source = x * (n - 1) / (size - 1)
        else:
            source = max(0.0, (x + 0.5) * n / size - 0.5)
        cells |= {min(int(source), n - 1), min(int(source) + 1, n - 1)}
    return cells


def half_ignored(op, device, grid, size, align_corners, value, channels=6):
    """(arguments with ``value`` wherever nothing counts, mask of the cells that hold it): the right part is
    ignored."""
    g = torch.Generator().manual_seed(5)
    regions = torch.randint(0, 3, (2, *size), generator=g)
    first = size[1] // 2
    regions[..., first:] = 255
    features = torch.randn(2, channels, *grid, generator=g)
    untouched = sorted(set(range(grid[1])) - touched(grid[1], size[1], range(first), align_corners))
    assert untouched
    features[..., untouched] = value
    weights = torch.rand(2, *size, generator=g) + 0.1
    weights[..., first:] = value
    args = dict(features=features, regions=regions, weights=weights, align_corners=align_corners)
    if op == "prototype_pool":
        args["num_regions"] = 3
    else:
        prototypes = torch.randn(4, channels, generator=g)
        prototypes[3] = value
        args |= dict(
            prototypes=prototypes,
            valid=torch.tensor([True, True, True, False]),
            temperature=torch.tensor(0.3),
        )
    args = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in args.items()}
    return args, untouched


def check_ignored(op, device, grid, size, align_corners=False, value=math.nan, backend="auto", channels=6):
    args, untouched = half_ignored(op, device, grid, size, align_corners, value, channels)
    clean, _ = half_ignored(op, device, grid, size, align_corners, 1.0, channels)
    got, expected = run(OPS[op], args, backend).named(), run(OPS[op], clean, backend).named()
    for name, tensor in expected.items():
        assert bool(got[name].isfinite().all()), f"{op} {grid}: {value} reaches {name}"
        assert torch.equal(got[name], tensor), f"{op} {grid}: {name} depends on what is ignored"
    assert not got["grad features"][..., untouched].any()
    assert not got["grad weights"][args["regions"] == 255].any()
    if op == "prototype_contrast":
        assert not got["grad prototypes"][3].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grid, size", GRIDS)
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("op", OPERATORS)
def test_nan_does_not_reach(op, device, grid, size, align_corners, value):
    check_ignored(op, device, grid, size, align_corners, value)


@pytest.mark.parametrize("grid", [(9, 11), (8, 12)])
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("op", OPERATORS)
def test_nan_does_not_reach_with_many_channels(op, device, grid):
    """So many that prototype_contrast saves its products on the CPU."""
    check_ignored(op, device, grid, grid, channels=48)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("grid, size", [((9, 11), (9, 11)), ((13, 9), (8, 6)), ((4, 6), (12, 18))])
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("op", OPERATORS)
def test_nan_does_not_reach_by_choice(op, backend, device, grid, size, value):
    """Through kernels that ``auto`` does not take where the compiled ones are."""
    reason = dispatch.why_not(OPS[op], backend, device)
    if reason is not None:
        pytest.skip(f"{backend} on {device}: {reason}")
    check_ignored(op, device, grid, size, value=value, backend=backend)


def test_a_leak_is_seen():
    """A mask by multiplication, as peers write it: 0 · NaN is NaN."""

    def leaking(features, regions, num_regions, weights, normalize, ignore_index, align_corners, eps):
        up = resize(features, regions.shape[-2:], align_corners)
        labels = torch.where(regions == ignore_index, num_regions, regions)
        masks = (
            F.one_hot(labels, num_regions + 1)[..., :num_regions].movedim(-1, 1)
            * weights.nan_to_num()[:, None]
        )
        return torch.einsum("bchw,bdhw->bcd", masks, F.normalize(up, dim=1)), masks.sum((2, 3))

    with planted("prototype_pool", leaking), pytest.raises(AssertionError, match="nan reaches output 0"):
        check_ignored("prototype_pool", "cpu", (5, 7), (40, 56))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("device", devices())
def test_nothing_counts(device, reduction):
    """0 with zero gradients, so that the ranks of a distributed run stay in step; also where no prototype is
    valid, and where all weights are 0."""
    features = torch.randn(2, 5, 3, 3, device=device, requires_grad=True)
    prototypes = torch.randn(4, 5, device=device, requires_grad=True)
    labels = torch.randint(0, 4, (2, 6, 6), device=device)
    nothing = [
        dict(regions=torch.full_like(labels, 255)),
        dict(regions=labels, valid=torch.zeros(4, dtype=torch.bool, device=device)),
        dict(regions=labels, weights=torch.zeros(2, 6, 6, device=device)),
    ]
    for args in nothing:
        loss = prototype_contrast(features, prototypes, **args, reduction=reduction)
        assert not loss.any()
        for grad in torch.autograd.grad(loss.sum(), [features, prototypes]):
            assert not grad.any()


@pytest.mark.parametrize("device", devices())
def test_a_zero_feature_has_zero_gradient(device):
    """eager's gradient there is 1e12 times the rest."""
    features = torch.randn(1, 5, 4, 4, device=device)
    features[..., 2, 2] = 0
    features.requires_grad_()
    labels = torch.randint(0, 3, (1, 4, 4), device=device)
    losses = [
        prototype_pool(features, labels, 3)[0].sum(),
        prototype_contrast(features, torch.randn(3, 5, device=device), labels),
    ]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, features)
        assert not grad[..., 2, 2].any() and bool(grad[..., 1, 1].any()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("device", devices())
def test_a_zero_prototype_has_zero_gradient(device):
    prototypes = torch.randn(3, 5, device=device)
    prototypes[1] = 0
    prototypes.requires_grad_()
    features, labels = torch.randn(1, 5, 4, 4, device=device), torch.randint(0, 3, (1, 8, 8), device=device)
    (grad,) = torch.autograd.grad(prototype_contrast(features, prototypes, labels), prototypes)
    assert not grad[1].any() and bool(grad[0].any()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("op", ["cam_compare", "cam_regions"])
@pytest.mark.parametrize("device", devices())
def test_nan_in_an_absent_class(op, device):
    """The classifier's map of a class that is not in the image counts for nothing, whatever it holds."""
    labels = torch.tensor([[1, 0, 1]], device=device)
    found = []
    for value in (math.nan, 1.0):
        g = torch.Generator().manual_seed(1)
        cams = torch.randn(1, 3, 4, 4, generator=g).to(device)
        cams[:, 1] = value
        args = dict(cams=[cams]) if op == "cam_regions" else dict(main=[cams], support=[cams.flip(-1)])
        found.append(run(OPS[op], dict(args, image_labels=labels, size=(8, 8))).named())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("device", devices())
def test_nan_that_counts_stays_with_its_pixel(device):
    """Labels on the feature grid: a pixel's NaN reaches its image's sums, its own gradient and nothing else."""
    g = torch.Generator().manual_seed(6)
    features = torch.randn(2, 9, 17, 21, generator=g)  # more pixels than one tile of the CPU kernel has
    features[0, :, 3, 5] = math.nan
    features = features.to(device).requires_grad_()
    regions = torch.randint(0, 4, (2, 17, 21), generator=g).to(device)
    sums, _ = prototype_pool(features, regions, 4)
    sums.sum().backward()
    assert not sums[0, regions[0, 3, 5]].isfinite().any()
    assert bool(sums[1].isfinite().all())
    affected = ~features.grad.isfinite()
    assert bool(affected[0, :, 3, 5].all())
    assert int(affected.sum()) == 9
