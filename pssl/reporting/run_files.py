"""A run as it is found: the files that it left behind, as far as it has come, and its data."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from pssl.config.data import DataConfig
from pssl.config.mapping import from_dict
from pssl.core.log import STEP_COLUMNS, Log
from pssl.data.open import DataFolder, open_data
from pssl.data.origin import folder_from, splits_from
from pssl.data.split import Split, open_split
from pssl.data.voc import server_folder
from pssl.reporting.series import Series


@dataclass(frozen=True)
class RunFiles:
    """A folder of pssl.pipeline, of pssl.train or of pssl.segment."""

    root: Path

    @property
    def train(self) -> Path:
        """The folder of pssl.train."""
        return self.root / "train" if (self.root / "train").is_dir() else self.root

    @property
    def segment(self) -> Path:
        """The folder of pssl.segment."""
        return self.root / "segment" if (self.root / "segment").is_dir() else self.root

    def read(self, path: Path) -> dict | None:
        """A JSON file's values; None where there is none."""
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def metrics(self) -> dict | None:
        """pssl.train's metrics.json."""
        return self.read(self.train / "metrics.json")

    @property
    def segmentation(self) -> dict | None:
        """pssl.segment's segment.json."""
        return self.read(self.segment / "segment.json")

    @property
    def pipeline(self) -> dict | None:
        """pssl.pipeline's pipeline.json."""
        return self.read(self.root / "pipeline.json")

    def score(self, name: str) -> dict | None:
        """A score of pssl.pipeline by name, "cams_val" for one."""
        return self.read(self.root / "scores" / f"{name}.json")

    @property
    def config(self) -> tuple[str, dict]:
        """The name and the values of the file that configured the run; FileNotFoundError where there is none."""
        for path in (
            self.root / "pipeline.yaml",
            *(folder / "config.yaml" for folder in (self.train, self.segment)),
        ):
            if path.is_file():
                return path.name, yaml.safe_load(path.read_text(encoding="utf-8"))
        raise FileNotFoundError(f"{self.root}: expected a pipeline.yaml or config.yaml, found none")

    def losses(self, path: Path) -> dict[str, list[Series]]:
        """The curves of a losses.csv by stage: its losses over its steps, each column in the colour of its place."""
        if not path.is_file():
            return {}
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
        names = [name for name in reader.fieldnames or () if name not in STEP_COLUMNS]
        found: dict[str, list[Series]] = {}
        for stage in dict.fromkeys(row["stage"] for row in rows):
            own = [row for row in rows if row["stage"] == stage]
            steps = [float(row["step"]) for row in own]
            curves = [
                Series(name, steps, [float(row[name]) if row[name] else None for row in own], colour)
                for colour, name in enumerate(names)
                if any(row[name] for row in own)
            ]
            if len(curves) == 2 and curves[0].y == curves[1].y:  # the total of one term is that term
                curves = curves[:1]
            found[stage] = [replace(curves[0], colour=0)] if len(curves) == 1 else curves
        return found

    def require_something(self) -> None:
        """FileNotFoundError where the folder holds no run."""
        if self.metrics is None and self.segmentation is None:
            raise FileNotFoundError(
                f"{self.root}: expected a folder of pssl.pipeline, pssl.train or pssl.segment, found neither "
                "metrics.json nor segment.json"
            )


@dataclass(frozen=True)
class Run:
    """A run with its data, which must still be there."""

    files: RunFiles
    folder: DataFolder
    held: Split
    """The held-out split."""

    @classmethod
    def open(cls, root: Path, log: Log) -> Run:
        """Open the run of a folder; FileNotFoundError where there is none, or no data any more.

        The data are where the stage that made the folder says (:mod:`pssl.data.origin`), else where its configuration
        does.
        """
        files = RunFiles(root)
        files.require_something()
        data = from_dict(DataConfig, files.config[1]["data"], str(root))
        place = files.train if files.metrics is not None else files.segment
        config, splits = folder_from(place, data.folder), splits_from(place, data.splits)
        folder = open_data(config)
        return cls(files, folder, open_split(folder, splits.val_split, config, log))

    @property
    def split(self) -> str:
        """The name of the held-out split."""
        return self.held.name

    @property
    def cam_threshold(self) -> float | None:
        """The background threshold of a pipeline's CAMs: what they were scored at, else what training chose."""
        score, config = self.files.score("cams_val"), self.files.config[1]
        if score is not None:
            return score["threshold"]
        if self.files.pipeline is None or self.files.metrics is None:
            return None
        arms = self.files.metrics["runs"][0]["arms"]
        return arms[config["arm"]]["readouts"][config["readout"]]["val"]["threshold"]

    @property
    def regions(self) -> tuple[str, ...]:
        """Background, then the classes."""
        return ("background", *self.folder.classes)

    @property
    def predictions(self) -> Path:
        """The folder of predictions."""
        return server_folder(self.files.segment, self.split)
