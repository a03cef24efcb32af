"""The results file of a machine: JSON with every figure, and the same as CSV.

    {"machine": {name, device, processor …},
     "runs": {group: {date, commit, threads, versions, seconds, copy_bytes_per_second,
                      results: [Result …], left_out: {problem: {provider: why}}}}}

A group is a script ("rcm"), or a sweep of one ("rcm-pixels"); the training step's run has ``parts`` as well.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from pathlib import Path

from pssl.core.files import write_text

from .measure import Result

RESULTS = Path(__file__).resolve().parents[1] / "results"


def load(path: Path) -> dict:
    """A results file; an error that names it where it is none."""
    try:
        record = json.loads(Path(path).read_text())
    except OSError as error:
        raise SystemExit(f"{path}: no results file ({error})") from error
    except ValueError as error:
        raise SystemExit(f"{path}: expected a results file (JSON), got something else ({error})") from error
    if not isinstance(record, dict) or not {"machine", "runs"} <= record.keys():
        raise SystemExit(f"{path}: expected a results file with 'machine' and 'runs', got other keys")
    return record


def merged(path: Path, machine: dict, runs: dict) -> dict:
    """What ``path`` holds with ``runs`` in the place of older ones of the same groups; only of the same machine."""
    if not path.is_file():
        return {"machine": machine, "runs": runs}
    record = load(path)
    if record["machine"] != machine:
        raise SystemExit(f"{path}: expected results of {machine}, got those of {record['machine']}")
    return {"machine": machine, "runs": {**record["runs"], **runs}}


def write(path: Path, record: dict) -> None:
    """``path`` and, beside it, the same as CSV."""
    # one line a result: readable in a diff
    text = json.dumps(_rounded(record), indent=1, ensure_ascii=False)
    write_text(path, text + "\n")
    write_text(path.with_suffix(".csv"), to_csv(record))


def _rounded(value: object) -> object:
    """Five digits of every fraction: more are not in the measurement."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def run_record(about: dict, results: list[Result], **more: object) -> dict:
    return {**about, **more, "results": [asdict(r) for r in results]}


def results_of(run: dict) -> list[Result]:
    return [Result(**r) for r in run.get("results", ())]


def to_csv(record: dict) -> str:
    """One row a provider and pass, and one a part of the training step."""
    columns = ["machine", "group", "threads", "commit", *(f.name for f in fields(Result))]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for group, run in record["runs"].items():
        common = dict(
            machine=record["machine"]["name"], group=group, threads=run["threads"], commit=run["commit"][:12]
        )
        for row in run.get("results", ()):
            writer.writerow({**common, **_rounded(row)})
        for part in run.get("parts", ()):
            named = {"problem": group, "title": "one training step", "provider": part["name"]}
            figures = {k: part[k] for k in ("p20", "p50", "p80", "noise")}
            writer.writerow({**common, **named, **_rounded(figures)})
    return stream.getvalue()
