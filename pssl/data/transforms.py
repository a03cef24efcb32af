"""Image transforms for training from image-level labels, and from label images: tensors in, tensors out.

Images are uint8 (0..255) or floating (0..1) tensors; results are floating, 0..1 for uint8 input. Randomness
comes from the given `torch.Generator` (on the CPU) alone, and each image takes the same number of draws
whatever their values, so a run can be repeated and image i of a batch does not depend on the others. Resizing
is bilinear with half-pixel centres (``align_corners=False``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pssl.core.errors import InputError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "multi_scale",
    "normalise",
    "random_colours",
    "random_flip",
    "random_labelled_crop",
    "random_resized_crop",
    "to_float",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means of ImageNet's RGB images in 0..1, as torchvision's models expect."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel standard deviations of the same."""
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 → float32 0..1; floating tensors come back as they are. TypeError for other dtypes."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 (0..255) or floating (0..1), got {images.dtype}")
    return images


def normalise(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """(images − mean) / std per channel, for [3,H,W] or [B,3,H,W]; uint8 is first brought to 0..1."""
    images = to_float(images)
    if images.dim() not in (3, 4) or images.shape[-3] != len(mean) or len(mean) != len(std):
        raise InputError(
            f"normalise: images must be [{len(mean)},H,W] or [B,{len(mean)},H,W] for {len(mean)} means and "
            f"{len(std)} deviations, got {list(images.shape)}"
        )
    shape = (-1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def random_flip(images: Tensor, generator: torch.Generator | None = None, probability: float = 0.5) -> Tensor:
    """Mirror each image [B,3,H,W] (or the one image [3,H,W]) left to right with `probability`."""
    if images.dim() == 3:
        return random_flip(images[None], generator, probability)[0]
    flipped = torch.rand(len(images), generator=generator) < probability
    return torch.where(flipped.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)


def random_resized_crop(
    images: Tensor | Sequence[Tensor],
    size: int,
    generator: torch.Generator | None = None,
    *,
    scale: tuple[float, float] = (0.625, 1.25),
    fill: Sequence[float] | float = IMAGENET_MEAN,
) -> Tensor:
    """Resize each image at random, then cut or pad it: [B,3,size,size], or [3,size,size] for one image.

    Args:
        images: [3,H,W], [B,3,H,W], or a sequence of [3,H,W] of any sizes.
        size: side of the square, in pixels.
        scale: range of the resized long side against `size`, drawn uniformly. The default is IRN's long side
            of 320..640 for crops of 512 (Ahn et al. 2019).
        fill: channel values of the padding, 0..1; default ImageNet's mean, which normalises to 0.

    An image smaller than the square is put at a random place of it. Shrinking is antialiased. Raises
    ValueError for an empty batch, other shapes, or a range that is not 0 < low ≤ high.
    """
    if isinstance(images, Tensor) and images.dim() == 3:
        return random_resized_crop([images], size, generator, scale=scale, fill=fill)[0]
    if len(images) == 0 or any(image.dim() != 3 for image in images):
        shapes = [list(image.shape) for image in images]
        raise InputError(f"random_resized_crop: expected images [3,H,W], got shapes {shapes}")
    if not 0 < scale[0] <= scale[1] or size < 1:
        raise InputError(f"random_resized_crop: need 0 < low ≤ high and size ≥ 1, got {scale} and {size}")
    draws = torch.rand(len(images), 3, generator=generator).tolist()
    crops = [
        _crop(to_float(image), size, scale[0] + (scale[1] - scale[0]) * draw[0], draw[1:], fill)
        for image, draw in zip(images, draws, strict=True)
    ]
    return torch.stack(crops)


def random_labelled_crop(
    image: Tensor,  # uint8 or floating [3,H,W]
    labels: Tensor,  # uint8 [H,W]
    size: int,
    generator: torch.Generator | None = None,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    fill: Sequence[float] | float = IMAGENET_MEAN,
    ignore: int = 255,
) -> tuple[Tensor, Tensor]:
    """Image [3,size,size] and labels [size,size], resized, cut or padded, and mirrored half the time, both alike.

    As :func:`random_resized_crop`, with the long side 0.5 to 2 times `size`; labels are resized by nearest pixel, and
    their padding is `ignore`. Raises ValueError for labels of another size than the image's.
    """
    if tuple(labels.shape) != tuple(image.shape[1:]):
        raise InputError(
            f"random_labelled_crop: expected labels of the image's size {list(image.shape[1:])}, "
            f"got {list(labels.shape)}"
        )
    zoom, *position, mirror = torch.rand(4, generator=generator).tolist()
    ratio = scale[0] + (scale[1] - scale[0]) * zoom
    pixels = _crop(to_float(image), size, ratio, position, fill)
    classes = _crop(labels[None], size, ratio, position, ignore, mode="nearest-exact")[0]
    return (pixels.flip(-1), classes.flip(-1)) if mirror < 0.5 else (pixels, classes)


def _crop(
    image: Tensor,
    size: int,
    scale: float,
    draw: list[float],
    fill: Sequence[float] | float,
    mode: str = "bilinear",
) -> Tensor:
    channels, height, width = image.shape
    ratio = size * scale / max(height, width)
    shape = [max(1, round(height * ratio)), max(1, round(width * ratio))]
    if shape != [height, width]:
        antialias = ratio < 1 and mode == "bilinear"
        image = F.interpolate(image[None], size=shape, mode=mode, antialias=antialias)[0]
    out = image.new_empty(channels, size, size)
    out[:] = image.new_tensor(fill).expand(channels).view(-1, 1, 1)
    source, target = [slice(None)], [slice(None)]
    for length, position in zip(shape, draw, strict=True):
        start = min(int(position * (abs(size - length) + 1)), abs(size - length))
        span = min(size, length)
        source.append(slice(start, start + span) if length > size else slice(None))
        target.append(slice(None) if length > size else slice(start, start + span))
    out[tuple(target)] = image[tuple(source)]
    return out


def random_colours(
    image: Tensor,  # [3,H,W] in 0..1
    generator: torch.Generator | None = None,
    strength: Sequence[float] = (0.3, 0.3, 0.3, 0.1),
) -> Tensor:
    """`image` with brightness, contrast, saturation and hue changed at random, in an order drawn at random.

    `strength` are b, c, s, h: the first three are multiplied by a factor of 1 ± b, 1 ± c, 1 ± s, hue is turned by ± h
    of the colour circle; the default is AffinityNet's and SEAM's. Contrast is the distance from the image's mean grey,
    saturation that from each pixel's grey. Values are cut to 0..1 after each. ValueError unless there are four numbers,
    not negative, the last at most 0.5.
    """
    if len(strength) != 4 or min(strength) < 0 or strength[3] > 0.5:
        raise InputError(
            f"random_colours: expected four strengths, the last in 0..0.5, got {tuple(strength)}"
        )
    draws = (torch.rand(4, generator=generator) * 2 - 1).tolist()
    for kind in torch.randperm(4, generator=generator).tolist():
        change = draws[kind] * strength[kind]
        if change == 0:
            continue
        if kind == 3:
            image = _turn_hue(image, change)
            continue
        grey = (image * image.new_tensor(GREY).view(3, 1, 1)).sum(0, keepdim=True)
        towards = (0.0, grey.mean(), grey)[kind]
        image = ((image - towards) * (1 + change) + towards).clamp(0, 1)
    return image


def _turn_hue(image: Tensor, turns: float) -> Tensor:  # [3,H,W] in 0..1
    """The hue of the HSV hexagon turned, value and saturation kept.

    A channel is value - chroma · clamp(min(k, 4 - k), 0, 1) with k = (n + 6·hue) mod 6 and n = 5, 3, 1 for red, green
    and blue.
    """
    value, chroma = image.amax(0), image.amax(0) - image.amin(0)
    red, green, blue = image.unbind(0)
    safe = chroma.clamp(min=1e-12)
    others = torch.where(green == value, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixths = torch.where(red == value, (green - blue) / safe, others)
    k = (image.new_tensor((5.0, 3.0, 1.0)).view(3, 1, 1) + sixths + 6 * turns) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def multi_scale(
    images: Tensor, scales: Sequence[float], *, multiple_of: int = 1, antialias: bool = False
) -> list[Tensor]:
    """`images` [B,3,H,W] resized to each of `scales`, in their order.

    Sides are rounded to the nearest multiple of `multiple_of`, at least one; at an unchanged size the images
    come back as they are. Gradients pass. Without `antialias` (the default, as `F.interpolate`) the result is
    what peers train on. Raises ValueError for a scale that is not positive, TypeError for integer images.
    """
    if not images.is_floating_point():
        raise TypeError(f"multi_scale: images must be floating, got {images.dtype}; see to_float")
    resized = []
    for scale in scales:
        if not scale > 0:
            raise InputError(f"multi_scale: scales must be positive, got {scale}")
        shape = [max(1, round(side * scale / multiple_of)) * multiple_of for side in images.shape[-2:]]
        unchanged = shape == list(images.shape[-2:])
        resized.append(
            images
            if unchanged
            else F.interpolate(images, size=shape, mode="bilinear", align_corners=False, antialias=antialias)
        )
    return resized
