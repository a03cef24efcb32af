"""Score CAMs, pseudo labels or predictions against ground truth, image by image.

``python -m pssl.evaluate --cams runs/cams``: CAM files at every background threshold, or at every power alpha of a
background score (1 - max CAM)^alpha, or at a fixed one. ``python -m pssl.evaluate --labels runs/labels``: a folder of
label PNGs, pseudo labels and predictions alike. Prints mIoU and per-class IoU and writes them, with how they
were come by and the whole curve, to OUT (JSON).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pssl.cli import command
from pssl.config.data import FolderConfig
from pssl.config.reading import SweepConfig
from pssl.config.values import Floats
from pssl.core import ranks
from pssl.core.errors import InputError
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.threads import over_images
from pssl.data.open import DataFolder, open_data
from pssl.data.origin import folder_from, require_classes, split_from
from pssl.data.split import Split, even_selection, open_split
from pssl.data.voc import read_label_png
from pssl.models.cam_files import read_cams
from pssl.reporting.comparison import draw_strip
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
    """Settings that are left as they are: those that the files were made from, if their folder says it."""
    split: str | None = None
    """Split to score; every image of it that has a mask needs a file. None: the one whose images the files are of, if
    their folder says it, else train."""
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
    pictures: int = 6
    """CAMs: images drawn at several thresholds side by side into thresholds.png, beside the CAMs. 0: none."""
    looks: Floats = (0.2, 0.3, 0.4, 0.5, 0.6)
    """CAMs: the thresholds of those pictures."""
    out: Path | None = None
    """JSON file to write. None: scores.json in the folder that is scored."""

    def __post_init__(self) -> None:
        if self.unsure not in ("missed", "ignored"):
            raise InputError(f"unsure: expected 'missed' or 'ignored', got {self.unsure!r}")
        if self.powers and self.threshold is not None:
            raise InputError("powers: expected none beside a threshold, got both")
        if not self.looks or not all(0 < look < 1 for look in self.looks):
            raise InputError(f"looks: expected thresholds between 0 and 1, got {self.looks}")
        if self.pictures < 0:
            raise InputError(f"pictures: expected 0 or more, got {self.pictures}")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"threshold: expected a value of 0 or more, below 1, got {self.threshold}")

    @property
    def place(self) -> Path:
        """The folder that is scored."""
        return self.labels or self.cams


def score_cams(config: EvaluateConfig, folder: DataFolder, ids: list[str], log: Log) -> dict:
    """Score CAM files: the sweep always, a fixed threshold beside it."""
    steps = threshold_steps(config.evaluation.steps)
    given = () if config.threshold is None else (config.threshold,)
    swept = power_thresholds(config.powers) if config.powers else sorted({*steps, *given})
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


def score_labels(config: EvaluateConfig, folder: DataFolder, ids: list[str], log: Log) -> dict:
    """Score label PNGs."""
    scorer = LabelScorer(len(folder.classes) + 1)

    def read(image_id: str) -> tuple:
        path = config.labels / f"{image_id}.png"
        labels, truth = read_label_png(path, len(folder.classes)), folder.mask(image_id)
        if labels.shape != truth.shape:
            raise InputError(f"{path}: expected the ground truth's size {truth.shape}, got {labels.shape}")
        return labels, truth

    with log.progress(f"score {config.split}", len(ids)) as bar:
        for labels, truth in over_images(read, ranks.share(ids)):
            scorer.add(labels, truth)
            bar.advance()
    return scorer.result().summary(("background", *folder.classes), config.unsure)


def draw_thresholds(config: EvaluateConfig, folder: DataFolder, split: Split, log: Log) -> None:
    """Draw some images at several thresholds side by side, for a person to choose one by looking."""
    if not ranks.is_first() or not config.pictures:
        return
    path = config.cams / "thresholds.png"
    ids = even_selection(split.ids, config.pictures)
    images = [(i, folder.image(i), *read_cams(config.cams, i)) for i in ids]
    draw_strip(path, images, config.looks, folder.classes)
    looks, middle = ", ".join(f"{t:g}" for t in config.looks), config.looks[len(config.looks) // 2]
    log.say(
        f"{path}: {len(ids)} images at the thresholds {looks}; "
        f"`python -m pssl.refine --cams {config.cams} --threshold {middle:g}` takes the one that looks best"
    )


@command("pssl.evaluate", EvaluateConfig)
def run(config: EvaluateConfig, log: Log) -> dict:
    """Score the files; return what the JSON file holds."""
    place = config.place
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: expected a folder to score, found none")
    config = replace(config, data=folder_from(place, config.data), split=split_from(place, config.split))
    folder = open_data(config.data)
    require_classes(place, folder.classes)
    split = open_split(folder, config.split, config.data, log).selection(config.images)
    if not split.scored and config.labels is not None:
        raise InputError(
            f"{folder.root}, split {split.name}: expected masks to score label images by, found none"
        )
    if config.labels is None:
        draw_thresholds(config, folder, split, log)
    if not split.scored:
        return {"data": folder.name, "scored": None, "split": config.split, **split.counts()}
    score = score_cams if config.labels is None else score_labels
    result = {
        "data": folder.name,
        "scored": "cams" if config.labels is None else "labels",
        "split": config.split,
        **split.counts(),
        **score(config, folder, split.scored, log),
        "commit": commit(),
        "versions": versions(),
    }
    if ranks.is_first():
        write_text(config.out or place / "scores.json", json.dumps(result, indent=1))
        log.say(f"{headline(result)}{split.said()}")
        log.console.print(iou_table(result))
    return result


def headline(result: dict) -> str:
    """Return what was scored, and how, in a line."""
    how = f"255 is {result['unsure']}" if result["scored"] == "labels" else ""
    if result["scored"] == "cams":
        chosen = "given" if result["threshold_from"] == "given" else f"best on {result['threshold_from']}"
        power = result["power"]
        how = f"threshold {result['threshold']:.2f}" if power is None else f"background power {power:g}"
        how += f" ({chosen})"
    return f"{result['data']}, {result['split']}, {result['images']} images, {how}"


if __name__ == "__main__":
    run.main()
