"""Two results files, ratio by ratio: what has become slower, beyond the noise that both measured."""

from __future__ import annotations

from dataclasses import dataclass

from .measure import Result
from .results import results_of

LEAST_NOISE = 0.05  # relative: what is less is never called slower
UNKNOWN_NOISE = 0.15  # of what was called too seldom to measure its noise


@dataclass(frozen=True)
class Change:
    """A ratio (how many times as fast as ``provider`` ours is) in the baseline and now."""

    group: str
    problem: str
    work: str
    provider: str
    before: float
    now: float
    noise: float

    @property
    def slower(self) -> bool:
        return self.now < self.before / (1 + self.noise)

    @property
    def faster(self) -> bool:
        return self.now > self.before * (1 + self.noise)

    def __str__(self) -> str:
        return (
            f"{self.group}: {self.problem}, {self.work}: {self.before:.3g} × as fast as {self.provider} before, "
            f"{self.now:.3g} × now ({self.now / self.before - 1:+.0%}, noise {self.noise:.0%})"
        )


def changes(baseline: dict, now: dict) -> list[Change]:
    """Every ratio that both records hold, of the same devices."""
    devices = {record["machine"]["device"] for record in (baseline, now)}
    if len(devices) > 1:
        raise SystemExit(f"expected results of one kind of device, got {' and '.join(sorted(devices))}")
    found = []
    for group, run in now["runs"].items():
        old, new = _by_key(baseline["runs"].get(group, {})), _by_key(run)
        for key, result in new.items():
            if key not in old or result.ours or result.estimate:
                continue
            before, own = old[key], key[:2]
            noise = sum(
                _noise(r) for r in (before, result, _ours(old, own), _ours(new, own)) if r is not None
            )
            found.append(
                Change(group, *key[:2], result.provider, before.ratio, result.ratio, max(noise, LEAST_NOISE))
            )
    return found


def _by_key(run: dict) -> dict[tuple[str, str, str], Result]:
    return {
        (r.problem if r.size is None else f"{r.problem} {r.size}", r.work, r.provider): r
        for r in results_of(run)
    }


def _ours(results: dict, problem: tuple[str, str]) -> Result | None:
    return next((r for key, r in results.items() if key[:2] == problem and r.ours), None)


def _noise(result: Result) -> float:
    return UNKNOWN_NOISE if result.noise is None else result.noise


def report(baseline: dict, now: dict) -> tuple[str, bool]:
    """What became slower, what faster; and whether anything became slower."""
    found = changes(baseline, now)
    if not found:
        raise SystemExit(
            "expected results of the same problems and providers in both files, got none in common"
        )
    slower, faster = [c for c in found if c.slower], [c for c in found if c.faster]
    lines = [f"SLOWER  {c}" for c in slower] + [f"faster  {c}" for c in faster]
    lines.append(f"{len(found)} ratios compared: {len(slower)} slower, {len(faster)} faster beyond the noise")
    return "\n".join(lines), bool(slower)
