"""What a run shows on the terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from .goals import Verdict
from .measure import Result

COLUMNS = ("pass", "calls", "p20 ms", "p50 ms", "p80 ms", "noise", "ratio", "extra MiB", "% of copy")


def console() -> Console:
    """As wide as the tables where nobody's terminal says otherwise."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{max(0, 2 - max(-2, math.floor(math.log10(max(1e3 * seconds, 1e-9)))))}f}"


def result_table(title: str, results: list[Result], first: str = "provider") -> Table:
    """One row a provider and pass. The ratio is to ours, which stands in bold. On a GPU the host's time for both passes
    stands beside the device's."""
    table = Table(title=title, title_justify="left")
    on_gpu = any(r.host is not None for r in results)
    for column in (first, *COLUMNS, *(("host ms",) if on_gpu else ())):
        table.add_column(column, justify="left" if column in (first, "pass") else "right")
    for r in results:
        noise = "" if r.noise is None else f"±{100 * r.noise:.0f} %"
        memory = "" if r.extra_bytes is None else f"{r.extra_bytes / 2**20:.1f}"
        label = r.provider if r.size is None else f"{r.provider}, {r.size}"
        table.add_row(
            f"{label} (estimate)" if r.estimate else label,
            r.work,
            str(r.calls),
            *(milliseconds(t) for t in (r.p20, r.p50, r.p80)),
            noise,
            f"{r.ratio:.2f}",
            memory,
            f"{100 * r.copy_share:.2f}",
            *(("" if r.host is None else milliseconds(r.host),) if on_gpu else ()),
            style="bold" if r.ours else None,
        )
    return table


def notes(results: list[Result], left_out: dict[str, str]) -> str:
    found = [f"{r.provider}: {r.estimate}" for r in results if r.estimate]
    return "\n".join(found + [f"left out: {name}: {why}" for name, why in left_out.items()])


def growth_table(axis: str, results: list[Result]) -> Table:
    """Seconds against size, and by which power of it they grow from one size to the next."""
    sizes = sorted({r.size for r in results})
    table = Table(title=f"p50 ms against {axis} (^ the power by which it grows)", title_justify="left")
    for column in ("problem", "provider", "pass", *(str(s) for s in sizes)):
        table.add_column(column, justify="right" if column.isdigit() else "left")
    for problem, provider, work in dict.fromkeys((r.problem, r.provider, r.work) for r in results):
        own = {r.size: r for r in results if (r.problem, r.provider, r.work) == (problem, provider, work)}
        cells, last = [], None
        for size in sizes:
            here = own.get(size)
            if here is None:
                cells.append("")
            else:
                power = (
                    ""
                    if last is None
                    else f" ^{math.log(here.p50 / last.p50) / math.log(size / last.size):.1f}"
                )
                cells.append(milliseconds(here.p50) + power)
                last = here
        ours = any(r.ours for r in own.values())
        table.add_row(problem, provider, work, *cells, style="bold" if ours else None)
    return table


def goal_table(verdicts: list[Verdict]) -> Table:
    table = Table(title="goals (benchmarks/goals.yaml)", title_justify="left")
    for column in ("problem", "pass", "goal", "measured", ""):
        table.add_column(column)
    for v in verdicts:
        said = "met" if v.met else "[red]missed[/red]"
        table.add_row(v.goal.problem, v.goal.work, str(v.goal), v.measured, said)
    return table


def missed(verdicts: list[Verdict]) -> list[str]:
    """Of every goal that was missed: what was measured in its place, and why, where that is known."""
    return [
        f"`{v.goal.problem}`, {v.goal.work}: {v.goal}, measured {v.measured}"
        + (f". {v.goal.why}" if v.goal.why else "")
        for v in verdicts
        if not v.met
    ]
