"""Series of numbers for the charts of a report: thinned to what is seen, and smoothed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 240  # of a line; a chart is about as many screen pixels wide as two of them need


@dataclass(frozen=True)
class Series:
    """One line, or one colour of bars. None is a gap in `y`."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int | None = None
    """Number of the colour in the style sheet. None: the place of the series in its chart."""


def with_gaps(values: Sequence[float | None]) -> np.ndarray:
    """Return the values as float64 [n]; NaN where there is none, or none that is finite."""
    numbers = np.array(values, np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the numbers among the values, NaN where there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points of a line, float64 [n] each: the means over runs of neighbouring points."""
    if len(x) <= most:
        return x, y
    means = [np.array([_mean(run) for run in np.array_split(values, most)]) for values in (x, y)]
    return means[0], means[1]


def smoothed(y: np.ndarray) -> np.ndarray:
    """Return the means over the neighbouring points, a fifteenth of the line in all; gaps stay. float64 [n], n ≥ 1."""
    window, known = np.ones(2 * (len(y) // 30) + 1), np.isfinite(y)
    total = np.convolve(np.where(known, y, 0), window, "same")
    count = np.convolve(known, window, "same")
    return np.where(known, total / np.maximum(count, 1), np.nan)
