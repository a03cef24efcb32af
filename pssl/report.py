"""One HTML page about a run: ``python -m pssl.report runs/pipeline``, a folder of pssl.pipeline or of one stage.

RUN/report.html needs no network and no other file: charts are SVG, pictures PNG, inside the page. What the run has not
come to is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pssl.cli import command
from pssl.core.errors import InputError
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.reporting import page, panels, sections
from pssl.reporting.run_files import Run


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
            raise InputError(f"images: expected 0 or more, got {self.images}")


@command("pssl.report", ReportConfig)
def run(config: ReportConfig, log: Log) -> Path:
    """Write the page; return its path."""
    found = Run.open(config.run, log)
    source = found.files.metrics or found.files.segmentation
    commit = (source.get("commit") or "unknown")[:12]
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    text = page.render(
        title=f"{config.run.resolve().name}: {found.folder.name}",
        subtitle=f"{len(found.folder.classes)} classes; held out: {found.split}; from image-level labels",
        tiles=sections.tiles(found),
        sections={
            "stages": sections.stages(found),
            "ablation": sections.ablation(found),
            "unscored": sections.without_masks(found),
            "classes": sections.classes(found),
            "thresholds": sections.thresholds(found),
            "losses": sections.losses(found),
            "images": panels.images(found, config.images),
            "configuration": sections.configuration(found),
        },
        closing=f"Commit {commit}; {versions}.",
    )
    path = config.out or config.run / "report.html"
    write_text(path, text)
    log.say(f"{path}: {len(text) / 1e6:.1f} MB")
    return path


if __name__ == "__main__":
    run.main()
