"""One image of the synthetic data set: scenery, objects, occluder, light, noise; and its exact labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .creatures import CLASSES, Pose, Sprite
from .scenery import SCENERIES, Clutter, draw_scenery, noise

__all__ = ["SyntheticImage", "draw_image"]

Array = np.ndarray

OVERSAMPLE = 2  # drawn at twice the size, then averaged: soft edges as a lens makes them
SCENERY_CHANCE = 0.8  # how often an image has its first object's own scenery
MIN_IN_FRAME = 0.75  # of an object's area
MIN_VISIBLE = 0.55  # of an object's area, and of its part, behind others


@dataclass(frozen=True)
class SyntheticImage:
    """An image and what is in it; instance i is of class ``classes[i]`` and i + 1 in `instances`."""

    image: Array  # uint8 [H,W,3] RGB
    instances: Array  # uint8 [H,W], 0 background
    parts: Array  # uint8 [H,W]: 0 background, 1 part, 2 body
    classes: tuple[str, ...]
    truncated: tuple[bool, ...]  # by the frame
    occluded: tuple[bool, ...]  # by another object or by clutter
    facing: tuple[str, ...]  # VOC's pose: Left or Right


class _Canvas:
    """Layers at drawing size (colours, instance numbers, parts) and each object's full area."""

    def __init__(self, picture: Array) -> None:
        self.size = picture.shape[1]
        self.picture = picture
        self.instances = np.zeros(picture.shape[1:], np.uint8)
        self.parts = np.zeros(picture.shape[1:], np.uint8)
        self.areas: list[Array] = []  # [2] pixels of part and body when unhidden, for each object
        self.in_frame: list[float] = []
        self.names: list[str] = []
        self.facing: list[float] = []

    def visible(self, covered: Array) -> Array:
        """Fractions [objects,2] of part and of whole object that stay visible once `covered` is covered."""
        left = np.bincount((self.instances * 3 + self.parts)[~covered], minlength=3 * len(self.areas) + 3)
        left = left.reshape(-1, 3)[1 : len(self.areas) + 1, 1:].astype(float)
        areas = np.asarray(self.areas, float).reshape(-1, 2)
        return np.stack([left[:, 0] / areas[:, 0], left.sum(1) / areas.sum(1)], 1)

    def place(self, rng: np.random.Generator, sprite: Sprite, name: str, uniform: bool) -> bool:
        """Put the object in front of the others, unless it or one of them would show too little."""
        height, width = sprite.parts.shape
        top, left = max(0, sprite.top), max(0, sprite.left)
        bottom, right = min(self.size, sprite.top + height), min(self.size, sprite.left + width)
        inner = (slice(top - sprite.top, bottom - sprite.top), slice(left - sprite.left, right - sprite.left))
        outer = (slice(top, bottom), slice(left, right))
        area = np.bincount(sprite.parts.ravel(), minlength=3)[1:]
        shown = np.bincount(sprite.parts[inner].ravel(), minlength=3)[1:]
        if shown.sum() < MIN_IN_FRAME * area.sum() or shown[0] < MIN_IN_FRAME * area[0]:
            return False
        parts = np.zeros_like(self.parts)
        parts[outer] = sprite.parts[inner]
        covered = parts > 0
        if self.areas and (self.visible(covered) < MIN_VISIBLE).any():
            return False
        self._shadow(covered)
        window = self.picture[(slice(None), *outer)]
        window[:] = np.where(covered[outer], sprite.paint(rng, uniform)[(slice(None), *inner)], window)
        self.areas.append(area)
        self.in_frame.append(float(shown.sum() / area.sum()))
        self.names.append(name)
        self.facing.append(sprite.pose.facing)
        self.instances[covered] = len(self.areas)
        self.parts[covered] = parts[covered]
        return True

    def _shadow(self, covered: Array) -> None:
        reach = max(1, int(0.1 * np.sqrt(covered.sum())))
        moved = np.zeros(covered.shape, np.uint8)
        moved[reach:] = covered[:-reach] * np.uint8(255)
        soft = Image.fromarray(moved).filter(ImageFilter.BoxBlur(reach))
        self.picture *= 1 - 0.4 * np.asarray(soft, np.float32) / 255

    def occlude(self, clutter: Clutter) -> None:
        """Put clutter in front, unless an object would show too little."""
        covered = np.zeros(self.parts.shape, bool)
        covered[clutter.where] = clutter.shape
        if (self.visible(covered) < MIN_VISIBLE).any():
            return
        clutter.paste(self.picture)
        self.instances[covered] = 0
        self.parts[covered] = 0


def draw_image(rng: np.random.Generator, size: int, uniform: bool) -> SyntheticImage:
    """Draw one image of `size`² pixels; everything random comes from `rng`."""
    names = list(CLASSES)
    first = names[int(rng.integers(len(names)))]
    wanted = [first]
    for _ in range(int(rng.choice([0, 1, 2], p=[0.45, 0.35, 0.20]))):
        wanted.append(first if rng.random() < 0.2 else names[int(rng.integers(len(names)))])
    at_home = rng.random() < SCENERY_CHANCE
    scenery = CLASSES[first].scenery if at_home else list(SCENERIES)[int(rng.integers(len(SCENERIES)))]
    canvas = _Canvas(draw_scenery(rng, scenery, size, OVERSAMPLE))
    for name in wanted:
        for attempt in range(40):
            pose = _pose(rng, canvas.size, crowd=len(wanted), shrink=0.98**attempt)
            if canvas.place(rng, Sprite(rng, name, pose), name, uniform):
                break
    if rng.random() < 0.35:
        canvas.occlude(Clutter(rng, scenery, canvas.size))
    visible = canvas.visible(np.zeros(canvas.instances.shape, bool))[:, 1]
    instances, parts = _reduce_labels(canvas)
    return SyntheticImage(
        image=_photograph(rng, canvas.picture, size),
        instances=instances,
        parts=parts,
        classes=tuple(canvas.names),
        truncated=tuple(fraction < 0.98 for fraction in canvas.in_frame),
        occluded=tuple(bool(v < f - 0.05) for v, f in zip(visible, canvas.in_frame, strict=True)),
        facing=tuple("Right" if facing > 0 else "Left" for facing in canvas.facing),
    )


def _pose(rng: np.random.Generator, size: int, crowd: int, shrink: float) -> Pose:
    low, high = ((0.28, 0.48), (0.24, 0.38), (0.20, 0.32))[crowd - 1]  # half-length against the image
    half_length = size * shrink * float(np.exp(rng.uniform(np.log(low), np.log(high))))
    margin = min(0.45, 0.6 * half_length / size)
    centre = rng.uniform(margin, 1 - margin, 2) * size
    return Pose(
        centre=(float(centre[0]), float(centre[1])),
        half_length=half_length,
        angle=float(np.clip(rng.normal(0, 0.4), -1.2, 1.2)),
        facing=1.0 if rng.random() < 0.5 else -1.0,
        stretch=float(rng.uniform(0.85, 1.15)),
        bend=float(rng.uniform(-0.15, 0.15)),
    )


def _reduce_labels(canvas: _Canvas) -> tuple[Array, Array]:
    """Labels at image size: the instance with most sub-pixels, then part or body by most of its own."""
    size, count = canvas.size // OVERSAMPLE, len(canvas.areas) + 1
    cell = np.arange(canvas.size) // OVERSAMPLE
    codes = (cell[:, None] * size + cell) * (3 * count) + canvas.instances * 3 + canvas.parts
    votes = np.bincount(codes.ravel(), minlength=size * size * 3 * count).reshape(size, size, count, 3)
    instances = votes.sum(-1).argmax(-1)
    own = np.take_along_axis(votes, instances[..., None, None], 2)[:, :, 0]
    parts = np.where(instances == 0, 0, np.where(own[..., 1] >= own[..., 2], 1, 2))
    return instances.astype(np.uint8), parts.astype(np.uint8)


def _photograph(rng: np.random.Generator, picture: Array, size: int) -> Array:
    """Average down to `size`, then light, lens and sensor: gain, colour cast, gradient, blur, noise."""
    small = picture.reshape(3, size, OVERSAMPLE, size, OVERSAMPLE).sum(4).sum(2) * np.float32(OVERSAMPLE**-2)
    small = np.clip(small, 0, 1) ** np.float32(rng.uniform(0.85, 1.2))
    small *= (rng.uniform(0.75, 1.15) * (1 + rng.normal(0, 0.04, (3, 1, 1)))).astype(np.float32)
    small *= 1 + np.float32(rng.uniform(0, 0.22)) * np.clip(noise(rng, size, (2, 2), 1), -1, 1)
    grain = rng.normal(0, 255 * rng.uniform(0.008, 0.03), (size, size, 3))
    pixels = np.clip(small.transpose(1, 2, 0) * 255, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        pixels = np.asarray(
            Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.8))))
        )
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)
