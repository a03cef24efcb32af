"""The command line of a script of problems, and its run from the first copy to the files it leaves."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import compare, goals, plot, report, results
from .machine import describe_machine, describe_run
from .measure import Result, copy_bandwidth, measure
from .problem import Problem

Deferred = Callable[[], Problem]  # a problem that is made when its turn comes, and forgotten after it


def parser(
    description: str, group: str, seconds: float, sweeps: Iterable[str] = (), compiles: bool = False
) -> argparse.ArgumentParser:
    """The options that the scripts share. ``sweeps``: what a script of problems can vary; ``compiles``: whether some
    of its providers go through torch.compile."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    made.add_argument(
        "--seconds", type=float, default=seconds, help=f"for the whole run, about (default: {seconds:g})"
    )
    if compiles:
        made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    if sweeps:
        made.add_argument(
            "--cache",
            type=float,
            metavar="MIB",
            help="size of the cache that inputs and copies are to exceed (default: the machine's last level)",
        )
        made.add_argument("--only", default="", help="the problems whose id holds this text")
        made.add_argument("--sweep", choices=tuple(sweeps), help="cost against this, instead of the problems")
    else:
        made.set_defaults(cache=None, sweep=None)
    made.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="folder for <group>.json, .csv and .png (default: runs/bench)",
    )
    made.add_argument(
        "--save",
        action="store_true",
        help="put the run into benchmarks/results/<machine>.json, .csv and .png as well",
    )
    made.add_argument(
        "--check",
        type=Path,
        metavar="BASELINE.json",
        help="compare with an earlier results file; exit status 1 where something got slower",
    )
    made.set_defaults(group=group)
    return made


def start(args: argparse.Namespace) -> dict:
    """Threads as asked for; the machine. Fails now, not after the run, where BASELINE.json is none."""
    if args.check is not None:
        results.load(args.check)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = describe_machine(args.device, args.cache and round(args.cache * 2**20))
    about = describe_run()
    print(f"{machine['processor']}, {machine['simd']}, {machine['cores']} cores, {about['threads']} threads")
    print(f"commit {about['commit'][:12]}, {', '.join(f'{k} {v}' for k, v in about['versions'].items())}")
    return machine


def run(args: argparse.Namespace, problems: Iterable[tuple[str, Deferred]]) -> None:
    """Measures the problems, (id, how to make it), that --only chooses; shows and writes what it found.

    Exits with status 1 after --check found something slower.
    """
    begin, machine = time.monotonic(), start(args)
    cache = machine["cache_bytes"]
    deadline, screen = begin + args.seconds, report.console()
    axis = args.sweep
    chosen = [(name, make) for name, make in problems if args.only in name]
    if not chosen:
        raise SystemExit(f"--only: expected part of a problem's id, got {args.only!r}")
    found: list[Result] = []
    left_out: dict[str, dict[str, str]] = {}
    copies: list[float] = []
    for position, (_, make) in enumerate(chosen):
        problem = make()
        copies.append(copy_bandwidth(args.device, cache))
        share = (deadline - time.monotonic()) / (len(chosen) - position)
        own = measure(problem, share, copies[-1], cache)
        found += own
        left_out[problem.id] = problem.left_out
        screen.print(report.result_table(problem.title, own))
        if text := report.notes(own, problem.left_out):
            screen.print(text, style="dim")
    copies.sort()
    copy = copies[len(copies) // 2]
    if axis is not None:
        screen.print(report.growth_table(axis, found))
    judged = [] if axis else goals.verdicts(goals.load_goals(), found, machine["device"])
    if judged:
        screen.print(report.goal_table(judged))
        screen.print(*report.missed(judged), sep="\n", style="dim")
    seconds = time.monotonic() - begin
    print(f"copy: {copy / 1e9:.2f} GB/s (bytes read and written); {seconds:.0f} s in all")
    record = results.run_record(
        describe_run(),
        found,
        seconds=seconds,
        copy_bytes_per_second=copy,
        left_out={k: v for k, v in left_out.items() if v},
    )
    finish(args, machine, record)


def finish(args: argparse.Namespace, machine: dict, run_record: dict) -> None:
    """Writes the files, then compares."""
    axis = args.sweep
    group = f"{args.group}-{axis}" if axis else args.group
    record = {"machine": machine, "runs": {group: run_record}}
    _write(args.out / f"{group}.json", record)
    if args.save:
        path = results.RESULTS / f"{machine['name']}.json"
        _write(path, results.merged(path, **record))
    if args.check is not None:
        text, slower = compare.report(results.load(args.check), record)
        print(text)
        if slower:
            raise SystemExit(1)


def _write(path: Path, record: dict) -> None:
    results.write(path, record)
    plot.draw(record, path.with_suffix(".png"))
    print(f"written: {path}, .csv, .png")
