"""Charts as inline SVG, coloured by the page's style sheet: the same in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 44
SERIES = 6  # colours of the style sheet; more series begin again
MOST_POINTS = 240  # of a line; more are averaged, since nobody sees them


@dataclass(frozen=True)
class Series:
    """One line, or one colour of bars; None is a gap. `colour`: its number in the style sheet; None: its place."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int | None = None


def _colours(series: Sequence[Series]) -> list[int]:
    return [(n if s.colour is None else s.colour) % SERIES for n, s in enumerate(series)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in low..high, about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """A series of at most `most` points: means over runs of neighbouring ones."""
    count = len(series.x)
    if count <= most:
        return series
    cuts = [i * count // most for i in range(most + 1)]
    x, y = [], []
    for begin, end in pairwise(cuts):
        values = [v for v in series.y[begin:end] if v is not None]
        x.append(sum(series.x[begin:end]) / (end - begin))
        y.append(sum(values) / len(values) if values else None)
    return Series(series.name, x, y, series.colour)


def smoothed(series: Series) -> Series:
    """Means over the neighbouring points, a fifteenth of the line in all; gaps stay."""
    reach = len(series.y) // 30

    def mean(at: int) -> float | None:
        values = [v for v in series.y[max(at - reach, 0) : at + reach + 1] if v is not None]
        return None if series.y[at] is None else sum(values) / len(values)

    return Series(series.name, series.x, [mean(at) for at in range(len(series.y))], series.colour)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, float, str]] = (),
    noisy: bool = False,
) -> str:
    """Lines over common axes; `marks` are (x, y, text) of points to single out. `noisy` lines are drawn faintly, and
    their `smoothed` form upon them. Empty without a finite value."""
    series = [thinned(s) for s in series]
    points = [
        (x, y)
        for s in series
        for x, y in zip(s.x, s.y, strict=True)
        if y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return ""
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_ticks = ticks(min(0.0, *(p[1] for p in points)), max(p[1] for p in points) * 1.02 or 1.0)
    y_low, y_high = min(y_ticks[0], 0.0), max([y_ticks[-1], *(p[1] for p in points)]) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(x_low, x_high, 8):
        x, _ = at(tick, y_low)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    colours = _colours(series)
    drawn = [(line, colour, " faint" if noisy else "") for line, colour in zip(series, colours, strict=True)]
    if noisy:
        drawn += [(smoothed(line), colour, "") for line, colour, _ in drawn]
    for line, colour, faint in drawn:
        for run in _runs(line):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in run))
            parts.append(f'<polyline class="line s{colour}{faint}" points="{path}"/>')
    for x, y, text in marks:
        across, up = at(x, y)
        parts.append(
            f'<circle class="mark" cx="{across:.1f}" cy="{up:.1f}" r="4"><title>{escape(text)}</title></circle>'
        )
    parts.append(_axis_names(x_label, y_label, HEIGHT))
    names = ", ".join(s.name for s in series)
    keys = dict(zip((s.name for s in series), colours, strict=True))
    return _figure(parts, HEIGHT, f"{y_label} by {x_label}: {names}", keys)


def _runs(series: Series) -> list[list[tuple[float, float]]]:
    """The stretches of a line between its gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if y is None or not math.isfinite(y):
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def bar_chart(groups: Sequence[str], series: Sequence[Series], x_label: str, highest: float = 100.0) -> str:
    """Horizontal bars, a group of one bar a series for each of `groups`, from 0 to `highest`. `Series.y` holds a value
    a group."""
    if not groups or not series:
        return ""
    thick, left = 9, 104
    pitch = len(series) * (thick + 2) + 10
    height = TOP + pitch * len(groups) + BOTTOM
    scale = (WIDTH - left - 48) / highest
    parts, colours = [], _colours(series)
    for tick in ticks(0, highest):
        x = left + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    for row, group in enumerate(groups):
        top = TOP + row * pitch + 5
        middle = top + len(series) * (thick + 2) / 2 + 3
        parts.append(
            f'<text class="name" x="{left - 10}" y="{middle:.1f}" text-anchor="end">{escape(group)}</text>'
        )
        for number, (bars, colour) in enumerate(zip(series, colours, strict=True)):
            value = bars.y[row]
            if value is None:
                continue
            y = top + number * (thick + 2)
            title = f"<title>{escape(group)}, {escape(bars.name)}: {value:.1f}</title>"
            parts.append(
                f'<rect class="bar s{colour}" x="{left}" y="{y}" width="{max(value * scale, 0.5):.1f}" '
                f'height="{thick}" rx="2">{title}</rect>'
                f'<text class="value" x="{left + value * scale + 5:.1f}" y="{y + thick - 1}">{value:.0f}</text>'
            )
    parts.append(_axis_names(x_label, "", height))
    keys = dict(zip((bars.name for bars in series), colours, strict=True))
    return _figure(parts, height, f"{x_label} by class", keys)


def _axis_names(x_label: str, y_label: str, height: int) -> str:
    middle = (TOP + height - BOTTOM) / 2
    text = f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    if y_label:
        text += (
            f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
            f"{escape(y_label)}</text>"
        )
    return text


def _figure(parts: Sequence[str], height: int, described: str, named: dict[str, int]) -> str:
    """The SVG with a legend below it, where there is more than one series."""
    keys = "".join(
        f'<li><span class="key k{colour}"></span>{escape(name)}</li>' for name, colour in named.items()
    )
    legend = f'<ul class="legend">{keys}</ul>' if len(named) > 1 else ""
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(described)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )
