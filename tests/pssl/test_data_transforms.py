"""Training transforms: values, shapes, and randomness that repeats."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pssl.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    multi_scale,
    normalise,
    random_flip,
    random_resized_crop,
    to_float,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalise() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
    expected = [(v - m) / s for v, m, s in zip((0, 0.2, 1), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    torch.testing.assert_close(normalise(image)[:, 0, 0], torch.tensor(expected))
    torch.testing.assert_close(normalise(torch.stack([image, image]))[1], normalise(image))
    with pytest.raises(ValueError, match=r"got \[1, 2, 2\]"):
        normalise(image[:1])
    with pytest.raises(TypeError, match="uint8"):
        to_float(torch.zeros(3, 1, 1, dtype=torch.int64))


def test_flip_is_by_image_and_repeats() -> None:
    images = torch.arange(64 * 3 * 2 * 4, dtype=torch.float32).view(64, 3, 2, 4)
    flipped = random_flip(images, seeded())
    assert torch.equal(flipped, random_flip(images, seeded()))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 16 < int(same.sum()) < 48
    assert torch.equal(random_flip(images, probability=1.0), images.flip(-1))
    assert torch.equal(random_flip(images[0], probability=0.0), images[0])


@settings(deadline=None)  # a shared machine may stall in any one example
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    size=st.integers(1, 32),
    seed=st.integers(0, 1000),
)
def test_crop_shapes_range_and_repeatability(sizes: list[tuple[int, int]], size: int, seed: int) -> None:
    images = [torch.rand(3, *shape, generator=seeded(i)) for i, shape in enumerate(sizes)]
    crops = random_resized_crop(images, size, seeded(seed), scale=(0.3, 2.5))
    assert crops.shape == (len(sizes), 3, size, size)
    assert crops.min() >= -1e-4
    assert crops.max() <= 1 + 1e-4
    assert torch.equal(crops, random_resized_crop(images, size, seeded(seed), scale=(0.3, 2.5)))
    # The first image's crop does not depend on the others.
    assert torch.equal(crops[:1], random_resized_crop(images[:1], size, seeded(seed), scale=(0.3, 2.5)))


def test_crop_keeps_an_image_that_fits() -> None:
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(random_resized_crop(images, 16, scale=(1, 1)), images)
    small = random_resized_crop(images[0], 32, seeded(), scale=(0.5, 0.5), fill=(1.0, 2.0, 3.0))
    inside = (small == torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)).all(0).logical_not()
    assert int(inside.sum()) == 256
    assert torch.equal(small[:, inside].view(3, 16, 16), images[0])


def test_crop_reaches_every_place() -> None:
    ramp = torch.arange(8.0).view(1, 1, 8).expand(3, 8, 8)
    starts = {int(random_resized_crop(ramp / 8, 4, seeded(i), scale=(2, 2))[0, 0, 0] * 8) for i in range(200)}
    assert starts == {0, 1, 2, 3, 4}


def test_crop_padding_normalises_to_zero() -> None:
    crop = normalise(random_resized_crop(torch.ones(3, 4, 4), 8, seeded(), scale=(0.5, 0.5)))
    assert int((crop.abs() < 1e-6).all(0).sum()) == 48


@pytest.mark.parametrize("scale", [(0, 1), (2, 1)])
def test_crop_refuses_wrong_arguments(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 < low"):
        random_resized_crop(torch.rand(3, 4, 4), 4, scale=scale)
    with pytest.raises(ValueError, match="expected images"):
        random_resized_crop([], 4)


def test_multi_scale() -> None:
    images = torch.rand(2, 3, 24, 20, requires_grad=True)
    half, same, double = multi_scale(images, (0.5, 1, 2))
    assert same is images
    assert torch.equal(half, F.interpolate(images, size=(12, 10), mode="bilinear", align_corners=False))
    assert double.shape == (2, 3, 48, 40)
    double.sum().backward()
    assert images.grad is not None
    assert [list(out.shape[-2:]) for out in multi_scale(images, (0.3, 1), multiple_of=8)] == [
        [8, 8],
        [24, 16],
    ]
    with pytest.raises(ValueError, match="positive"):
        multi_scale(images, (0,))
    with pytest.raises(TypeError, match="floating"):
        multi_scale(images.byte(), (1,))
