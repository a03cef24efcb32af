"""The outcome of a run as files and as a table: metrics.json, summary.csv, the closing table."""

from __future__ import annotations

import csv
import io
import platform
import statistics
import subprocess
from importlib import metadata
from pathlib import Path

from rich.table import Table

COLUMNS = (
    "arm",
    "readout",
    "train_miou",
    "train_miou_std",
    "val_miou",
    "val_miou_std",
    "threshold",
    "foreground",
    "label_precision",
    "part",
    "body",
    "background",
    "seeds",
    "train_split",
    "train_images",
    "val_split",
    "val_images",
)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pillow"):
        found[name] = metadata.version(name)
    return found


def commit(but: str | None = None) -> str | None:
    """The commit of the repository this package lies in, with "+" if files differ from it; None outside of one.

    `but`: a folder of the repository whose files do not count.
    """
    where = [":/", *([f":(top,exclude){but}"] if but else [])]

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no", "--", *where) else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def summarise(runs: list[dict], splits: dict[str, str]) -> list[dict]:
    """One row per arm and readout: mean over runs (seeds) and sample standard deviation, None for one run.

    `splits` names the split of each role, "train" and "val".

    `runs` holds, per seed, {"arms": {arm: {"readouts": {readout: {"train": score, "val": score}}}}}. Activation is
    that of the val split.
    """
    rows = []
    for arm, entry in runs[0]["arms"].items():
        for readout in entry["readouts"]:
            scores = [run["arms"][arm]["readouts"][readout] for run in runs]
            row = {"arm": arm, "readout": readout, "seeds": len(runs)}
            for split in ("train", "val"):
                values = [score[split]["miou"] for score in scores]
                known = None not in values
                row[f"{split}_miou"] = statistics.mean(values) if known else None
                row[f"{split}_miou_std"] = statistics.stdev(values) if known and len(values) > 1 else None
                row[f"{split}_split"], row[f"{split}_images"] = splits[split], scores[0][split]["images"]
            row["threshold"] = statistics.mean(score["val"]["threshold"] for score in scores)
            row["foreground"] = _mean([score["val"].get("foreground") for score in scores])
            precision = [run["arms"][arm].get("label_precision") or {} for run in runs]
            row["label_precision"] = _mean([found.get("mean") for found in precision])
            for area in ("part", "body", "background"):
                row[area] = _mean([score["val"]["activation"].get(area) for score in scores])
            rows.append(row)
    return rows


def _mean(values: list[float | None]) -> float | None:
    """Return the mean, None where a value is not known."""
    return None if None in values else statistics.mean(values)


def to_csv(rows: list[dict]) -> str:
    """The rows as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return stream.getvalue()


def to_table(rows: list[dict], title: str) -> Table:
    """The closing table."""
    has_parts = any(row["part"] is not None for row in rows)
    counted = [
        f"{role}: {rows[0][f'{role}_images']} images of {rows[0][f'{role}_split']}"
        for role in ("train", "val")
    ]
    if rows[0]["val_miou"] is None:
        return _table_without_masks(rows, title, counted)
    how = "threshold picked on train; activation: mean map value on val"
    table = Table(title=title, caption="; ".join([*counted, how]))
    for name in ("arm", "readout", "mIoU train", "mIoU val", "threshold"):
        table.add_column(name, justify="left" if name in ("arm", "readout") else "right")
    areas = ("part", "body", "background") if has_parts else ("body", "background")
    for area in areas:
        table.add_column({"body": "body" if has_parts else "object"}.get(area, area), justify="right")
    previous = None
    for row in rows:
        if previous not in (None, row["arm"]):
            table.add_section()
        cells = ["" if row["arm"] == previous else row["arm"], row["readout"]]
        for split in ("train", "val"):
            spread = row[f"{split}_miou_std"]
            miou = row[f"{split}_miou"]
            cells.append(
                "-" if miou is None else f"{miou:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
            )
        cells.append(f"{row['threshold']:.2f}")
        cells += ["-" if row[area] is None else f"{row[area]:.2f}" for area in areas]
        table.add_row(*cells)
        previous = row["arm"]
    return table


def _table_without_masks(rows: list[dict], title: str, counted: list[str]) -> Table:
    """Return the closing table of a run whose held-out images have no masks."""
    how = "image labels: mean average precision on val; foreground: pixels of val above the threshold"
    table = Table(title=title.partition(":")[0], caption="; ".join([*counted, how]))
    for name in ("arm", "readout", "image labels", "threshold", "foreground"):
        table.add_column(name, justify="left" if name in ("arm", "readout") else "right")
    for row in rows:
        precision = row["label_precision"]
        table.add_row(
            row["arm"],
            row["readout"],
            "-" if precision is None else f"{precision:.1f}",
            f"{row['threshold']:.2f}",
            f"{100 * row['foreground']:.0f} %",
        )
    return table


def iou_table(result: dict) -> Table:
    """IoU by region and their mean, of a score's `iou` and `miou`."""
    table = Table()
    table.add_column("region")
    table.add_column("IoU", justify="right")
    for name, value in result["iou"].items():
        table.add_row(name, "-" if value is None else f"{value:.1f}")
    table.add_section()
    table.add_row("mean", f"{result['miou']:.1f}")
    return table
