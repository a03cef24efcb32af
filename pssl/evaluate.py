"""Score CAM files against ground truth: ``python -m pssl.evaluate --cams runs/cams``.

Prints mIoU and per-class IoU and writes them, with the whole threshold curve, to OUT (JSON).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from pssl.cli import parse
from pssl.config import DataConfig, EvaluationConfig
from pssl.engine import distributed
from pssl.engine.cam_files import even_selection, read_cams
from pssl.engine.checkpoint import write_text
from pssl.engine.log import Log
from pssl.engine.results import commit, versions
from pssl.engine.scoring import Scorer
from pssl.engine.workspace import open_data


@dataclass
class EvaluateConfig:
    """`python -m pssl.evaluate`: mIoU of CAM files at every background threshold."""

    cams: Path = Path("runs/cams")
    """Folder of pssl.cams."""
    data: DataConfig = field(default_factory=DataConfig)
    split: str = "train"
    """ImageSets split to score; every image of it needs a file."""
    images: int | None = None
    """Score this many images, evenly spaced in the split's list. None: all."""
    threshold: float | None = None
    """Background threshold, one of i/steps. None: the best on this split."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    out: Path | None = None
    """JSON file to write. None: scores.json in the folder of CAMs."""


def run(config: EvaluateConfig, log: Log | None = None) -> dict:
    """Score the files; returns what the JSON file holds."""
    log = log or Log()
    folder = open_data(config.data)
    ids = folder.ids(config.split)
    ids = [ids[i] for i in even_selection(len(ids), config.images)]
    scorer = Scorer(len(folder.classes) + 1, config.evaluation.steps)
    with log.progress(f"score {config.split}", len(ids)) as bar:
        for image_id in distributed.share(ids):
            cams, class_ids = read_cams(config.cams, image_id)
            scorer.add(cams, class_ids, folder.mask(image_id), folder.parts(image_id))
            bar.advance()
    score = scorer.result()
    threshold = score.best_threshold if config.threshold is None else config.threshold
    origin = config.split if config.threshold is None else "given"
    result = {
        "data": folder.name,
        "split": config.split,
        **score.summary(("background", *folder.classes), threshold, origin),
        "thresholds": score.thresholds,
        "commit": commit(),
        "versions": versions(),
    }
    write_text(config.out or config.cams / "scores.json", json.dumps(result, indent=1))
    table = Table(
        title=f"{folder.name}, {config.split}, {score.images} images, threshold {threshold:.2f} ({origin})"
    )
    table.add_column("region")
    table.add_column("IoU", justify="right")
    for name, value in result["iou"].items():
        table.add_row(name, "-" if value is None else f"{value:.1f}")
    table.add_section()
    table.add_row("mean", f"{result['miou']:.1f}")
    log.console.print(table)
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run(parse(EvaluateConfig, argv, prog="python -m pssl.evaluate"))


if __name__ == "__main__":
    main()
