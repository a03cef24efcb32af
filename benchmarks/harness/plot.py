"""Pictures of a results file: bars for providers, lines for sweeps."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pssl.core.files import write_atomically

from .measure import Result
from .results import results_of

OURS, PEERS = "#c0392b", "#7f8c8d"
ACROSS = 3  # panels, at most


def draw(record: dict, path: Path) -> None:
    """One panel a problem (its fullest pass) or sweep; written whole or not at all."""
    panels = []
    for group, run in record["runs"].items():
        if "parts" in run:
            panels.append((group, run["parts"]))
            continue
        found = results_of(run)
        for problem in dict.fromkeys(r.problem for r in found):
            here = [r for r in found if r.problem == problem]
            work = here[-1].work
            panels.append((group, [r for r in here if r.work == work]))
    across = min(ACROSS, len(panels))
    rows = -(-len(panels) // across)
    figure, axes = plt.subplots(rows, across, figsize=(5.2 * across, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (group, panel) in zip(axes.flat, panels, strict=False):
        if isinstance(panel[0], dict):
            _parts(axis, panel)
        elif panel[0].size is None:
            _bars(axis, panel)
        else:
            _lines(axis, panel, group.rsplit("-", 1)[-1])
    machine = record["machine"]
    figure.suptitle(f"{machine['processor']} {machine['simd']}, {machine['cores']} cores", fontsize=10)
    figure.tight_layout()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=90))
    plt.close(figure)


def _bars(axis: plt.Axes, results: list[Result]) -> None:
    names = [r.provider + (" (estimate)" if r.estimate else "") for r in results]
    times = [1e3 * r.p50 for r in results]
    errors = [[1e3 * (r.p50 - r.p20) for r in results], [1e3 * (r.p80 - r.p50) for r in results]]
    axis.barh(names, times, xerr=errors, color=[OURS if r.ours else PEERS for r in results], ecolor="#2c3e50")
    for name, r in zip(names, results, strict=True):
        if not r.ours:
            axis.annotate(f" {r.ratio:.3g}×", (1e3 * r.p80, name), va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 2, max(times) * 6)
    axis.invert_yaxis()
    _dress(axis, results[0].title, f"ms, {results[0].work}")


def _lines(axis: plt.Axes, results: list[Result], over: str) -> None:
    for provider in dict.fromkeys(r.provider for r in results):
        here = [r for r in results if r.provider == provider]
        colour = dict(color=OURS, linewidth=2) if here[0].ours else dict(linewidth=1)
        axis.plot([r.size for r in here], [1e3 * r.p50 for r in here], marker=".", label=provider, **colour)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylabel("ms", fontsize=7)
    axis.legend(fontsize=6)
    _dress(axis, results[0].problem, f"{over}, {results[0].work}")


def _parts(axis: plt.Axes, parts: list[dict]) -> None:
    axis.barh([p["name"] for p in parts], [1e3 * p["p50"] for p in parts], color=PEERS)
    axis.invert_yaxis()
    _dress(axis, "one training step by parts", "ms")


def _dress(axis: plt.Axes, title: str, below: str) -> None:
    axis.set_title(title, fontsize=7)
    axis.set_xlabel(below, fontsize=7)
    axis.tick_params(labelsize=7)
