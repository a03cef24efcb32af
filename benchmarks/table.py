"""The README's table of speed, from the results files in benchmarks/results.

python benchmarks/table.py           # prints it
python benchmarks/table.py --write   # puts it into README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import goals, report, results
from harness.measure import Result

from pssl.core.files import write_text

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- speed: python benchmarks/table.py --write -->", "<!-- /speed -->"
USUAL = ("peers", "par", "dense", "pydensecrf")  # providers that are the code one usually meets
HEAD = (
    "problem",
    "ours, ms",
    "% of copy",
    "usual code",
    "fastest other",
    "extra MiB, ours / usual code",
    "goals met",
)


def block(records: list[dict]) -> str:
    """What stands between the README's two marks."""
    return "\n\n".join(section(record) for record in records) or "No results are committed yet."


def section(record: dict) -> str:
    """The table of one machine."""
    machine, runs = record["machine"], record["runs"]
    held_to = goals.load_goals()
    made = {
        (run["date"][:10], short(run["commit"]), run["threads"], run["versions"]["torch"])
        for run in runs.values()
    }
    about = "; ".join(
        f"{date}, {commit}, {n} threads, torch {torch}" for date, commit, n, torch in sorted(made)
    )
    lines = [
        f"{machine['processor']}, {machine['simd']}, {machine['cores']} cores ({about}):",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
    ]
    missed = []
    for run in runs.values():
        found = [] if "parts" in run else [r for r in results.results_of(run) if r.size is None]
        judged = goals.verdicts(held_to, found, machine["device"])
        missed += report.missed(judged)
        for problem in dict.fromkeys(r.problem for r in found):
            here = [r for r in found if r.problem == problem]
            lines.append(row([r for r in here if r.work == here[-1].work], judged))
    if missed:
        lines += ["", "Goals missed:", "", *(f"* {said}" for said in missed)]
    for run in runs.values():
        if "parts" in run:
            lines += ["", step_text(run)]
    return "\n".join(lines)


def short(commit: str) -> str:
    """Seven digits, and the + of files that differed from it."""
    return commit[:7] + "+" * commit.endswith("+")


def row(found: list[Result], verdicts: list[goals.Verdict]) -> str:
    ours = next(r for r in found if r.ours)
    others = [r for r in found if not r.ours]
    usual = next((r for name in USUAL for r in others if r.provider == name), None)
    fastest = min(others, key=lambda r: r.p50, default=None)
    judged = [v.met for v in verdicts if v.goal.problem == ours.problem]
    work = "" if ours.work == "forward" else ", with gradients"
    memory = [
        "–" if r is None or r.extra_bytes is None else f"{r.extra_bytes / 2**20:.1f}" for r in (ours, usual)
    ]
    cells = (
        ours.title + work,
        report.milliseconds(ours.p50),
        f"{100 * ours.copy_share:.0f}" if ours.copy_share >= 0.01 else "< 1",
        times(usual),
        times(fastest),
        " / ".join(memory),
        f"{sum(judged)} of {len(judged)}" if judged else "",
    )
    return "| " + " | ".join(cells) + " |"


def times(result: Result | None) -> str:
    if result is None:
        return "–"
    estimate = ", estimate" if result.estimate else ""
    return f"{float(f'{result.ratio:.3g}'):g} × ({result.provider}{estimate})"


def step_text(run: dict) -> str:
    return (
        f"A training step of `--model.backbone {run['backbone']}` by its recipe: "
        f"{run['images_per_second']:.0f} images/s; "
        f"{100 * run['operators_share']:.0f} % of the step are the operators of RCM and MAM, "
        f"{100 * (run['method_share'] - run['operators_share']):.0f} % the passes that only they need."
    )


def committed() -> list[dict]:
    return [results.load(path) for path in sorted(results.RESULTS.glob("*.json"))]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--write", action="store_true", help="into README.md")
    text = block(committed())
    if options.parse_args().write:
        write_text(README, placed(README.read_text(encoding="utf-8"), text))
    else:
        print(text)


def placed(readme: str, text: str) -> str:
    """The README with ``text`` between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
