"""One HTML page about a run: ``python -m pssl.report runs/pipeline``, a folder of pssl.pipeline or of one stage.

RUN/report.html needs no network and no other file: charts are SVG, pictures PNG, inside the page. What the run has not
come to is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import tyro
import yaml

from pssl.cli import parse
from pssl.config.data import DataConfig
from pssl.config.mapping import from_dict
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.threads import over_images
from pssl.data.open import DataFolder, open_data
from pssl.data.voc import read_label_png
from pssl.method.pseudo_labels import best_regions, label_scores
from pssl.models.cam_files import read_cams
from pssl.reporting import page as html
from pssl.reporting import pictures
from pssl.reporting.charts import Series, bar_chart, line_chart
from pssl.reporting.run_files import RunFiles
from pssl.scoring.scoring import confusion, iou

KINDS = (("cams", "CAMs"), ("labels", "pseudo labels"), ("predictions", "predictions"))


@dataclass
class ReportConfig:
    """`python -m pssl.report RUN`: one page about a run."""

    run: tyro.conf.Positional[Path] = Path("runs/pipeline")
    """Folder of pssl.pipeline, pssl.train or pssl.segment."""
    images: int = 4
    """Worst and best held-out images to show, this many of each."""
    out: Path | None = None
    """The page. None: report.html in the run's folder."""

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"images: expected 0 or more, got {self.images}")


@dataclass(frozen=True)
class Report:
    """A run, its data where they are still there, and how much of them to show."""

    files: RunFiles
    folder: DataFolder
    split: str
    images: int

    @property
    def regions(self) -> tuple[str, ...]:
        """Background, then the classes."""
        return ("background", *self.folder.classes)

    @property
    def predictions(self) -> Path:
        """The folder of predictions."""
        return self.files.segment / "results/VOC2012/Segmentation" / f"comp6_{Path(self.split).stem}_cls"


def tiles(report: Report) -> str:
    """The figures that matter most."""
    found = []
    for name, title in KINDS:
        score = report.files.score(f"{name}_val")
        if score is not None:
            found.append(html.tile(f"{score['miou']:.1f}", f"mIoU of {title}, {score['split']}"))
    if not found and report.files.segmentation is not None:
        found.append(
            html.tile(f"{report.files.segmentation['miou']:.1f}", f"mIoU of predictions, {report.split}")
        )
    if not found and report.files.metrics is not None:
        summary = report.files.metrics["summary"]
        for readout in dict.fromkeys(row["readout"] for row in summary):
            row = max((r for r in summary if r["readout"] == readout), key=lambda r: r["val_miou"])
            text = f"mIoU of the best arm by {readout}, {row['arm']}, {report.split}"
            found.append(html.tile(f"{row['val_miou']:.1f}", text))
    pipeline = report.files.pipeline
    if pipeline is not None:
        found.append(html.tile(f"{pipeline['seconds'] / 60:.1f} min", "for all stages"))
    return "".join(found)


def stages(report: Report) -> str:
    """mIoU from stage to stage, and what each took."""
    rows = []
    for name, title in KINDS:
        scores = [report.files.score(f"{name}_{role}") for role in ("train", "val")]
        if any(scores):
            rows.append([title, *("–" if s is None else f"{s['miou']:.1f}" for s in scores)])
    if not rows:
        return ""
    text = html.note(
        "mIoU in percent. CAMs are cut at the threshold that is best on the training split; pseudo labels know which "
        "classes an image holds, predictions do not."
    ) + html.table(["", "train", "held out"], rows)
    pipeline = report.files.pipeline
    if pipeline is not None:
        seconds = [[name, f"{outcome['seconds']:.0f}"] for name, outcome in pipeline["stages"].items()]
        return f'<div class="grid2"><div>{text}</div><div>{html.note("Seconds of each stage.")}' + (
            html.table(["stage", "seconds"], seconds) + "</div></div>"
        )
    return text


def ablation(report: Report) -> str:
    """The arms side by side."""
    metrics = report.files.metrics
    if metrics is None:
        return ""
    rows = []
    for row in metrics["summary"]:
        cells = [row["arm"], row["readout"]]
        for split in ("train", "val"):
            spread = row[f"{split}_miou_std"]
            cells.append(f"{row[f'{split}_miou']:.1f}" + ("" if spread is None else f" ± {spread:.1f}"))
        cells.append(f"{row['threshold']:.2f}")
        cells += ["–" if row[area] is None else f"{row[area]:.2f}" for area in ("part", "body", "background")]
        rows.append(cells)
    head = [
        "arm",
        "readout",
        "mIoU train",
        "mIoU held out",
        "threshold",
        "on parts",
        "on bodies",
        "on background",
    ]
    return html.note(
        "CAM mIoU in percent of every arm, read in both ways, at the threshold that is best on the training split; "
        "and the mean CAM on parts, bodies and background of held-out images."
    ) + html.table(head, rows, best=(2, 3))


def losses(report: Report) -> str:
    """Loss curves, a chart a stage of training."""
    found = report.files.losses(report.files.train / "losses.csv")
    if report.files.segment != report.files.train:
        found |= report.files.losses(report.files.segment / "losses.csv")
    one_seed = len({stage.partition("/")[0] for stage in found if "/" in stage}) == 1
    names = {stage: stage.partition("/")[2] if one_seed and "/" in stage else stage for stage in found}
    cards = [
        html.card(names[stage], line_chart(curves, "step", "loss", noisy=True))
        for stage, curves in found.items()
    ]
    text = html.note("Faint: the steps. Above them: the mean over a fifteenth of the stage.")
    return f'{text}<div class="grid2">{"".join(cards)}</div>' if cards else ""


def thresholds(report: Report) -> str:
    """mIoU of the CAMs over the background threshold, a line an arm, a chart a readout."""
    metrics = report.files.metrics
    if metrics is None:
        return ""
    arms, cards = metrics["runs"][0]["arms"], []
    for readout in next(iter(arms.values()))["readouts"]:
        lines, marks = [], []
        for arm, entry in arms.items():
            score = entry["readouts"][readout]["val"]
            count = len(score["curve"]) + 1
            lines.append(Series(arm, [i / count for i in range(1, count)], score["curve"]))
            marks.append(
                (score["threshold"], score["miou"], f"{arm}: {score['miou']:.1f} at {score['threshold']:.2f}")
            )
        cards.append(html.card(readout, line_chart(lines, "background threshold", "mIoU, held out", marks)))
    text = html.note("Circles: the threshold that is best on the training split, which is the one reported.")
    return f'{text}<div class="grid2">{"".join(cards)}</div>'


def classes(report: Report) -> str:
    """IoU of every region, from stage to stage."""
    found = [(title, report.files.score(f"{name}_val")) for name, title in KINDS]
    if not any(score for _, score in found):
        found = [("predictions", report.files.segmentation)]
    series = [
        Series(title, (), [score["iou"].get(name) for name in report.regions])
        for title, score in found
        if score is not None and "iou" in score
    ]
    chart = html.card("IoU in percent, held out", bar_chart(report.regions, series, "IoU"))
    return f'<div class="narrow">{chart}</div>' if chart else ""


def image_scores(report: Report) -> dict[str, float]:
    """mIoU of each held-out image's prediction, over the regions that it has or is given; {} without predictions."""
    ids = [i for i in report.folder.ids(report.split) if (report.predictions / f"{i}.png").is_file()]

    def score(image_id: str) -> float:
        label = read_label_png(report.predictions / f"{image_id}.png", len(report.folder.classes))
        counts = confusion(label, report.folder.mask(image_id), len(report.regions))
        return float(100 * iou(counts[None]).nanmean())

    return dict(zip(ids, over_images(score, ids), strict=True)) if ids else {}


def image_panel(report: Report, image_id: str, miou: float) -> str:
    """image | CAM | region mask | pseudo label | prediction | ground truth."""
    image, truth = report.folder.image(image_id), report.folder.mask(image_id)
    shown = [("image", pictures.photo(image), False)]
    cams, labels = report.files.root / "cams/val", report.files.root / "labels/val"
    chosen = report.files.score("cams_val")
    if chosen is not None and (cams / f"{image_id}.npz").is_file():
        maps, class_ids = read_cams(cams, image_id)
        mask = best_regions(*label_scores(maps, class_ids, chosen["threshold"])).numpy()
        shown += [
            ("CAM", pictures.heat(image, maps.numpy()), False),
            ("region mask", pictures.labels(mask), True),
        ]
    for caption, folder in (("pseudo label", labels), ("prediction", report.predictions)):
        if (folder / f"{image_id}.png").is_file():
            label = read_label_png(folder / f"{image_id}.png", len(report.folder.classes))
            shown.append((caption, pictures.labels(label), True))
    shown.append(("ground truth", pictures.labels(truth), True))
    names = ", ".join(report.regions[r] for r in np.unique(truth) if 0 < r < 255) or "no class"
    return html.panel(image_id, f"{names}; mIoU of the prediction {miou:.1f}", shown, len(shown))


def panels(report: Report) -> str:
    """The images that are predicted worst, and best."""
    order = sorted(
        (score, image_id) for image_id, score in image_scores(report).items() if not np.isnan(score)
    )
    if not order or not report.images:
        return ""
    count = min(report.images, len(order) // 2 or 1)
    colours = [(name, pictures.colour_of(region)) for region, name in enumerate(report.regions)]
    parts = [
        html.note("By the mIoU of the prediction over the regions that an image has or is given."),
        html.legend([*colours, ("not counted", pictures.colour_of(255))]),
    ]
    worst, best = order[:count], order[len(order) - count :][::-1]
    for heading, chosen in (("Worst", worst), ("Best", best if len(order) > 1 else [])):
        rows = "".join(image_panel(report, image_id, score) for score, image_id in chosen)
        parts.append(
            f'<h3 style="margin:22px 0 8px">{heading}</h3><div class="panels">{rows}</div>' if rows else ""
        )
    return "".join(parts)


def configuration(report: Report) -> str:
    """The file that configured the run."""
    name, values = report.files.config
    text = escape(yaml.safe_dump(values, sort_keys=False, width=110))
    return f'<div class="card"><details><summary>{escape(name)}</summary><pre>{text}</pre></details></div>'


def run(config: ReportConfig, log: Log | None = None) -> Path:
    """Write the page; returns its path."""
    files = RunFiles(config.run)
    files.require_something()
    data = from_dict(DataConfig, files.config[1]["data"], str(config.run))
    report = Report(files, open_data(data.folder), data.splits.val_split, config.images)
    source = files.metrics or files.segmentation
    said = (source.get("commit") or "unknown")[:12]
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    sections = [
        ("stages", "From CAMs to predictions", stages(report)),
        ("ablation", "Ablation", ablation(report)),
        ("classes", "Classes", classes(report)),
        ("thresholds", "Background threshold", thresholds(report)),
        ("losses", "Losses", losses(report)),
        ("images", "Images", panels(report)),
        ("configuration", "Configuration", configuration(report)),
    ]
    title = f"{config.run.resolve().name}: {report.folder.name}"
    subtitle = f"{len(report.folder.classes)} classes; held out: {report.split}; from image-level labels"
    text = html.page(title, subtitle, sections, tiles(report), f"Commit {said}; {versions}.")
    path = config.out or config.run / "report.html"
    write_text(path, text)
    (log or Log()).say(f"{path}: {len(text) / 1e6:.1f} MB")
    return path


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run(parse(ReportConfig, argv, prog="python -m pssl.report"))


if __name__ == "__main__":
    main()
