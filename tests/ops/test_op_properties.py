"""Laws that hold whatever the kernel: linearity, additivity, symmetry, scale, independence of the images of
a batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pssl_ext import (
    cam_compare,
    cam_regions,
    cam_sweep,
    dense_crf,
    pixel_refine,
    prototype_contrast,
    prototype_pool,
    random_walk,
)
from pssl_ext.testing import devices


@st.composite
def problems(draw, device="cpu"):
    """(features [B,D,h,w], regions [B,H,W], weights [B,H,W], prototypes [C,D]) in float64, any small
    sizes."""
    sizes = st.integers(1, 6)
    b, d, c, h, w = (draw(s) for s in (st.integers(1, 3), sizes, sizes, sizes, sizes))
    height, width = (h, w) if draw(st.booleans()) else (draw(st.integers(1, 14)), draw(st.integers(1, 14)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    regions = torch.randint(0, c, (b, height, width), generator=g)
    regions[torch.rand(regions.shape, generator=g) < draw(st.sampled_from([0.0, 0.3]))] = 255
    real = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(device)  # noqa: E731
    return real(b, d, h, w), regions.to(device), real(b, height, width).abs(), real(c, d)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", devices())
@given(data=st.data())
def test_pool_is_linear_in_the_weights(device, data):
    features, regions, weights, prototypes = data.draw(problems(device))
    c = len(prototypes)
    other = weights.flip(-1)
    for mixed, first, second in zip(
        *(prototype_pool(features, regions, c, weights=w) for w in (2 * weights - 3 * other, weights, other)),
        strict=True,
    ):
        close(mixed, 2 * first - 3 * second)


@pytest.mark.parametrize("device", devices())
@given(data=st.data())
def test_pooled_regions_add(device, data):
    """All regions united sum to the sum of their sums; without normalisation that is linear in the features
    too."""
    features, regions, weights, prototypes = data.draw(problems(device))
    united = torch.where(regions == 255, 255, 0)
    parts, mass = prototype_pool(features, regions, len(prototypes), weights=weights)
    whole, whole_mass = prototype_pool(features, united, 1, weights=weights)
    close(parts.sum(1), whole[:, 0])
    close(mass.sum(1), whole_mass[:, 0])
    plain = dict(num_regions=1, weights=weights, normalize=False)
    close(
        prototype_pool(features + features.flip(1), united, **plain)[0],
        prototype_pool(features, united, **plain)[0] + prototype_pool(features.flip(1), united, **plain)[0],
    )


@pytest.mark.parametrize("device", devices())
@given(data=st.data())
def test_renumbered_regions(device, data):
    """Another order of the classes is another order of the rows, and the same loss."""
    features, regions, weights, prototypes = data.draw(problems(device))
    c = len(prototypes)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(c)).to(device)
    renumbered = torch.where(regions == 255, 255, order[torch.where(regions == 255, 0, regions)])
    for before, after in zip(
        prototype_pool(features, regions, c), prototype_pool(features, renumbered, c), strict=True
    ):
        close(after[:, order], before)
    moved = torch.empty_like(prototypes)
    moved[order] = prototypes
    close(
        prototype_contrast(features, moved, renumbered, weights=weights),
        prototype_contrast(features, prototypes, regions, weights=weights),
    )


@pytest.mark.parametrize("device", devices())
@given(data=st.data(), factor=st.floats(0.01, 100))
def test_contrast_is_a_matter_of_directions(device, data, factor):
    features, regions, _, prototypes = data.draw(problems(device))
    scaled = (
        prototypes * torch.linspace(factor, 1, len(prototypes), device=device, dtype=torch.float64)[:, None]
    )
    close(
        prototype_contrast(features * factor, scaled, regions),
        prototype_contrast(features, prototypes, regions),
    )


@pytest.mark.parametrize("device", devices())
@given(data=st.data())
def test_soft_masks_of_labels_are_labels(device, data):
    features, regions, weights, prototypes = data.draw(problems(device))
    c = len(prototypes)
    masks = torch.stack([regions == k for k in range(c)], 1).double()
    for soft, hard in zip(
        prototype_pool(features, masks, c, weights=weights),
        prototype_pool(features, regions, c, weights=weights),
        strict=True,
    ):
        close(soft, hard)


@pytest.mark.parametrize("device", devices())
@given(data=st.data())
def test_images_do_not_see_each_other(device, data):
    features, regions, weights, prototypes = data.draw(problems(device))
    c = len(prototypes)
    sums, mass = prototype_pool(features, regions, c, weights=weights)
    loss = prototype_contrast(features, prototypes, regions, weights=weights, reduction="none")
    for n in range(len(features)):
        one = slice(n, n + 1)
        alone = prototype_pool(features[one], regions[one], c, weights=weights[one])
        close(alone[0], sums[one])
        close(alone[1], mass[one])
        options = dict(weights=weights[one], reduction="none")
        close(prototype_contrast(features[one], prototypes, regions[one], **options), loss[one])


@given(
    labels=st.lists(st.integers(0, 1), min_size=3, max_size=3),
    foreground=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
)
def test_a_region_mask_names_present_classes_only(labels, foreground, seed):
    cams = torch.randn(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    options = dict(size=(9, 7), foreground=foreground, background=foreground / 2)
    mask = cam_regions([cams], torch.tensor([labels]), **options)
    allowed = {0, 255} | {k + 1 for k, present in enumerate(labels) if present}
    assert set(mask.unique().tolist()) <= allowed
    # the threshold is a share of the class's maximum, so that a factor changes nothing (but the 1e-5 under
    # it)
    assert (cam_regions([cams * 8], torch.tensor([labels]), **options) != mask).float().mean() < 0.05


@given(seed=st.integers(0, 99), thresholds=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=6))
def test_a_sweep_counts_every_pixel_once(seed, thresholds):
    g = torch.Generator().manual_seed(seed)
    cam, truth = torch.rand(2, 5, 4, generator=g), torch.randint(0, 4, (5, 4), generator=g)
    counts = cam_sweep(cam, torch.tensor([3, 1]), truth, thresholds, 4)
    assert (counts.sum(2) == torch.bincount(truth.flatten(), minlength=4)).all()
    background = counts[:, :, 0].sum(1)[torch.tensor(thresholds).argsort()]
    assert (background.diff() >= 0).all(), "a higher threshold leaves more background"


sides = st.integers(1, 9)


@pytest.mark.parametrize("device", devices())
@given(h=sides, w=sides, factor=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_compared_maps_have_one_scale(device, h, w, factor, seed):
    """The attention is a cosine, so that a factor on all maps is one on the loss; the support maps have no order."""
    g = torch.Generator().manual_seed(seed)
    real = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(device)  # noqa: E731
    main, support = [real(2, 3, h, w), real(2, 3, 4, 5)], [real(2, 3, 5, 4), real(2, 3, w, h)]
    labels = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
    loss = cam_compare(main, support, labels, size=(6, 7))
    close(cam_compare(main, support[::-1], labels, size=(6, 7)), loss)
    scaled = [[factor * t for t in maps] for maps in (main, support)]
    close(cam_compare(*scaled, labels, size=(6, 7)), factor * loss)
    assert cam_compare(main[:1], main[:1], labels, size=(6, 7), attention="none") == 0


@pytest.mark.parametrize("device", devices())
@given(h=sides, w=sides, steps=st.integers(0, 6), seed=st.integers(0, 99), by_edge=st.booleans())
def test_a_walk_is_linear_and_keeps_constants(device, h, w, steps, seed, by_edge):
    g = torch.Generator().manual_seed(seed)
    real = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64).to(device)  # noqa: E731
    cams = real(2, h, w)
    if by_edge:
        edge = real(h, w) / 2
        start = 1 / (1 - edge)  # the walk multiplies by 1 - edge first
        walk = lambda maps: random_walk(maps, edge, radius=3, log2_steps=steps)  # noqa: E731
    else:
        features, start = real(4, h, w), torch.ones(h, w, dtype=torch.float64, device=device)
        walk = lambda maps: random_walk(maps, features=features, radius=3, log2_steps=steps)  # noqa: E731
    close(walk(2 * cams[:1] - 3 * cams[1:]), 2 * walk(cams)[:1] - 3 * walk(cams)[1:])
    close(walk(start[None]), torch.ones_like(start)[None])


@pytest.mark.parametrize("device", devices())
@given(h=sides, w=sides, factor=st.floats(0.5, 255), offset=st.floats(-1, 1), seed=st.integers(0, 99))
def test_refinement_is_linear_in_the_masks(device, h, w, factor, offset, seed):
    """And blind to the scale of the colours."""
    g = torch.Generator().manual_seed(seed)
    real = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64).to(device)  # noqa: E731
    images, masks = real(1, 3, h, w), real(1, 2, 4, 3)
    settings = dict(dilations=(1, 3), iterations=3)
    refined = pixel_refine(images, masks, **settings)
    mixed = pixel_refine(images, 2 * masks[:, :1] - 3 * masks[:, 1:], **settings)
    close(mixed, 2 * refined[:, :1] - 3 * refined[:, 1:])
    close(pixel_refine(images, torch.ones_like(masks), **settings), torch.full_like(refined, 1.01**3))
    again = pixel_refine(factor * images + offset, masks, **settings)
    torch.testing.assert_close(again, refined, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", devices())
@given(h=sides, w=sides, c=st.integers(1, 5), iterations=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_crf_knows_no_order_of_classes(device, h, w, c, iterations, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (1, 3, h, w), generator=g, dtype=torch.uint8).to(device)
    given = torch.randn(1, c, h, w, generator=g, dtype=torch.float64).softmax(1).to(device)
    refined = dense_crf(images, given, iterations=iterations)
    close(refined.sum(1), torch.ones_like(refined[:, 0]))
    order = torch.randperm(c, generator=g).to(device)
    close(dense_crf(images, given[:, order], iterations=iterations), refined[:, order])
