"""Figures of a report as plain data: each is empty or None where the run has not come to it."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from pssl.reporting.charts import Chart, bar_chart, line_chart
from pssl.reporting.run_files import Run
from pssl.reporting.series import Series
from pssl.reporting.tables import Table, table

KINDS = (("cams", "CAMs"), ("labels", "pseudo labels"), ("predictions", "predictions"))


@dataclass(frozen=True)
class Tile:
    """A figure, and what it is."""

    value: str
    text: str


@dataclass(frozen=True)
class Stages:
    """mIoU from stage to stage, and what each took, if a pipeline ran them."""

    scores: Table
    seconds: Table | None


@dataclass(frozen=True)
class Configuration:
    """The file that configured the run."""

    name: str
    text: str


def tiles(run: Run) -> list[Tile]:
    """Return the figures that matter most."""
    found = []
    for name, title in KINDS:
        score = run.files.score(f"{name}_val")
        if score is not None:
            found.append(Tile(f"{score['miou']:.1f}", f"mIoU of {title}, {score['split']}"))
    if not found and run.files.segmentation is not None and "miou" in run.files.segmentation:
        found.append(Tile(f"{run.files.segmentation['miou']:.1f}", f"mIoU of predictions, {run.split}"))
    if not found and run.files.metrics is not None:
        summary = run.files.metrics["summary"]
        if summary[0]["val_miou"] is None:
            found += _tiles_without_masks(summary, run)
            summary = []
        for readout in dict.fromkeys(row["readout"] for row in summary):
            row = max((r for r in summary if r["readout"] == readout), key=lambda r: r["val_miou"])
            text = f"mIoU of the best arm by {readout}, {row['arm']}, {run.split}"
            found.append(Tile(f"{row['val_miou']:.1f}", text))
    pipeline = run.files.pipeline
    if pipeline is not None:
        found.append(Tile(f"{pipeline['seconds'] / 60:.1f} min", "for all stages"))
    return found


def _tiles_without_masks(summary: list[dict], run: Run) -> list[Tile]:
    """Return how well the image labels are found, in place of mIoU."""
    known = [row for row in summary if row["label_precision"] is not None]
    if not known:
        return []
    row = max(known, key=lambda r: r["label_precision"])
    text = f"average precision of image labels, best arm, {row['arm']}, {run.split} (no masks, no mIoU)"
    return [Tile(f"{row['label_precision']:.1f}", text)]


def stages(run: Run) -> Stages | None:
    """Return mIoU from stage to stage, and what each took."""
    rows = []
    for name, title in KINDS:
        scores = [run.files.score(f"{name}_{role}") for role in ("train", "val")]
        if any(scores):
            rows.append([title, *("–" if s is None else f"{s['miou']:.1f}" for s in scores)])
    if not rows:
        return None
    seconds, pipeline = None, run.files.pipeline
    if pipeline is not None:
        taken = [[name, f"{outcome['seconds']:.0f}"] for name, outcome in pipeline["stages"].items()]
        seconds = table(["stage", "seconds"], taken)
    return Stages(table(["", "train", "held out"], rows), seconds)


def ablation(run: Run) -> Table | None:
    """Return the arms side by side."""
    metrics = run.files.metrics
    if metrics is None:
        return None
    if metrics["summary"][0]["val_miou"] is None:
        return None
    areas = ("part", "body", "background")
    rows = []
    for row in metrics["summary"]:
        cells = [row["arm"], row["readout"]]
        for split in ("train", "val"):
            spread = row[f"{split}_miou_std"]
            miou = row[f"{split}_miou"]
            cells.append(
                "–" if miou is None else f"{miou:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
            )
        cells.append(f"{row['threshold']:.2f}")
        rows.append(cells + ["–" if row[area] is None else f"{row[area]:.2f}" for area in areas])
    head = ["arm", "readout", "mIoU train", "mIoU held out", "threshold"]
    return table([*head, "on parts", "on bodies", "on background"], rows, best=(2, 3))


def without_masks(run: Run) -> Table | None:
    """Return what is known of the arms where held-out images have no masks."""
    metrics = run.files.metrics
    if metrics is None or metrics["summary"][0]["val_miou"] is not None:
        return None
    rows = [
        [
            row["arm"],
            row["readout"],
            "–" if row["label_precision"] is None else f"{row['label_precision']:.1f}",
            f"{row['threshold']:.2f}",
            f"{100 * row['foreground']:.0f}",
            metrics["runs"][0]["arms"][row["arm"]]["readouts"][row["readout"]]["val"]["threshold_from"],
        ]
        for row in metrics["summary"]
    ]
    head = ["arm", "readout", "image labels found", "threshold", "foreground, %", "threshold from"]
    return table(head, rows, best=(2,))


def classes(run: Run) -> Chart | None:
    """Return IoU of every region, from stage to stage."""
    found = [(title, run.files.score(f"{name}_val")) for name, title in KINDS]
    if not any(score for _, score in found):
        found = [("predictions", run.files.segmentation)]
    series = [
        Series(title, (), [score["iou"].get(name) for name in run.regions])
        for title, score in found
        if score is not None and "iou" in score
    ]
    return bar_chart(run.regions, series, "IoU")


def thresholds(run: Run) -> dict[str, Chart]:
    """Return mIoU of the CAMs over the background threshold, a line an arm, by readout."""
    metrics = run.files.metrics
    if metrics is None or metrics["summary"][0]["val_miou"] is None:
        return {}
    arms, charts = metrics["runs"][0]["arms"], {}
    for readout in next(iter(arms.values()))["readouts"]:
        lines, marks = [], []
        for arm, entry in arms.items():
            score = entry["readouts"][readout]["val"]
            count = len(score["curve"]) + 1
            lines.append(Series(arm, [i / count for i in range(1, count)], score["curve"]))
            tooltip = f"{arm}: {score['miou']:.1f} at {score['threshold']:.2f}"
            marks.append((score["threshold"], score["miou"], tooltip))
        charts[readout] = line_chart(lines, "background threshold", "mIoU, held out", marks)
    return _drawn(charts)


def losses(run: Run) -> dict[str, Chart]:
    """Return the loss curves by stage of training."""
    found = run.files.losses(run.files.train / "losses.csv")
    if run.files.segment != run.files.train:
        found |= run.files.losses(run.files.segment / "losses.csv")
    one_seed = len({stage.partition("/")[0] for stage in found if "/" in stage}) == 1
    return _drawn(
        {
            stage.partition("/")[2] if one_seed and "/" in stage else stage: line_chart(
                curves, "step", "loss", noisy=True
            )
            for stage, curves in found.items()
        }
    )


def _drawn(charts: dict[str, Chart | None]) -> dict[str, Chart]:
    """Return the charts that have something to show."""
    return {title: chart for title, chart in charts.items() if chart is not None}


def configuration(run: Run) -> Configuration:
    """Return the file that configured the run."""
    name, values = run.files.config
    return Configuration(name, yaml.safe_dump(values, sort_keys=False, width=110))
