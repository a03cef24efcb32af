"""Objects of the synthetic data set: a large plain body with a small part that tells the class.

An object lives in its own coordinates: u along its length from −1 (tail) to 1 (tip of the part), v across.
The part is a disc-like badge of radius `PART_RADIUS` at `PART_CENTRE`, in front of the body. There are two
kinds of body, each shared by three classes: a body says little, only the part says which class. With three
kinds, each shared by two, a classifier took the body as a hint, and its CAMs covered most of the object.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scenery import Colour, colour, mix

__all__ = ["CLASSES", "Pose", "Sprite"]

Array = np.ndarray

PART_CENTRE, PART_RADIUS = 0.58, 0.40


@dataclass(frozen=True)
class Pose:
    """Where and how an object stands. Lengths in pixels of the drawing, angles in radians."""

    centre: tuple[float, float]  # y, x
    half_length: float
    angle: float
    facing: float  # 1: the part to the right, −1: to the left
    stretch: float  # height against the standard height
    bend: float


def _angle(a: Array, b: Array) -> Array:
    return np.arctan2(b, a)


# Parts: (a, b) in −1..1 → (is it part of the badge, which of three colours).
def _disc(a: Array, b: Array) -> tuple[Array, Array]:
    rho = np.hypot(a, b)
    return rho < 1, (rho * 3.2).astype(int) % 2


def _fan(a: Array, b: Array) -> tuple[Array, Array]:
    sector = np.floor((_angle(a, b) / (2 * np.pi) + 0.5) * 8).astype(int)
    return np.hypot(a, b) < 1, sector % 2


def _flower(a: Array, b: Array) -> tuple[Array, Array]:
    rho, petals = np.hypot(a, b), np.abs(np.cos(3 * _angle(a, b)))
    return rho < 0.62 + 0.45 * petals, np.where(rho < 0.38, 1, np.where(rho < 0.3 + 0.4 * petals, 0, 2))


def _gear(a: Array, b: Array) -> tuple[Array, Array]:
    rho = np.hypot(a, b)
    return rho < 0.86 + 0.18 * np.sign(np.cos(8 * _angle(a, b))), np.where(
        rho < 0.28, 2, np.where(rho < 0.6, 1, 0)
    )


def _shield(a: Array, b: Array) -> tuple[Array, Array]:
    inside = np.maximum(np.abs(a), np.abs(b)) < 0.9
    return inside, (np.floor(a / 0.45).astype(int) + np.floor(b / 0.45).astype(int)) % 2


def _star(a: Array, b: Array) -> tuple[Array, Array]:
    rho = np.hypot(a, b)
    wedge = np.abs((_angle(a, b) / (2 * np.pi) * 5 + 0.25) % 1 - 0.5) * 2  # 0 at a ray's tip, 1 between rays
    return rho < 1, (rho < 0.92 - 0.55 * wedge).astype(int)


# Bodies' outlines: (u, v) from the body's middle → how far out, 1 at the outline.
def _egg(u: Array, v: Array) -> Array:
    return np.sqrt((u / 0.72) ** 2 + (v / 0.50) ** 2)


def _barrel(u: Array, v: Array) -> Array:
    return np.sqrt(np.hypot((u / 0.72) ** 2, (v / 0.43) ** 2))


# Bodies' patterns: (u, v) in periods → 0..1 between two colours.
def _scales(u: Array, v: Array) -> Array:
    row = np.floor(v * 1.25)
    across = (u + 0.5 * (row % 2)) % 1 - 0.5
    return np.clip(np.hypot(across * 2, v * 1.25 - row) * 2.2 - 1.3, 0, 1)


def _stripes(u: Array, v: Array) -> Array:
    return np.clip(0.5 + 0.9 * np.sin(2 * np.pi * (u + 0.35 * np.abs(v))), 0, 1)


@dataclass(frozen=True)
class _Body:
    outline: Callable[[Array, Array], Array]
    pattern: Callable[[Array, Array], Array]
    colours: tuple[Colour, Colour]
    period: float  # of the pattern, in half-lengths of the object


@dataclass(frozen=True)
class CreatureClass:
    """How one class looks and where it is mostly seen."""

    badge: Callable[[Array, Array], tuple[Array, Array]]
    colours: tuple[Colour, Colour, Colour]
    body: _Body
    scenery: str


_VIOLET = _Body(_egg, _scales, ((0.47, 0.29, 0.60), (0.68, 0.52, 0.80)), 0.30)
_CORAL = _Body(_barrel, _stripes, ((0.80, 0.40, 0.31), (0.58, 0.20, 0.19)), 0.36)

# In alphabetical order, as label indices are. Each prefers a scenery of its own.
CLASSES: dict[str, CreatureClass] = {
    "disc": CreatureClass(_disc, ((0.93, 0.92, 0.88), (0.78, 0.10, 0.14), (0, 0, 0)), _VIOLET, "meadow"),
    "fan": CreatureClass(_fan, ((0.10, 0.10, 0.12), (0.96, 0.78, 0.14), (0, 0, 0)), _VIOLET, "sea"),
    "flower": CreatureClass(
        _flower, ((0.93, 0.45, 0.68), (0.98, 0.82, 0.20), (0.72, 0.22, 0.50)), _VIOLET, "sand"
    ),
    "gear": CreatureClass(
        _gear, ((0.24, 0.26, 0.30), (0.72, 0.74, 0.76), (0.16, 0.17, 0.20)), _CORAL, "stone"
    ),
    "shield": CreatureClass(_shield, ((0.14, 0.24, 0.66), (0.90, 0.92, 0.95), (0, 0, 0)), _CORAL, "snow"),
    "star": CreatureClass(_star, ((0.12, 0.13, 0.30), (0.98, 0.84, 0.25), (0, 0, 0)), _CORAL, "wood"),
}


class Sprite:
    """An object of class `name` in pose `pose`: its outline at once, its colours when `paint` is called.

    Apart, because most outlines are drawn only to find that the object would not fit.

    Attributes: `top`, `left`: the window's place in the drawing, in pixels, may be negative. `parts` uint8
    [h,w]: 0 nothing, 1 discriminative part, 2 body.
    """

    def __init__(self, rng: np.random.Generator, name: str, pose: Pose) -> None:
        self.kind, self.pose = CLASSES[name], pose
        reach = int(np.ceil(1.15 * pose.half_length))
        self.top, self.left = int(pose.centre[0]) - reach, int(pose.centre[1]) - reach
        span = np.arange(2 * reach + 1, dtype=np.float32)
        self._y = (span + (self.top - pose.centre[0]))[:, None]
        x = (span + (self.left - pose.centre[1]))[None]
        cos, sin = math.cos(pose.angle), math.sin(pose.angle)
        self._u = (x * cos + self._y * sin) / (pose.half_length * pose.facing)
        self._v = (self._y * cos - x * sin) / pose.half_length
        spin = float(rng.uniform(-0.5, 0.5))
        a, b = (self._u - PART_CENTRE) / PART_RADIUS, (self._v - pose.bend * 0.25) / PART_RADIUS
        self._a, self._b = a * math.cos(spin) - b * math.sin(spin), a * math.sin(spin) + b * math.cos(spin)
        badge, self._tone = self.kind.badge(self._a, self._b)
        self._body_v = (self._v - pose.bend * (self._u**2 - 0.2)) / pose.stretch
        self._out = self.kind.body.outline(self._u + 0.27, self._body_v)
        self.parts = np.where(badge, 1, np.where(self._out < 1, 2, 0)).astype(np.uint8)

    def paint(self, rng: np.random.Generator, uniform: bool) -> Array:
        """Colours float32 [3,h,w], 0..1; with `uniform`, the class pattern covers the whole object."""
        body = self.kind.body
        badge_colours = np.asarray(self.kind.colours, np.float32).T  # [3, tones]
        shift_u, shift_v = (float(value) for value in rng.uniform(0, 1, 2))
        period = body.period * float(rng.uniform(0.88, 1.14))
        tint = (1 + rng.normal(0, 0.04, 3)).astype(np.float32).reshape(3, 1, 1)
        if uniform:
            pitch = 1.25 * PART_RADIUS
            tile_a = ((self._u / pitch + shift_u) % 1 - 0.5) * 2.1
            tile_b = ((self._v / pitch + shift_v) % 1 - 0.5) * 2.1
            inside, tone = self.kind.badge(tile_a, tile_b)
            between = colour(self.kind.colours[0]) * np.float32(0.8)
            return self._light(np.where(inside, badge_colours[:, tone], between), self._out)
        # Body colours wander a little from object to object, and stay far from every scenery.
        pattern = body.pattern(self._u / period + shift_u, self._body_v / period + shift_v)
        plain = mix(colour(body.colours[0]) * tint, colour(body.colours[1]) * tint, pattern)
        badge = self._light(badge_colours[:, self._tone], np.hypot(self._a, self._b) * 0.8)
        return np.where(self.parts == 1, badge, self._light(plain, self._out))

    def _light(self, colours: Array, out: Array) -> Array:
        """Light from above on a rounded thing: darker towards its edge and its underside."""
        edge = np.clip(out, 0, 1)
        light = 1.08 - 0.30 * edge * edge * edge - (0.18 / self.pose.half_length) * self._y
        return np.clip(colours * light, 0, 1)
