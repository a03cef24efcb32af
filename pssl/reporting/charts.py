"""Charts of a report, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from pssl.reporting.series import Series, smoothed, thinned, with_gaps
from pssl.reporting.svg import POINTS, SERIES, colour, inline_svg, named, page_style

WIDTH, HEIGHT = 640, 300  # units of the SVG, which grows with the page
BAR, BETWEEN_BARS, BETWEEN_GROUPS, AROUND_BARS = 9, 2, 10, 42
ROUND_STEPS = [1, 2, 5, 10]  # of ticks, times a power of ten


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    colour: str
    """As CSS has it."""


@dataclass(frozen=True)
class Chart:
    """A drawing and its legend, which the page sets below it: there it wraps as the page does."""

    svg: Markup
    legend: list[Key]


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, float, str]] = (),
    noisy: bool = False,
) -> Chart | None:
    """Draw lines over common axes; None without a finite value.

    `marks` are (x, y, tooltip) of points to single out. `noisy` lines are drawn faintly, and their smoothed form upon
    them.
    """
    colours = _colours(series)
    lines = [thinned(with_gaps(line.x), with_gaps(line.y)) for line in series]
    drawn = [np.isfinite(x) & np.isfinite(y) for x, y in lines]
    if not any(points.any() for points in drawn):
        return None
    values = np.concatenate([y[points] for (_, y), points in zip(lines, drawn, strict=True)])
    with page_style():
        axes = _axes(HEIGHT, "y")
        axes.set(xlabel=x_label, ylabel=y_label, ylim=_from_zero(values))
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=ROUND_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
        for (x, y), name in zip(lines, colours, strict=True):
            if noisy:
                _line(axes, x, y, name, "faint", linewidth=1, alpha=0.25)
        for (x, y), name in zip(lines, colours, strict=True):
            _line(axes, x, smoothed(y) if noisy else y, name, "line")
        axes.margins(x=0)
        for x, y, tooltip in marks:
            _mark(axes, x, y, tooltip)
        names = ", ".join(line.name for line in series)
        svg = inline_svg(axes.figure, f"{y_label} by {x_label}: {names}")
    return Chart(svg, _legend(series))


def bar_chart(
    groups: Sequence[str], series: Sequence[Series], x_label: str, highest: float = 100.0
) -> Chart | None:
    """Draw horizontal bars from 0 to `highest`, for each of `groups` a bar of each series; None if there are none.

    `Series.y` holds a value a group.
    """
    if not groups or not series:
        return None
    pitch = len(series) * (BAR + BETWEEN_BARS) + BETWEEN_GROUPS
    with page_style():
        axes = _axes(pitch * len(groups) + AROUND_BARS, "x")
        axes.set(xlabel=x_label, xlim=(0, 1.05 * highest), ylim=(pitch * len(groups), 0))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS))
        middles = pitch * (np.arange(len(groups)) + 0.5)
        axes.set_yticks(middles, groups, color=colour("ink"))
        for number, (bars, name) in enumerate(zip(series, _colours(series), strict=True)):
            lengths = with_gaps(bars.y)
            known = np.flatnonzero(np.isfinite(lengths))
            places = middles[known] + (number - (len(series) - 1) / 2) * (BAR + BETWEEN_BARS)
            # A sliver shows that a class is at 0, and not left out.
            shown = np.maximum(lengths[known], 1e-3 * highest)
            drawn = axes.barh(places, shown, BAR, color=colour(name))
            for group, bar in zip(known, drawn, strict=True):
                named(bar, "bar", f"{groups[group]}, {bars.name}: {lengths[group]:.1f}")
            texts = [f"{length:.0f}" for length in lengths[known]]
            for text in axes.bar_label(drawn, texts, padding=5, fontsize=10, color=colour("soft")):
                named(text, "value")
        svg = inline_svg(axes.figure, f"{x_label} by class")
    return Chart(svg, _legend(series))


def _colours(series: Sequence[Series]) -> list[str]:
    """Return the name of each one's colour in the style sheet."""
    numbers = [place if one.colour is None else one.colour for place, one in enumerate(series)]
    return [SERIES[number % len(SERIES)] for number in numbers]


def _legend(series: Sequence[Series]) -> list[Key]:
    """Return the keys, none for a series that is alone."""
    keys = [Key(one.name, f"var(--{name})") for one, name in zip(series, _colours(series), strict=True)]
    return keys if len(keys) > 1 else []


def _axes(height: float, grid: str) -> Axes:
    """Return the only axes of a new figure, with a grid across one direction."""
    axes = Figure(figsize=(WIDTH / POINTS, height / POINTS)).subplots()
    axes.set_frame_on(False)
    axes.grid(axis=grid)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    return axes


def _from_zero(values: np.ndarray) -> tuple[float, float]:
    """Return limits that hold the values and 0, with a little room above them."""
    low, high = min(values.min(), 0.0), values.max()
    return low, high + (0.02 * (high - low) or 1.0)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, name: str, kind: str, **look: float) -> None:
    (line,) = axes.plot(x, y, color=colour(name), **look)
    named(line, kind)


def _mark(axes: Axes, x: float, y: float, tooltip: str) -> None:
    """Draw a circle of four units about a point."""
    here = axes.figure.dpi_scale_trans + ScaledTranslation(x, y, axes.transData)
    circle = Circle((0, 0), 4 / POINTS, transform=here, facecolor=colour("card"), edgecolor=colour("ink"))
    circle.set(linewidth=2, zorder=3)
    named(circle, "mark", tooltip)
    axes.add_artist(circle)
