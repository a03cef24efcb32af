"""Backgrounds of the synthetic data set: six sceneries with plain clutter, drawn from noise.

Their colours are muted and their textures fine or streaky, so that an object's body differs from each of
them. All arrays are float32; random draws come from the given generator alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

__all__ = ["SCENERIES", "Clutter", "draw_scenery", "noise"]

Array = np.ndarray
Colour = tuple[float, float, float]


def noise(rng: np.random.Generator, size: int, cells: tuple[int, int], octaves: int = 2) -> Array:
    """Smooth noise [size,size] in about −1..1; `cells` = blobs down and across of the coarsest octave."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        shape = tuple(min(size, max(2, count << octave)) for count in cells)
        grid = rng.uniform(-1, 1, shape).astype(np.float32)
        layer = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
        total += np.asarray(layer) * 0.5**octave
    return total


def colour(rgb: Colour) -> Array:
    """A colour as float32 [3,1,1]. Drawings are [3,H,W]: channels last take numpy twice as long."""
    return np.asarray(rgb, np.float32).reshape(3, 1, 1)


def mix(a: Array | Colour, b: Array | Colour, weight: Array) -> Array:
    """Colours [3,H,W] from `a` (weight 0) to `b` (weight 1), weight [H,W] clamped to 0..1."""
    a, b = (colour(value) if isinstance(value, tuple) else value for value in (a, b))
    return a + (b - a) * np.clip(weight, 0, 1)


def _rows(size: int) -> Array:
    return ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]


def _columns(size: int) -> Array:
    return _rows(size).T


def _meadow(rng: np.random.Generator, n: int) -> Array:
    blades = noise(rng, n, (n // 7, n // 2), 1)
    return mix((0.29, 0.38, 0.19), (0.54, 0.58, 0.33), 0.5 + 0.45 * noise(rng, n, (3, 3)) + 0.4 * blades)


def _sea(rng: np.random.Generator, n: int) -> Array:
    y = _rows(n) ** 0.6  # waves crowd towards the horizon
    crests = np.sin(2 * np.pi * (rng.uniform(9, 13) * y + 0.5 * noise(rng, n, (5, 4))))
    return mix((0.23, 0.35, 0.47), (0.50, 0.60, 0.68), 0.4 + 0.3 * crests + 0.25 * noise(rng, n, (12, 4)))


def _sand(rng: np.random.Generator, n: int) -> Array:
    ripples = np.sin(
        2 * np.pi * (9 * _rows(n) + rng.uniform(-2, 2) * _columns(n) + 0.7 * noise(rng, n, (3, 3)))
    )
    return mix(
        (0.66, 0.58, 0.44),
        (0.84, 0.77, 0.62),
        0.5 + 0.22 * ripples + 0.35 * noise(rng, n, (n // 2, n // 2), 1),
    )


def _stone(rng: np.random.Generator, n: int) -> Array:
    courses = int(rng.integers(6, 9))
    y = _rows(n) * courses + np.zeros((1, n), np.float32)
    row = y.astype(int)
    x = _columns(n) * courses / 1.8 + 0.5 * (row % 2) + rng.uniform(0, 1)
    column = x.astype(int)
    shade = rng.uniform(0.2, 0.9, (courses + 1, courses + 3)).astype(np.float32)[row, column]
    mortar = (np.minimum(y - row, 1) < 0.10) | (x - column < 0.06)
    wall = mix((0.42, 0.41, 0.41), (0.63, 0.61, 0.58), shade + 0.35 * noise(rng, n, (n // 3, n // 3), 1))
    wall[:, mortar] = colour((0.33, 0.32, 0.31))[:, 0]
    return wall


def _wood(rng: np.random.Generator, n: int) -> Array:
    planks = int(rng.integers(4, 7))
    x = _columns(n) * planks + np.zeros((n, 1), np.float32)
    column = x.astype(int)
    tone = rng.uniform(0.25, 0.75, planks + 1).astype(np.float32)[column]
    grain = np.sin(2 * np.pi * (2.6 * x + 0.9 * noise(rng, n, (3, 2 * planks)))) * 0.16 + tone
    floor = mix((0.33, 0.24, 0.16), (0.60, 0.47, 0.33), grain + 0.15 * noise(rng, n, (4, n // 2), 1))
    floor[:, x - column < 0.05] = colour((0.20, 0.14, 0.10))[:, 0]
    return floor


def _snow(rng: np.random.Generator, n: int) -> Array:
    drifts = noise(rng, n, (5, 2), 3)
    return mix(
        (0.66, 0.71, 0.79),
        (0.95, 0.95, 0.95),
        0.65 + 0.5 * drifts + 0.15 * noise(rng, n, (n // 2, n // 2), 1),
    )


# Ground, colours of its clutter, and whether there may be sky above.
SCENERIES: dict[str, tuple[Callable[[np.random.Generator, int], Array], tuple[Colour, ...], bool]]
SCENERIES = {
    "meadow": (_meadow, ((0.20, 0.29, 0.15), (0.45, 0.44, 0.40)), True),
    "sand": (_sand, ((0.55, 0.48, 0.38), (0.45, 0.50, 0.36)), True),
    "sea": (_sea, ((0.36, 0.36, 0.36), (0.85, 0.88, 0.88)), True),
    "snow": (_snow, ((0.30, 0.36, 0.33), (0.52, 0.55, 0.60)), True),
    "stone": (_stone, ((0.28, 0.33, 0.26), (0.50, 0.42, 0.36)), False),
    "wood": (_wood, ((0.72, 0.68, 0.60), (0.30, 0.30, 0.32)), False),
}


def draw_scenery(rng: np.random.Generator, name: str, size: int, oversample: int) -> Array:
    """A background float32 [3,n,n], 0..1, n = size·oversample, with clutter and, outdoors, sometimes a sky.

    Ground and sky are drawn at `size` and enlarged, clutter has the finer outline.
    """
    ground, _, outdoors = SCENERIES[name]
    picture = ground(rng, size)
    if outdoors and rng.random() < 0.5:
        horizon = rng.uniform(0.12, 0.35) + 0.02 * noise(rng, size, (2, 4))[:1]
        haze = _rows(size) / 0.35 + 0.35 * noise(rng, size, (4, 2))
        sky = mix((0.52, 0.66, 0.82), (0.80, 0.86, 0.90), haze)
        picture = mix(sky, picture, (_rows(size) - horizon) * size + 0.5)
    picture = picture.repeat(oversample, 1).repeat(oversample, 2)
    for _ in range(int(rng.integers(1, 5))):
        Clutter(rng, name, size * oversample).paste(picture)
    return picture


class Clutter:
    """A plain bush, boulder or cone somewhere in the drawing; it belongs to no class.

    Attributes: `where`: its window in the drawing (two slices); `shape` bool [h,w].
    """

    def __init__(self, rng: np.random.Generator, name: str, size: int) -> None:
        palette = SCENERIES[name][1]
        base = colour(palette[int(rng.integers(len(palette)))]) * np.float32(rng.uniform(0.85, 1.15))
        radius = float(rng.uniform(0.05, 0.13)) * size
        centre = [float(value) * size for value in rng.uniform(0.05, 0.95, 2)]
        reach = int(1.3 * radius) + 1
        spans = [(max(0, int(c) - reach), min(size, int(c) + reach + 1)) for c in centre]
        self.where = tuple(slice(*span) for span in spans)
        y, x = (np.arange(*span, dtype=np.float32) - c for span, c in zip(spans, centre, strict=True))
        y, x = y[:, None] / radius, x[None] / radius
        rough = noise(rng, 2 * reach + 1, (4, 4), 1)[: y.shape[0], : x.shape[1]]
        if rng.random() < 0.6:
            distance = np.sqrt((y * 1.3) ** 2 + x**2) + 0.18 * rough
        else:
            distance = np.maximum(np.abs(x) * 2.2 - (y + 1) * 0.9 + 1, np.abs(y)) + 0.08 * rough
        self.shape = distance < 1
        light = 1 - 0.35 * np.clip(y - 0.6 * x, -1, 1) + 0.12 * rough
        self._colours = np.clip(base * light, 0, 1)

    def paste(self, picture: Array) -> None:
        """Put it into `picture` [3,size,size], in place."""
        window = picture[(slice(None), *self.where)]
        window[:] = np.where(self.shape, self._colours, window)
