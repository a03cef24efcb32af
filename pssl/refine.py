"""From CAMs to pseudo labels: ``python -m pssl.refine --method affinity+crf --cams runs/cams --out runs/labels``.

One palette PNG an image in OUT, as VOC's masks are: 0 background, 1..K the classes, 255 where unsure (if asked for).
Beside them refine.yaml (the settings), data.yaml (of which images), refine.json (what came out), threshold.json (how
the background's threshold was chosen), and with "affinity" the confident labels and affinity.safetensors. Files that
are there are kept, so that a run that was stopped carries on.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch

from pssl.cams import CamsConfig, made_from
from pssl.cli import command
from pssl.config.data import DataConfig, FolderConfig, SplitDataConfig, SplitsConfig
from pssl.config.mapping import to_dict
from pssl.config.refine import SHARPNESS, RefineSettings
from pssl.config.values import PART
from pssl.core import ranks
from pssl.core.checkpoint import load_description
from pssl.core.device import resolve_device
from pssl.core.errors import InputError
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.settings_file import write_or_require_same
from pssl.core.threads import over_images
from pssl.data.open import DataFolder, open_data
from pssl.data.origin import Origin, folder_from, require_classes, same_split, split_from, splits_from
from pssl.data.palette import write_label_png
from pssl.data.split import Split, open_split
from pssl.inputs.build import build_inputs
from pssl.method.pseudo_labels import best_regions
from pssl.method.refinement import Background, Refinement
from pssl.models.checkpoints import load_net
from pssl.models.weights import file_digest
from pssl.scoring.thresholds import choose_threshold
from pssl.training.affinities import Affinities, open_affinities


@dataclass
class RefineConfig:
    """`python -m pssl.refine`: pseudo labels from CAMs."""

    settings: Annotated[RefineSettings, PART] = field(default_factory=RefineSettings)
    cams: Path = Path("runs/cams")
    """Folder of pssl.cams, or .npz files of another program like its."""
    checkpoint: Path | None = None
    """The CAM network, for its features and its threshold. None: the one that cams.yaml beside the CAMs names."""
    data: FolderConfig = field(default_factory=FolderConfig)
    """Settings that are left as they are: those that the CAMs were made from, if their folder says it."""
    split: str | None = None
    """Split to label; every image of it needs CAMs. None: the one whose images the CAMs are of, if their folder says
    it, else train."""
    images: int | None = None
    """Label this many images, evenly spaced in the split's list. None: all."""
    out: Path = Path("runs/labels")
    """Folder for the files."""
    seed: int = 0
    """Seed of the affinities' weights and order."""
    workers: int | None = None
    """Images at a time, a thread each. None: as many as processors."""
    device: str = "auto"
    """Torch device of the networks, or "auto": CUDA where there is one, else CPU. CRF, PAR and walk are on the CPU."""


def resolve(config: RefineConfig) -> tuple[RefineConfig, CamsConfig | None, Background]:
    """Fill in what is known of the CAMs: data, split, checkpoint, sharpness, background.

    Errors say what to give where it is not known.
    """
    cams, settings = config.cams, config.settings
    if not cams.is_dir():
        raise FileNotFoundError(f"{cams}: expected a folder of CAMs, found none")
    source = made_from(cams)
    readout = "cam" if source is None else source.readout
    config = replace(
        config,
        data=folder_from(cams, config.data),
        split=split_from(cams, config.split),
        checkpoint=config.checkpoint or (source.checkpoint if source else None),
        settings=replace(settings, sharpness=settings.sharpness or SHARPNESS[readout]),
    )
    background = Background(settings.threshold, settings.power, "given")
    if settings.threshold is None and settings.power is None:
        if config.checkpoint is None:
            raise InputError(
                f"threshold: expected one, or a power, for CAMs without a known checkpoint ({cams} has no cams.yaml)"
            )
        best = load_description(config.checkpoint)["thresholds"][readout]
        background = Background(best, None, "CAMs")
    if "affinity" in settings.steps and config.checkpoint is None:
        raise InputError(
            f"checkpoint: expected one for the affinities' features ({cams} has no cams.yaml to name it)"
        )
    return config, source, background


def open_features(
    config: RefineConfig,
    source: CamsConfig | None,
    background: Background,
    folder: DataFolder,
    split: Split,
    log: Log,
) -> Affinities:
    """Return the CAM network with affinities, loaded or trained on this split."""
    trained = load_net(config.checkpoint, resolve_device(config.device))
    # in memory: labels lie on one grid for all images
    data = DataConfig(config.data, SplitsConfig(size=trained.size))
    scales = {1.0, config.settings.affinity.scale, *(source.inference.scales if source else ())}
    inputs = build_inputs(folder, split.ids, trained.net, data, trained.model, scales, log)
    return open_affinities(
        trained.net, inputs, config.settings, folder, config.cams, background.crossing,
        file_digest(config.checkpoint), config.seed, config.out, config.workers, log,
    )  # fmt: skip


def choose_background(
    config: RefineConfig, refinement: Refinement, background: Background, split: Split, log: Log
) -> Background:
    """Return the CAMs' own, or on the CAM network's training split the one whose labels are best there."""
    images = config.settings.threshold_images
    if background.chosen_by != "CAMs" or images == 0:
        return background
    trained_on = load_description(config.checkpoint).get("train_split", "train")
    if not same_split(config.split, trained_on):
        return background
    kept = config.out / "threshold.json"
    threshold, used = choose_threshold(
        refinement.label,
        refinement.folder,
        split.scored,
        images,
        background.threshold,
        kept,
        config.workers,
        log,
    )
    return Background(threshold, None, f"labels of {used} images") if used else background


def write_labels(
    config: RefineConfig, refinement: Refinement, background: Background, todo: list[str], log: Log
) -> dict[str, float]:
    """Write the labels of this rank's images; return the sums of the seconds of each step and of whole images."""

    def work(image_id: str) -> dict[str, float]:
        begin = time.perf_counter()
        scores, regions, seconds = refinement.scores(image_id, background)
        labels = best_regions(scores, regions, config.settings.unsure)
        write_label_png(config.out / f"{image_id}.png", labels.numpy())
        return {**seconds, "image": time.perf_counter() - begin}

    sums = dict.fromkeys([*config.settings.steps, "image"], 0.0)
    with log.progress(f"{config.settings.method} of {config.split}", len(todo)) as bar:
        for seconds in over_images(work, todo, config.workers):
            for name, value in seconds.items():
                sums[name] += value
            bar.advance()
    return sums


@command("pssl.refine", RefineConfig)
def run(config: RefineConfig, log: Log) -> dict:
    """Label a split; return what refine.json holds."""
    config, source, background = resolve(config)
    folder = open_data(config.data)
    require_classes(config.cams, folder.classes)
    split = open_split(folder, config.split, config.data, log).selection(config.images)
    settings = {
        key: value for key, value in to_dict(config).items() if key not in ("out", "workers", "device")
    }
    digest = None if config.checkpoint is None else file_digest(config.checkpoint)
    write_or_require_same(config.out / "refine.yaml", {**settings, "checkpoint_digest": digest})
    data = SplitDataConfig(config.data, splits_from(config.cams, SplitsConfig()))
    Origin(data, config.split, tuple(folder.classes)).write(config.out)
    todo = [i for i in ranks.share(split.ids) if not (config.out / f"{i}.png").is_file()]
    features = None
    if "affinity" in config.settings.steps:
        affinities = open_features(config, source, background, folder, split, log)
        index_of = {image_id: index for index, image_id in enumerate(split.ids)}
        features = lambda image_id: affinities.features(index_of[image_id])  # noqa: E731
    refinement = Refinement(config.settings, folder, config.cams, features)
    background = choose_background(config, refinement, background, split, log)
    begin = time.perf_counter()
    sums = write_labels(config, refinement, background, todo, log)
    elapsed = time.perf_counter() - begin
    totals = ranks.sum_over_ranks(torch.tensor([len(todo), *sums.values()], dtype=torch.float64)).tolist()
    written = int(totals[0])
    per_image = {n: round(t / max(written, 1), 4) for n, t in zip(sums, totals[1:], strict=True)}
    path = config.out / "refine.json"
    if not written and path.is_file():  # what the run that wrote them took stays known
        per_image = json.loads(path.read_text(encoding="utf-8"))["seconds_per_image"]
    result = {
        "method": config.settings.method,
        "data": folder.name,
        "split": config.split,
        "background": asdict(background),
        "sharpness": config.settings.sharpness,
        **split.counts(),
        "written": written,
        "kept": len(split.ids) - written,
        "seconds": round(elapsed, 2),
        "seconds_per_image": per_image,
    }
    if ranks.is_first():
        write_text(path, json.dumps(result, indent=1))
        each = ", ".join(f"{name} {value:.3f} s" for name, value in per_image.items())
        log.say(
            f"{written} labels written, {result['kept']} kept in {config.out}{split.said()}; a thread's time: {each}"
        )
    return result


if __name__ == "__main__":
    run.main()
