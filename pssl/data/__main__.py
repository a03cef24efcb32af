"""``python -m pssl.data PATH``: what is in a data folder, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from pssl.cli import command
from pssl.config.data import Layout
from pssl.core.log import Log
from pssl.data.label_files import write_label_csv
from pssl.data.open import open_folder
from pssl.data.summary import print_summary, summarise


@dataclass
class DataReportConfig:
    """`python -m pssl.data PATH`: images by split, classes with counts, overlap of splits, and problems.

    Exit status 1 where there are problems.
    """

    path: tyro.conf.Positional[Path] = tyro.MISSING
    """A folder in VOC 2012's layout, or COCO's."""
    splits: tyro.conf.UseAppendAction[tuple[str, ...]] = field(default_factory=tuple)
    """Read this split, or this list (a path that ends in .txt); may be given several times. Default: all."""
    layout: Layout = "auto"
    """"voc", "coco", or "auto": COCO's where there is annotations/instances_*.json."""
    labels: str = "auto"
    """Where image-level labels come from: "auto", "main", "annotations", or a .csv or .npy file."""
    masks: str = "SegmentationClass"
    """VOC's folder of ground-truth masks; SegmentationClassAug for SBD's."""
    classes: Path | None = None
    """A file of class names, one a line. None: found in the folder."""
    decode: bool = False
    """Decode every image and mask, not only their headers, and compare masks with image-level labels."""
    write_labels: Path | None = None
    """Write the image-level labels of these splits here, as CSV (a cls_labels.npy becomes readable so)."""


@command("pssl.data", DataReportConfig)
def run(config: DataReportConfig, log: Log) -> Literal[0, 1]:
    """Print the report; return 1 where there are problems, else 0."""
    folder = open_folder(
        config.path, layout=config.layout, labels=config.labels, masks=config.masks, classes=config.classes
    )
    found = summarise(folder, config.splits, decode=config.decode)
    print_summary(folder, found, log.console)
    if config.write_labels is not None:
        splits = config.splits or folder.splits
        ids = list(dict.fromkeys(image_id for split in splits for image_id in folder.ids(split)))
        write_label_csv(config.write_labels, ids, folder.image_labels(ids), folder.classes)
        log.say(f"{len(ids)} images in {config.write_labels}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    raise SystemExit(run.main())
