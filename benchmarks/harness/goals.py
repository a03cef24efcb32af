"""The goals of the operators (goals.yaml beside the scripts), met or missed by a run, and why they are missed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from .measure import PASSES, Result

GOALS = Path(__file__).resolve().parents[1] / "goals.yaml"
AGAINST = ("times_faster_than", "memory_of")
OF = ("copy_bandwidth", "launches", "seconds")


@dataclass(frozen=True)
class Goal:
    """``kind``: "times_faster_than" and "memory_of" name providers, the best of which counts; "copy_bandwidth" is the
    share of it, "launches" and "seconds" are of a call. The bound is ``at_least`` or ``at_most``. ``why`` says what
    keeps the operator from a goal that was missed."""

    problem: str
    device: str
    work: str
    kind: str
    providers: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    why: str = ""

    def __str__(self) -> str:
        bound = f"≥ {self.said(self.at_least)}" if self.at_most is None else f"≤ {self.said(self.at_most)}"
        peers = " and ".join(self.providers)
        return {
            "times_faster_than": f"{bound} as fast as {peers}",
            "copy_bandwidth": f"{bound} of the copy bandwidth",
            "launches": f"{bound} launches",
            "memory_of": f"{bound} of the extra memory of {peers}",
            "seconds": bound,
        }[self.kind]

    def said(self, value: float) -> str:
        """``value`` in the goal's unit."""
        digits = f"{float(f'{value:.3g}'):g}"
        return {
            "times_faster_than": f"{digits} ×",
            "copy_bandwidth": f"{100 * value:.3g}%",
            "launches": digits,
            "memory_of": f"{100 * value:.3g}%",
            "seconds": f"{1e6 * value:.3g} µs",
        }[self.kind]

    def measured(self, results: list[Result]) -> float | None:
        """Its figure in ``results``; None where these do not hold it."""
        here = {r.provider: r for r in results if (r.problem, r.work) == (self.problem, self.work)}
        own = next((r for r in here.values() if r.ours), None)
        peers = [here[p] for p in self.providers if p in here]
        if own is None or (self.providers and not peers):
            return None
        if self.kind == "times_faster_than":
            return min(r.ratio for r in peers)
        if self.kind == "memory_of":
            return own.extra_bytes / max(min(r.extra_bytes for r in peers), 1)
        return {"copy_bandwidth": own.copy_share, "launches": own.launches, "seconds": own.p50}[self.kind]

    def met(self, value: float) -> bool:
        return value >= self.at_least if self.at_most is None else value <= self.at_most


def load_goals(path: Path = GOALS) -> list[Goal]:
    """The goals of a file; errors name the entry."""
    return [
        _goal(dict(entry), problem, device, f"{path.name}: {device}, {problem}")
        for device, problems in yaml.safe_load(path.read_text()).items()
        for problem, entries in problems.items()
        for entry in entries
    ]


def _goal(entry: dict, problem: str, device: str, where: str) -> Goal:
    kinds = [k for k in AGAINST if k in entry] or [entry.pop("of", None)]
    if len(kinds) != 1 or kinds[0] not in AGAINST + OF:
        raise ValueError(
            f"{where}: expected one of {', '.join(AGAINST)}, or of: {' | '.join(OF)}, got {kinds}"
        )
    providers = tuple(entry.pop(kinds[0], ()))
    work = entry.pop("work", PASSES[1])
    if work not in PASSES:
        raise ValueError(f"{where}: work expected one of {', '.join(PASSES)}, got {work!r}")
    why = " ".join(entry.pop("why", "").split())
    if len(entry) != 1 or not entry.keys() <= {"at_least", "at_most"}:
        raise ValueError(f"{where}: expected at_least or at_most, got {sorted(entry)}")
    (bound,) = entry.values()
    if not isinstance(bound, (int, float)):
        raise ValueError(f"{where}: expected a number as {next(iter(entry))}, got {bound!r}")
    return Goal(problem, device, work, kinds[0], providers, **entry, why=why)


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was measured, in the goal's unit."""

    goal: Goal
    value: float

    @property
    def met(self) -> bool:
        return self.goal.met(self.value)

    @property
    def measured(self) -> str:
        return self.goal.said(self.value)


def verdicts(goals: list[Goal], results: list[Result], device: str) -> list[Verdict]:
    """One for each goal of the device that the results can judge."""
    judged = [(goal, goal.measured(results)) for goal in goals if goal.device == device]
    return [Verdict(goal, value) for goal, value in judged if value is not None]
