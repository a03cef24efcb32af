"""Everything in one go: ``python -m pssl.pipeline``, from images with labels to a segmentation network and its mIoU.

Trains the CAM networks, writes CAMs, refines them to pseudo labels, trains a segmentation network on these, scores
all of it and makes a page of it. OUT holds a folder for each stage (train, cams, labels, segment, scores),
pipeline.yaml (runs the same again), pipeline.json (how long each stage took, what came out) and report.html. A run that
was stopped carries on where it stopped: stages that are done are kept, and training, refinement and predictions carry
on inside theirs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from rich.table import Table

from pssl import cams, evaluate, refine, report, segment, train
from pssl.cli import command
from pssl.config.data import SplitDataConfig
from pssl.config.mapping import to_dict
from pssl.config.refine import RefineSettings
from pssl.config.segment import SegmentSettings
from pssl.config.train import TrainConfig
from pssl.config.values import PART
from pssl.core import ranks
from pssl.core.checkpoint import load_description
from pssl.core.errors import InputError
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.settings_file import write_or_require_same
from pssl.data.open import open_data
from pssl.data.split import open_split
from pssl.scoring.results import commit, versions

ROLES = ("train", "val")


def _training() -> TrainConfig:
    return TrainConfig(arms=("classifier_long", "rcm+mam"), out=Path("runs/pipeline"), resume=True)


@dataclass
class PipelineConfig:
    """`python -m pssl.pipeline`: train, CAMs, pseudo labels, segmentation, scores.

    A run that was stopped carries on; with `--no-resume` OUT must be new.
    """

    train: Annotated[TrainConfig, PART] = field(default_factory=_training)
    refine: RefineSettings = field(default_factory=RefineSettings)
    segment: SegmentSettings = field(default_factory=SegmentSettings)
    arm: str = "rcm+mam"
    """The one of `arms` whose CAMs become pseudo labels."""
    readout: Literal["cam", "prototype"] = "cam"
    """"cam": the paper's; "prototype": softmax over cosines to RCM's prototypes."""
    warm_start: bool = True
    """Segmentation starts from the backbone of `arm`, where that was trained and is of the segmentation network's kind
    (measured on the embedded set, whose backbone starts from random weights)."""
    workers: int | None = None
    """Images refined, read and labelled at a time, a thread each. None: as many as processors."""

    def __post_init__(self) -> None:
        arms = self.train.arms
        if self.arm not in arms:
            raise InputError(f"arm: expected one of the arms {', '.join(arms)}, got {self.arm!r}")
        if self.train.seeds:
            raise InputError(f"seeds: expected none, the pipeline runs one seed; got {self.train.seeds}")

    @property
    def recipes(self) -> dict[str, str]:
        """The recipes to start from: section to file (see pssl.cli)."""
        own = segment.segment_recipes(self.segment, self.train.model.backbone, "segment")
        return {**self.train.recipes, **own}

    @property
    def out(self) -> Path:
        """Folder for everything the run leaves behind."""
        return self.train.out

    @property
    def checkpoint(self) -> Path:
        """The CAM network whose CAMs become pseudo labels."""
        return self.out / "train/checkpoints" / f"{self.arm}.safetensors"

    def folder(self, stage: str, role: str) -> Path:
        """Return OUT's folder of a stage ("cams" or "labels") and a role, "train" or "val"."""
        return self.out / stage / role

    def split(self, role: str) -> str:
        """Return the split of a role."""
        splits = self.train.data.splits
        return splits.train_split if role == "train" else splits.val_split


def run_train(config: PipelineConfig, log: Log) -> dict:
    """Train the CAM networks of all arms."""
    metrics = train.run(replace(config.train, out=config.out / "train", resume=True), log)
    return {f"{row['arm']}, {row['readout']}": row["val_miou"] for row in metrics["summary"]}


def run_cams(config: PipelineConfig, log: Log) -> dict:
    """Write the CAMs of both splits."""
    for role in ROLES:
        stage = cams.CamsConfig(
            checkpoint=config.checkpoint,
            data=config.train.data.folder,
            split=config.split(role),
            readout=config.readout,
            inference=config.train.inference,
            out=config.folder("cams", role),
            device=config.train.device,
        )
        cams.run(stage, log)
    return {}


def run_refine(config: PipelineConfig, log: Log) -> dict:
    """Write the pseudo labels of both splits: the training split's to learn from, the other's to be looked at."""
    seconds: dict[str, dict] = {}
    background: dict = {}
    for role in ROLES:
        settings = config.refine
        if role == "val":  # as on the training split
            affinity = settings.affinity
            trained = config.folder("labels", "train") / "affinity.safetensors"
            affinity = replace(affinity, checkpoint=affinity.checkpoint or trained)
            chosen = {"threshold": background["threshold"], "power": background["power"]}
            settings = replace(settings, affinity=affinity, **chosen)
        stage = refine.RefineConfig(
            settings=settings,
            cams=config.folder("cams", role),
            data=config.train.data.folder,
            split=config.split(role),
            out=config.folder("labels", role),
            seed=config.train.seed,
            workers=config.workers,
            device=config.train.device,
        )
        result = refine.run(stage, log)
        seconds[role] = result["seconds_per_image"]
        background = background or result["background"]
    return {"seconds_per_image": seconds, "background": background}


def run_segment(config: PipelineConfig, log: Log) -> dict:
    """Train the segmentation network and write its predictions."""
    result = segment.run(segment_config(config), log)
    return {"miou": result.get("miou")}


def segment_config(config: PipelineConfig) -> segment.SegmentConfig:
    """Return the configuration of pssl.segment."""
    settings, model = config.segment, config.train.model
    kind = ("backbone", "timm", "output_stride", "width")
    alike = all(getattr(model, name) == getattr(settings.model, name) for name in kind)
    if config.warm_start and not model.frozen and settings.model.init is None and alike:
        settings = replace(settings, model=replace(settings.model, init=config.checkpoint))
    return segment.SegmentConfig(
        settings=settings,
        labels=config.folder("labels", "train"),
        data=SplitDataConfig(config.train.data.folder, config.train.data.splits),
        out=config.out / "segment",
        seed=config.train.seed,
        workers=config.workers,
        device=config.train.device,
        resume=True,
    )


def run_evaluate(config: PipelineConfig, log: Log) -> dict:
    """Score CAMs and pseudo labels on both splits, and the predictions.

    CAMs of the held-out split are scored at the threshold that is best on the training split.
    """
    scores = {}

    def score(name: str, **settings) -> dict:
        stage = evaluate.EvaluateConfig(
            data=config.train.data.folder,
            evaluation=config.train.evaluation.sweep,
            out=config.out / "scores" / f"{name}.json",
            **settings,
        )
        scores[name] = evaluate.run(stage, log)
        return scores[name]

    folder = open_data(config.train.data.folder)
    masks = {
        r: bool(open_split(folder, config.split(r), config.train.data.folder, log).scored) for r in ROLES
    }
    stated = load_description(config.checkpoint)["thresholds"][config.readout]
    found = score("cams_train", cams=config.folder("cams", "train"), split=config.split("train"))
    held = config.split("val")
    threshold = found.get("threshold", stated)
    score("cams_val", cams=config.folder("cams", "val"), split=held, threshold=threshold)
    for role in filter(masks.get, ROLES):
        score(f"labels_{role}", labels=config.folder("labels", role), split=config.split(role))
    if masks["val"]:
        score("predictions_val", labels=segment_config(config).predictions, split=held)
    return {name: result["miou"] for name, result in scores.items() if "miou" in result}


STAGES: dict[str, Callable[[PipelineConfig, Log], dict]] = {
    "train": run_train,
    "cams": run_cams,
    "refine": run_refine,
    "segment": run_segment,
    "evaluate": run_evaluate,
}


def run_stage(name: str, config: PipelineConfig, log: Log) -> dict:
    """Run one stage, or take what it said when it was done; OUT/done/NAME.json appears when it is."""
    path = config.out / "done" / f"{name}.json"
    if path.is_file():
        log.say(f"{name}: done earlier")
        return json.loads(path.read_text(encoding="utf-8"))
    log.say(f"── {name}")
    begin = time.perf_counter()
    outcome = STAGES[name](config, log.stage())
    outcome = {"seconds": round(time.perf_counter() - begin, 1), **outcome}
    ranks.wait()
    if ranks.is_first():
        write_text(path, json.dumps(outcome, indent=1))
    ranks.wait()
    return outcome


@command("pssl.pipeline", PipelineConfig)
def run(config: PipelineConfig, log: Log) -> dict:
    """Run all stages; return what pipeline.json holds."""
    path = config.out / "pipeline.yaml"
    if path.is_file() and not config.train.resume:
        raise InputError(f"{config.out}: expected a new folder without resume, got one with a pipeline.yaml")
    open_data(config.train.data.folder)  # before anything is written
    moving = ("out", "workers", "threads", "device", "resume")
    write_or_require_same(path, {key: value for key, value in to_dict(config).items() if key not in moving})
    stages = {name: run_stage(name, config, log) for name in STAGES}
    result = {
        "stages": stages,
        "seconds": round(sum(outcome["seconds"] for outcome in stages.values()), 1),
        "commit": commit(),
        "versions": versions(),
    }
    if ranks.is_first():
        write_text(config.out / "pipeline.json", json.dumps(result, indent=1))
        if set(stages["evaluate"]) - {"seconds"}:
            log.console.print(closing_table(config, stages["evaluate"]))
        report.run(report.ReportConfig(run=config.out), log)
        log.say(f"{result['seconds']:.0f} s in all; results in {config.out}")
    return result


def closing_table(config: PipelineConfig, scores: dict) -> Table:
    """Return the mIoU from stage to stage."""
    table = Table(
        title="mIoU in percent", caption="CAMs: at the threshold that is best on the training split"
    )
    for name in ("", *map(config.split, ROLES)):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        f"CAMs ({config.arm}, {config.readout})": "cams",
        f"pseudo labels ({config.refine.method})": "labels",
        f"predictions ({config.segment.model.head})": "predictions",
    }
    for title, name in rows.items():
        found = (scores.get(f"{name}_{role}") for role in ROLES)
        table.add_row(title, *("" if value is None else f"{value:.1f}" for value in found))
    return table


if __name__ == "__main__":
    run.main()
