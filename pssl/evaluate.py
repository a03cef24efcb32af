"""Score CAMs, pseudo labels or predictions against ground truth, image by image.

``python -m pssl.evaluate --cams runs/cams``: CAM files at every background threshold, or at every power alpha of a
background score (1 - max CAM)^alpha, or at a fixed one. ``python -m pssl.evaluate --labels runs/labels``: a folder of
label PNGs, pseudo labels and predictions alike. Prints mIoU and per-class IoU and writes them, with how they
were come by and the whole curve, to OUT (JSON).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pssl.cli import parse
from pssl.config.data import FolderConfig
from pssl.config.reading import SweepConfig
from pssl.config.values import Floats, narrowed
from pssl.core import ranks
from pssl.core.device import resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.threads import over_images
from pssl.data.open import DataFolder, open_data
from pssl.data.voc import read_label_png
from pssl.models.cam_files import even_selection, read_cams
from pssl.scoring.results import commit, iou_table, versions
from pssl.scoring.scoring import LabelScorer, Scorer, threshold_steps
from pssl_ext.ops.cam_sweep import power_thresholds


@dataclass
class EvaluateConfig:
    """`python -m pssl.evaluate`: mIoU of CAM files or of label PNGs."""

    cams: Path = Path("runs/cams")
    """Folder of pssl.cams."""
    labels: Path | None = None
    """Folder of label PNGs to score in place of CAMs: of pssl.refine, of pssl.segment, or any others."""
    data: FolderConfig = field(default_factory=FolderConfig)
    split: str = "train"
    """ImageSets split to score; every image of it needs a file."""
    images: int | None = None
    """Score this many images, evenly spaced in the split's list. None: all."""
    threshold: float | None = None
    """CAMs: background threshold. None: the best of the sweep on this split."""
    powers: Floats = ()
    """CAMs: background scores (1 - max CAM)^alpha for these alphas in place of thresholds (AffinityNet's 4 to 32); of
    several the best on this split is named."""
    unsure: Literal["missed", "ignored"] = "missed"
    """Label PNGs: a pixel of value 255 counts as "missed" by its region, or is "ignored"."""
    evaluation: SweepConfig = field(default_factory=SweepConfig)
    out: Path | None = None
    """JSON file to write. None: scores.json in the folder that is scored."""

    def __post_init__(self) -> None:
        self.data = narrowed(FolderConfig, self.data)
        self.evaluation = narrowed(SweepConfig, self.evaluation)
        if self.unsure not in ("missed", "ignored"):
            raise ValueError(f"unsure: expected 'missed' or 'ignored', got {self.unsure!r}")
        if self.powers and self.threshold is not None:
            raise ValueError("powers: expected none beside a threshold, got both")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: expected a value of 0 or more, below 1, got {self.threshold}")


def score_cams(config: EvaluateConfig, folder: DataFolder, ids: list[str], log: Log) -> dict:
    """The score of CAM files; the sweep always, a fixed threshold beside it."""
    steps = threshold_steps(config.evaluation.steps)
    swept = power_thresholds(config.powers) if config.powers else sorted({*steps, *given(config)})
    scorer = Scorer(len(folder.classes) + 1, swept)

    def read(image_id: str) -> tuple:
        return (*read_cams(config.cams, image_id), folder.mask(image_id), folder.parts(image_id))

    with log.progress(f"score {config.split}", len(ids)) as bar:
        for image in over_images(read, ranks.share(ids)):
            scorer.add(*image)
            bar.advance()
    score = scorer.result()
    threshold = score.best_threshold if config.threshold is None else config.threshold
    fixed = config.threshold is not None or len(config.powers) == 1
    result = score.summary(("background", *folder.classes), threshold, "given" if fixed else config.split)
    result["power"] = config.powers[swept.index(threshold)] if config.powers else None
    if config.powers:
        result["powers"] = list(config.powers)
    return {**result, "thresholds": score.thresholds}


def given(config: EvaluateConfig) -> tuple[float, ...]:
    """The fixed threshold, if there is one."""
    return () if config.threshold is None else (config.threshold,)


def score_labels(config: EvaluateConfig, folder: DataFolder, ids: list[str], log: Log) -> dict:
    """The score of label PNGs."""
    scorer = LabelScorer(len(folder.classes) + 1)

    def read(image_id: str) -> tuple:
        path = config.labels / f"{image_id}.png"
        labels, truth = read_label_png(path, len(folder.classes)), folder.mask(image_id)
        if labels.shape != truth.shape:
            raise ValueError(f"{path}: expected the ground truth's size {truth.shape}, got {labels.shape}")
        return labels, truth

    with log.progress(f"score {config.split}", len(ids)) as bar:
        for labels, truth in over_images(read, ranks.share(ids)):
            scorer.add(labels, truth)
            bar.advance()
    return scorer.result().summary(("background", *folder.classes), config.unsure)


def run(config: EvaluateConfig, log: Log | None = None) -> dict:
    """Score the files; returns what the JSON file holds."""
    ranks.start(resolve_device("cpu"))
    log = log or Log()
    folder = open_data(config.data)
    ids = folder.ids(config.split)
    ids = [ids[i] for i in even_selection(len(ids), config.images)]
    score = score_cams if config.labels is None else score_labels
    result = {
        "data": folder.name,
        "scored": "cams" if config.labels is None else "labels",
        "split": config.split,
        **score(config, folder, ids, log),
        "commit": commit(),
        "versions": versions(),
    }
    if ranks.is_first():
        where = config.labels or config.cams
        write_text(config.out or where / "scores.json", json.dumps(result, indent=1))
        log.say(headline(result))
        log.console.print(iou_table(result))
    return result


def headline(result: dict) -> str:
    """What was scored, and how."""
    how = f"255 is {result['unsure']}" if result["scored"] == "labels" else ""
    if result["scored"] == "cams":
        chosen = "given" if result["threshold_from"] == "given" else f"best on {result['threshold_from']}"
        power = result["power"]
        how = f"threshold {result['threshold']:.2f}" if power is None else f"background power {power:g}"
        how += f" ({chosen})"
    return f"{result['data']}, {result['split']}, {result['images']} images, {how}"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        run(parse(EvaluateConfig, argv, prog="python -m pssl.evaluate"))
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
