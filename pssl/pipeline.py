"""Everything in one go: ``python -m pssl.pipeline``, from images with labels to a segmentation network and its mIoU.

Trains the CAM networks, writes CAMs, refines them to pseudo labels, trains a segmentation network on these, scores
all of it and makes a page of it. OUT holds a folder for each stage (train, cams, labels, segment, scores),
pipeline.yaml (runs the same again), pipeline.json (how long each stage took, what came out) and report.html. A run that
was stopped carries on where it stopped: stages that are done are kept, and training, refinement and predictions carry
on inside theirs.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from rich.table import Table

from pssl import cams, evaluate, refine, report, segment, train
from pssl.cli import parse
from pssl.config.mapping import from_dict, to_dict
from pssl.config.refine import RefineSettings
from pssl.config.segment import SegmentSettings
from pssl.config.train import TrainConfig
from pssl.config.values import Names
from pssl.core import ranks
from pssl.core.device import resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.settings_file import claim
from pssl.scoring.results import commit, versions

SPLITS = ("train", "val")


@dataclass
class PipelineConfig(TrainConfig):
    """`python -m pssl.pipeline`: train, CAMs, pseudo labels, segmentation, scores."""

    refine: RefineSettings = field(default_factory=RefineSettings)
    segment: SegmentSettings = field(default_factory=SegmentSettings)
    arms: Names = ("classifier_long", "rcm+mam")
    """Arms to train and compare."""
    arm: str = "rcm+mam"
    """The one of `arms` whose CAMs become pseudo labels."""
    readout: Literal["cam", "prototype"] = "cam"
    """"cam": the paper's; "prototype": softmax over cosines to RCM's prototypes."""
    out: Path = Path("runs/pipeline")
    """Folder for everything the run leaves behind."""
    warm_start: bool = True
    """Segmentation starts from the backbone of `arm`, where that was trained and is of the segmentation network's kind
    (measured on the embedded set, whose backbone starts from random weights)."""
    workers: int | None = None
    """Images refined, read and labelled at a time, a thread each. None: as many as processors."""
    resume: bool = True
    """Carry on from what OUT holds; the configuration must be the same. Without it, OUT must be new."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arm not in self.arms:
            raise ValueError(f"arm: expected one of the arms {', '.join(self.arms)}, got {self.arm!r}")
        if self.seeds:
            raise ValueError(f"seeds: expected none, the pipeline runs one seed; got {self.seeds}")

    @property
    def recipes(self) -> dict[str, str]:
        """The recipes to start from: section to file (see pssl.cli)."""
        return {**super().recipes, "segment": self.segment.recipe_for(self.model.backbone)}

    def folder(self, stage: str, split: str) -> Path:
        """OUT's folder of a stage ("cams" or "labels") and a role, "train" or "val"."""
        return self.out / stage / split

    def split(self, role: str) -> str:
        """The split of a role."""
        return self.data.train_split if role == "train" else self.data.val_split


def run_train(config: PipelineConfig, log: Log) -> dict:
    """The CAM networks of all arms."""
    own = {item.name: getattr(config, item.name) for item in dataclasses.fields(TrainConfig)}
    metrics = train.run(TrainConfig(**{**own, "out": config.out / "train", "resume": True}), log)
    rows = metrics["summary"]
    return {f"{row['arm']}, {row['readout']}": row["val_miou"] for row in rows}


def run_cams(config: PipelineConfig, log: Log) -> dict:
    """The CAMs of both splits."""
    checkpoint = config.out / "train/checkpoints" / f"{config.arm}.safetensors"
    for role in SPLITS:
        cams.run(
            cams.CamsConfig(
                checkpoint=checkpoint,
                data=config.data,
                split=config.split(role),
                readout=config.readout,
                inference=config.inference,
                out=config.folder("cams", role),
                device=config.device,
            ),
            log,
        )
    return {}


def run_refine(config: PipelineConfig, log: Log) -> dict:
    """The pseudo labels of both splits: the training split's to learn from, the other's to be looked at."""
    seconds: dict[str, dict] = {}
    background: dict = {}
    for role in SPLITS:
        own = {item.name: getattr(config.refine, item.name) for item in dataclasses.fields(RefineSettings)}
        if role == "val" and own["affinity"].checkpoint is None:
            trained = config.folder("labels", "train") / "affinity.safetensors"
            own["affinity"] = dataclasses.replace(own["affinity"], checkpoint=trained)
        if role == "val":
            own |= {"threshold": background["threshold"], "power": background["power"]}
        result = refine.run(
            refine.RefineConfig(
                **own,
                cams=config.folder("cams", role),
                data=config.data,
                split=config.split(role),
                out=config.folder("labels", role),
                seed=config.seed,
                workers=config.workers,
                device=config.device,
            ),
            log,
        )
        seconds[role] = result["seconds_per_image"]
        background = background or result["background"]
    return {"seconds_per_image": seconds, "background": background}


def run_segment(config: PipelineConfig, log: Log) -> dict:
    """The segmentation network and its predictions."""
    result = segment.run(segment_config(config), log)
    return {"miou": result.get("miou")}


def segment_config(config: PipelineConfig) -> segment.SegmentConfig:
    """The configuration of pssl.segment."""
    own = {item.name: getattr(config.segment, item.name) for item in dataclasses.fields(SegmentSettings)}
    if config.warm_start and not config.model.frozen and own["model"].init is None:
        kind = ("backbone", "timm", "output_stride", "width")
        if all(getattr(config.model, name) == getattr(own["model"], name) for name in kind):
            trained = config.out / "train/checkpoints" / f"{config.arm}.safetensors"
            own["model"] = dataclasses.replace(own["model"], init=trained)
    return segment.SegmentConfig(
        **own,
        labels=config.folder("labels", "train"),
        data=config.data,
        out=config.out / "segment",
        seed=config.seed,
        workers=config.workers,
        device=config.device,
        resume=True,
    )


def run_evaluate(config: PipelineConfig, log: Log) -> dict:
    """Scores of CAMs and pseudo labels on both splits, and of the predictions; CAMs of the held-out split are scored
    at the threshold that is best on the training split."""
    scores = {}

    def score(name: str, **settings) -> dict:
        own = {
            "data": config.data,
            "evaluation": config.evaluation,
            "out": config.out / "scores" / f"{name}.json",
        }
        scores[name] = evaluate.run(evaluate.EvaluateConfig(**own, **settings), log)
        return scores[name]

    chosen = score("cams_train", cams=config.folder("cams", "train"), split=config.data.train_split)[
        "threshold"
    ]
    held = config.data.val_split
    score("cams_val", cams=config.folder("cams", "val"), split=held, threshold=chosen)
    for role in SPLITS:
        score(f"labels_{role}", labels=config.folder("labels", role), split=config.split(role))
    score("predictions_val", labels=segment_config(config).predictions, split=held)
    return {name: result["miou"] for name, result in scores.items()}


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
    outcome = STAGES[name](config, Log(log.console))
    outcome = {"seconds": round(time.perf_counter() - begin, 1), **outcome}
    ranks.wait()
    if ranks.is_first():
        write_text(path, json.dumps(outcome, indent=1))
    ranks.wait()
    return outcome


def run(config: PipelineConfig, log: Log | None = None) -> dict:
    """All stages; returns what pipeline.json holds."""
    ranks.start(resolve_device(config.device))
    log = log or Log()
    path = config.out / "pipeline.yaml"
    if path.is_file() and not config.resume:
        raise ValueError(f"{config.out}: expected a new folder without resume, got one with a pipeline.yaml")
    moving = ("out", "workers", "threads", "device", "resume")
    claim(path, {key: value for key, value in to_dict(config).items() if key not in moving})
    stages = {name: run_stage(name, config, log) for name in STAGES}
    result = {
        "stages": stages,
        "seconds": round(sum(outcome["seconds"] for outcome in stages.values()), 1),
        "commit": commit(),
        "versions": versions(),
    }
    if ranks.is_first():
        write_text(config.out / "pipeline.json", json.dumps(result, indent=1))
        log.console.print(closing_table(config, stages["evaluate"]))
        report.run(report.ReportConfig(run=config.out), log)
        log.say(f"{result['seconds']:.0f} s in all; results in {config.out}")
    return result


def closing_table(config: PipelineConfig, scores: dict) -> Table:
    """mIoU from stage to stage."""
    table = Table(
        title="mIoU in percent", caption="CAMs: at the threshold that is best on the training split"
    )
    for name in ("", config.data.train_split, config.data.val_split):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        f"CAMs ({config.arm}, {config.readout})": "cams",
        f"pseudo labels ({config.refine.method})": "labels",
        f"predictions ({config.segment.model.head})": "predictions",
    }
    for title, name in rows.items():
        found = (scores.get(f"{name}_{role}") for role in SPLITS)
        table.add_row(title, *("" if value is None else f"{value:.1f}" for value in found))
    return table


def read_config(out: Path) -> PipelineConfig:
    """The configuration of a run, by its pipeline.yaml."""
    path = out / "pipeline.yaml"
    return from_dict(
        PipelineConfig, {**yaml.safe_load(path.read_text(encoding="utf-8")), "out": str(out)}, str(path)
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        run(parse(PipelineConfig, argv, prog="python -m pssl.pipeline"))
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
