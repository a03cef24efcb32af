"""Train a segmentation network on pseudo labels and score it: ``python -m pssl.segment --labels runs/labels``.

OUT holds afterwards: config.yaml, segment.json (mIoU and IoU of every class on the held-out split), losses.csv,
checkpoints/segment.safetensors, and the predictions as palette PNGs, laid out as the PASCAL VOC evaluation server
takes them: OUT/results/VOC2012/Segmentation/comp6_SPLIT_cls. ``--resume`` carries on a run that was stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pssl.cli import parse
from pssl.config.data import SplitsConfig
from pssl.config.mapping import to_dict
from pssl.config.segment import SegmentSettings
from pssl.config.values import narrowed
from pssl.core import ranks
from pssl.core.device import resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.settings_file import claim
from pssl.core.threads import over_images
from pssl.data.open import DataFolder, has_mask, open_data
from pssl.data.voc import read_label_png
from pssl.models.build import new_segmenter, weights_path
from pssl.models.cam_files import even_selection
from pssl.models.checkpoints import load_segmenter, save_segmenter
from pssl.models.deeplab import DeepLab
from pssl.scoring.results import commit, iou_table, versions
from pssl.scoring.scoring import LabelScorer
from pssl.training.loop import run_stage
from pssl.training.segmentation import FrozenSegmentTraining, SegmentTraining, write_prediction


@dataclass
class SegmentConfig(SegmentSettings):
    """`python -m pssl.segment`: DeepLab on pseudo labels."""

    labels: Path = Path("runs/labels")
    """Folder of label PNGs for the training split: of pssl.refine, or others; 255 is not learnt from."""
    data: SplitsConfig = field(default_factory=SplitsConfig)
    images: int | None = None
    """Train on this many images, evenly spaced in the split's list. None: all."""
    checkpoint: Path | None = None
    """Label the held-out split with this network instead of training one."""
    out: Path = Path("runs/segment")
    """Folder for everything the run leaves behind."""
    seed: int = 0
    """Seed of weights, order and crops. Same seed, same machine, same numbers."""
    workers: int | None = None
    """Images read, and images labelled, at a time, a thread each. None: as many as processors."""
    device: str = "auto"
    """Torch device, or "auto": CUDA where there is one, else CPU. The CRF is on the CPU."""
    resume: bool = False
    """Carry on from what OUT holds; the configuration must be the same."""

    def __post_init__(self) -> None:
        self.data = narrowed(SplitsConfig, self.data)  # a CAM training's says more

    @property
    def recipes(self) -> dict[str, str]:
        """The recipes to start from: section to file (see pssl.cli)."""
        return {"": self.recipe_for(self.model.backbone)}

    @property
    def side(self) -> int:
        """Side of the square that training shows."""
        return self.size or self.data.size

    @property
    def predictions(self) -> Path:
        """The folder of predictions."""
        return self.out / "results/VOC2012/Segmentation" / f"comp6_{Path(self.data.val_split).stem}_cls"


def train(config: SegmentConfig, folder: DataFolder, device: torch.device, log: Log) -> tuple[DeepLab, dict]:
    """Train a network, or finish training it; returns it in eval mode, with how it went."""
    ids = folder.ids(config.data.train_split)
    ids = [ids[i] for i in even_selection(len(ids), config.images)]
    missing = [image_id for image_id in ids if not (config.labels / f"{image_id}.png").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{config.labels}: expected a label PNG for each of {len(ids)} images of {config.data.train_split}, "
            f"{len(missing)} are missing: {', '.join(missing[:3])}"
        )
    net, told = new_segmenter(config.model, len(folder.classes), config.seed)
    log.say(told)
    kind, more = SegmentTraining, {}
    if config.model.frozen:
        kind = FrozenSegmentTraining
        more = {
            "weights": config.model.init or weights_path(config.model),
            "backbone": config.model.backbone,
            "scales": config.frozen_scales,
            "log": log,
        }
    training = kind(
        net.to(device),
        folder,
        ids,
        config.labels,
        config.side,
        config.zoom,
        config.schedule,
        config.schedule.epochs,
        config.seed,
        config.out / "checkpoints/segment.state.pt",
        config.workers,
        **more,
    )
    trained: list[float] = []
    with log.progress("train segment", training.steps) as bar:

        def on_step(values: dict[str, float]) -> None:
            log.plot("segment", values)
            trained.append(values["step"])
            bar.reach(int(values["step"]) + 1, f"loss {values['total']:.3f}")

        run_stage(training, resume=config.resume, on_step=on_step)
        bar.reach(training.steps)
    if trained:  # else all was resumed
        log.take_losses("segment", training.history)
    outcome = {"images": len(ids), "steps": training.steps, "seconds": round(training.seconds, 1)}
    if ranks.is_first():
        path = config.out / "checkpoints/segment.safetensors"
        save_segmenter(path, net, config.model, folder.classes, size=config.side, steps=training.steps)
        if log.losses:
            log.write_losses(config.out / "losses.csv")
    return net.eval(), outcome


def predict(config: SegmentConfig, folder: DataFolder, net: DeepLab, log: Log) -> None:
    """Label the held-out split, ranks sharing the images; predictions that are there are kept."""
    out = config.predictions
    out.mkdir(parents=True, exist_ok=True)
    own = ranks.share(folder.ids(config.data.val_split))
    todo = [image_id for image_id in own if not (out / f"{image_id}.png").is_file()]

    def work(image_id: str) -> None:
        write_prediction(net, folder, image_id, out, config.predict, config.crf)

    with log.progress(f"label {config.data.val_split}", len(todo)) as bar:
        for _ in over_images(work, todo, config.workers):
            bar.advance()
    ranks.wait()


def score(config: SegmentConfig, folder: DataFolder, log: Log) -> dict | None:
    """Scores of the predictions; None for a split without masks, as VOC's test split is."""
    ids = folder.ids(config.data.val_split)
    if not any(has_mask(folder, image_id) for image_id in ids):
        log.say(f"{config.data.val_split} has no masks: nothing to score")
        return None
    scorer = LabelScorer(len(folder.classes) + 1)
    for image_id in ranks.share(ids):
        path = config.predictions / f"{image_id}.png"
        scorer.add(read_label_png(path, len(folder.classes)), folder.mask(image_id))
    return scorer.result().summary(("background", *folder.classes), "missed")


def forget_predictions(config: SegmentConfig) -> None:
    """Remove predictions of an earlier network."""
    if ranks.is_first() and config.predictions.is_dir():
        for path in config.predictions.glob("*.png"):
            path.unlink()
    ranks.wait()


def run(config: SegmentConfig, log: Log | None = None) -> dict:
    """Train, label, score; returns what segment.json holds."""
    begin = time.perf_counter()
    device = resolve_device(config.device)
    ranks.start(device)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    log = log or Log()
    folder = open_data(config.data)
    own = ("out", "workers", "device", "resume")
    settings = {key: value for key, value in to_dict(config).items() if key not in own}
    if not config.resume and ranks.is_first():
        (config.out / "config.yaml").unlink(missing_ok=True)
    claim(config.out / "config.yaml", settings)
    trained = {}
    if config.checkpoint is not None:
        net = load_segmenter(config.checkpoint, folder.classes).to(device)
    else:
        net, trained = train(config, folder, device, log)
    if log.losses or not config.resume:
        forget_predictions(config)
    predict(config, folder, net, log)
    scores = score(config, folder, log)
    result = {
        "data": folder.name,
        "split": config.data.val_split,
        "head": config.model.head,
        "backbone": config.model.backbone,
        "scales": list(config.predict.scales),
        "flip": config.predict.flip,
        "crf": config.predict.crf,
        **(scores or {}),
        "training": trained,
        "seed": config.seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "commit": commit(),
        "versions": versions(),
    }
    if ranks.is_first():
        write_text(config.out / "segment.json", json.dumps(result, indent=1))
        if scores is not None:
            log.say(f"{folder.name}, {config.data.val_split}, {scores['images']} images, {config.model.head}")
            log.console.print(iou_table(result))
        log.say(f"{result['seconds']:.0f} s in all; predictions in {config.predictions}")
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        run(parse(SegmentConfig, argv, prog="python -m pssl.segment"))
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
