"""Train a segmentation network on pseudo labels and score it: ``python -m pssl.segment --labels runs/labels``.

OUT holds afterwards: config.yaml, segment.json (mIoU and IoU of every class on the held-out split), losses.csv,
checkpoints/segment.safetensors, and the predictions as palette PNGs, laid out as the PASCAL VOC evaluation server
takes them: OUT/results/VOC2012/Segmentation/comp6_SPLIT_cls. ``--resume`` carries on a run that was stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pssl.cli import command
from pssl.config.data import SplitDataConfig
from pssl.config.mapping import to_dict
from pssl.config.segment import SegmentSettings
from pssl.config.values import PART
from pssl.core import ranks
from pssl.core.device import resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.settings_file import write_or_require_same
from pssl.core.threads import over_images
from pssl.data.open import DataFolder, open_data
from pssl.data.origin import Origin, folder_from, require_classes, splits_from
from pssl.data.split import Split, open_split
from pssl.data.voc import read_label_png, server_folder
from pssl.models.backbones import find_backbone
from pssl.models.checkpoints import load_segmenter
from pssl.models.deeplab import DeepLab
from pssl.scoring.results import commit, iou_table, versions
from pssl.scoring.scoring import LabelScorer
from pssl.training.segmentation import train_segmenter, write_prediction


def segment_recipes(settings: SegmentSettings, backbone: str, section: str = "") -> dict[str, str]:
    """Return the recipe that `settings`, a section of a configuration, start from (see pssl.cli), if any.

    Where they leave it to the backbone ("auto"), it is the one that the backbone of this name brings. Raises InputError
    for unknown backbones, the one of `settings` included.
    """
    find_backbone(settings.model.backbone)  # in pssl.pipeline, before anything is trained
    name = find_backbone(backbone).segment_recipe if settings.recipe == "auto" else settings.recipe
    return {} if name is None else {section: f"segment/{name}"}


@dataclass
class SegmentConfig:
    """`python -m pssl.segment`: DeepLab on pseudo labels."""

    settings: Annotated[SegmentSettings, PART] = field(default_factory=SegmentSettings)
    labels: Path = Path("runs/labels")
    """Folder of label PNGs for the training split: of pssl.refine, or others; 255 is not learnt from."""
    data: SplitDataConfig = field(default_factory=SplitDataConfig)
    """Settings that are left as they are: those that the labels were made from, if their folder says it."""
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

    @property
    def recipes(self) -> dict[str, str]:
        """The recipes to start from: section to file (see pssl.cli)."""
        return segment_recipes(self.settings, self.settings.model.backbone)

    @property
    def predictions(self) -> Path:
        """The folder of predictions."""
        return server_folder(self.out, self.data.splits.val_split)


def predict(config: SegmentConfig, folder: DataFolder, split: Split, net: DeepLab, log: Log) -> None:
    """Label the held-out split, ranks sharing the images; predictions that are there are kept."""
    out, settings = config.predictions, config.settings
    out.mkdir(parents=True, exist_ok=True)
    todo = [image_id for image_id in ranks.share(split.ids) if not (out / f"{image_id}.png").is_file()]

    def work(image_id: str) -> None:
        write_prediction(net, folder, image_id, out, settings.predict, settings.crf)

    with log.progress(f"label {split.name}", len(todo)) as bar:
        for _ in over_images(work, todo, config.workers):
            bar.advance()
    ranks.wait()


def score(config: SegmentConfig, folder: DataFolder, split: Split, log: Log) -> dict | None:
    """Score the predictions; None for a split without masks, as VOC's test split is."""
    if not split.scored:
        log.say(f"{split.name} has no masks: nothing to score")
        return None
    scorer = LabelScorer(len(folder.classes) + 1)
    for image_id in ranks.share(split.scored):
        path = config.predictions / f"{image_id}.png"
        scorer.add(read_label_png(path, len(folder.classes)), folder.mask(image_id))
    return scorer.result().summary(("background", *folder.classes), "missed")


def forget_predictions(config: SegmentConfig) -> None:
    """Remove predictions of an earlier network."""
    if ranks.is_first() and config.predictions.is_dir():
        for path in config.predictions.glob("*.png"):
            path.unlink()
    ranks.wait()


def open_run(config: SegmentConfig, log: Log) -> tuple[SegmentConfig, DataFolder, dict[str, Split]]:
    """Take the data from the labels where they are not given, and open what is needed of them."""
    place = config.labels if config.checkpoint is None else config.checkpoint.parent
    if config.checkpoint is None and not place.is_dir():
        raise FileNotFoundError(f"{place}: expected a folder of label PNGs, found none")
    data = SplitDataConfig(folder_from(place, config.data.folder), splits_from(place, config.data.splits))
    config = replace(config, data=data)
    folder = open_data(data.folder)
    require_classes(place, folder.classes)
    splits = {"val": open_split(folder, data.splits.val_split, data.folder, log)}
    if config.checkpoint is None:
        train = open_split(folder, data.splits.train_split, data.folder, log)
        splits["train"] = train.selection(config.images)
    return config, folder, splits


def keep_settings(config: SegmentConfig, folder: DataFolder) -> None:
    """Write OUT/config.yaml and OUT/data.yaml; on `resume` the former must say the same already."""
    if not config.resume and ranks.is_first():
        (config.out / "config.yaml").unlink(missing_ok=True)
    own = ("out", "workers", "device", "resume")
    settings = {key: value for key, value in to_dict(config).items() if key not in own}
    write_or_require_same(config.out / "config.yaml", settings)
    Origin(config.data, config.data.splits.val_split, tuple(folder.classes)).write(config.out)


@command("pssl.segment", SegmentConfig)
def run(config: SegmentConfig, log: Log) -> dict:
    """Train, label, score; return what segment.json holds."""
    begin, settings = time.perf_counter(), config.settings
    config, folder, splits = open_run(config, log)
    keep_settings(config, folder)
    device, trained = resolve_device(config.device), {}
    if config.checkpoint is not None:
        net = load_segmenter(config.checkpoint, folder.classes).to(device)
    else:
        net, trained = train_segmenter(
            settings, folder, splits["train"], config.labels, settings.size or config.data.splits.size,
            seed=config.seed, out=config.out, workers=config.workers, resume=config.resume, device=device, log=log,
        )  # fmt: skip
    if log.losses or not config.resume:
        forget_predictions(config)
    predict(config, folder, splits["val"], net, log)
    scores = score(config, folder, splits["val"], log)
    result = {
        "data": folder.name,
        "split": splits["val"].name,
        "head": settings.model.head,
        "backbone": settings.model.backbone,
        "scales": list(settings.predict.scales),
        "flip": settings.predict.flip,
        "crf": settings.predict.crf,
        **splits["val"].counts(),
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
            log.say(f"{folder.name}, {result['split']}, {result['images']} images, {settings.model.head}")
            log.console.print(iou_table(result))
        left_out = "".join(split.said() for split in splits.values())
        log.say(f"{result['seconds']:.0f} s in all; predictions in {config.predictions}{left_out}")
    return result


if __name__ == "__main__":
    run.main()
