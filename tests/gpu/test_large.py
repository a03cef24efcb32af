"""Tensors of more than 2^31 elements on the GPU. What is at the far end gives what it gives alone.

The largest of these take some 40 GiB of the GPU's memory.
"""

import pytest
import torch

import pssl_ext

pytestmark = pytest.mark.gpu
MANY = 2**31


def random(*shape, dtype=torch.bfloat16):
    """Filled entry by entry: random numbers for all of it at once would double the memory."""
    torch.manual_seed(47)
    made = torch.empty(shape, dtype=dtype, device="cuda")
    for part in made:
        part.uniform_(0.1, 1)
    return made


@pytest.fixture(autouse=True)
def memory():
    yield
    torch.cuda.empty_cache()


def labels(count, side):
    g = torch.Generator().manual_seed(43)
    return torch.randint(0, 3, (count, side, side), generator=g, dtype=torch.uint8).cuda()


def assert_near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def gradient(outputs, features):
    (grad,) = torch.autograd.grad(outputs.sum(), features)
    return grad


def test_prototype_pool():
    features, regions = random(520, 64, 256, 256).requires_grad_(), labels(520, 256)
    assert features.numel() > MANY
    sums, mass = pssl_ext.prototype_pool(features, regions, 3, backend="native")
    grad = gradient(sums[-1], features)[-1:]
    last = features.detach()[-1:].clone().requires_grad_()
    alone, own_mass = pssl_ext.prototype_pool(last, regions[-1:], 3, backend="native")
    assert_near(sums[-1:], alone)
    assert_near(mass[-1:], own_mass)
    assert_near(grad, gradient(alone, last))


def test_prototype_contrast():
    features, regions = random(520, 64, 256, 256).requires_grad_(), labels(520, 256)
    prototypes = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)).cuda()
    more = dict(reduction="none", backend="native")
    loss = pssl_ext.prototype_contrast(features, prototypes, regions, **more)
    grad = gradient(loss[-1], features)[-1:]
    last = features.detach()[-1:].clone().requires_grad_()
    alone = pssl_ext.prototype_contrast(last, prototypes, regions[-1:], **more)
    assert_near(loss[-1:], alone)
    assert_near(grad, gradient(alone, last))


def test_cam_compare():
    main, support = random(65, 32, 1024, 1024).requires_grad_(), random(65, 32, 8, 8)
    present = torch.zeros(65, 32, device="cuda")
    present[-1] = 1
    more = dict(size=(1000, 1000), reduction="none", backend="native")
    losses = pssl_ext.cam_compare([main], [support], present, **more)
    grad = gradient(losses, main)[-1:]
    last = main.detach()[-1:].clone().requires_grad_()
    alone = pssl_ext.cam_compare([last], [support[-1:]], present[-1:], **more)
    assert_near(losses[-1:], alone)
    assert_near(grad, gradient(alone, last))


def test_cam_regions():
    cams, present = random(65, 32, 1024, 1024), torch.ones(65, 32, device="cuda")
    more = dict(size=(300, 300), foreground=0.9, background=0.5, backend="native")
    regions = pssl_ext.cam_regions([cams], present, **more)
    assert torch.equal(regions[-1:], pssl_ext.cam_regions([cams[-1:]], present[-1:], **more))
    assert regions[-1].unique().numel() > 2


def test_cam_sweep():
    """The last class is the largest everywhere."""
    cams, ids = random(33, 8192, 8192), torch.arange(1, 34, device="cuda")
    cams[-1] += 1
    truth = torch.randint(0, 34, (500, 500), generator=torch.Generator().manual_seed(3)).cuda()
    more = dict(thresholds=[1.2, 1.5], num_regions=34, backend="native")
    counts = pssl_ext.cam_sweep(cams, ids, truth, **more)
    assert torch.equal(counts, pssl_ext.cam_sweep(cams[-1:], ids[-1:], truth, **more))


def test_random_walk():
    cams, edge = random(2060, 1024, 1024), random(1024, 1024, dtype=torch.float32) ** 4
    more = dict(radius=2, log2_steps=1, backend="native")
    walked = pssl_ext.random_walk(cams, edge, **more)
    assert torch.equal(walked[-1:], pssl_ext.random_walk(cams[-1:], edge, **more))


def test_pixel_refine():
    images, masks = random(1, 3, 1024, 1024), random(1, 2060, 1024, 1024)
    more = dict(dilations=(1, 3), iterations=2, backend="native")
    refined = pssl_ext.pixel_refine(images, masks, **more)
    assert torch.equal(refined[:, -1:], pssl_ext.pixel_refine(images, masks[:, -1:], **more))


def test_dense_crf_of_many_images():
    images = torch.randint(0, 256, (520, 3, 64, 64), generator=torch.Generator().manual_seed(2)).byte().cuda()
    probabilities = random(520, 1024, 64, 64)
    more = dict(iterations=1, gaussian=(3.0, 0.5), bilateral=(15.0, 25.0, 1.0), backend="native")
    refined = pssl_ext.dense_crf(images, probabilities, **more)
    assert torch.equal(refined[-1:], pssl_ext.dense_crf(images[-1:], probabilities[-1:], **more))


def test_dense_crf_of_many_vertices_and_classes():
    """Room for more than 2^31 values on the vertices; classes of equal probability stay equal."""
    images = torch.randint(0, 256, (1, 3, 512, 512), generator=torch.Generator().manual_seed(2)).byte().cuda()
    probabilities = random(1, 2, 512, 512).repeat(1, 700, 1, 1)
    assert 6 * 512 * 512 * probabilities.shape[1] > MANY
    more = dict(iterations=1, gaussian=(3.0, 0.5), bilateral=(15.0, 25.0, 1.0), backend="native")
    refined = pssl_ext.dense_crf(images, probabilities, **more)
    for first in (0, 698):
        assert torch.equal(refined[:, first : first + 2], refined[:, 2:4])
    assert_near(refined.sum(1), torch.ones_like(refined[:, 0]))
