"""From CAMs to pseudo labels: ``python -m pssl.refine --method affinity+crf --cams runs/cams --out runs/labels``.

One palette PNG an image in OUT, as VOC's masks are: 0 background, 1..K the classes, 255 where unsure (if asked for).
Beside them refine.yaml (the settings), refine.json (what came out), threshold.json (how the background's threshold was
chosen), and with "affinity" the confident labels and affinity.safetensors. Files that are there are kept, so that a run
that was stopped carries on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pssl.cams import CamsConfig, made_from
from pssl.cli import parse
from pssl.config.data import DataConfig, FolderConfig
from pssl.config.mapping import to_dict
from pssl.config.refine import SHARPNESS, RefineSettings
from pssl.config.values import narrowed
from pssl.core import ranks
from pssl.core.checkpoint import load_description
from pssl.core.device import resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.settings_file import claim
from pssl.core.threads import over_images
from pssl.data.open import DataFolder, open_data
from pssl.data.palette import write_label_png
from pssl.inputs.build import build_inputs
from pssl.method.pseudo_labels import (
    best_regions,
    crf_step,
    label_scores,
    par_step,
    probabilities,
    walk_step,
)
from pssl.models.cam_files import even_selection, read_cams
from pssl.models.checkpoints import load_net
from pssl.models.weights import file_digest
from pssl.scoring.thresholds import choose_threshold
from pssl.training.affinities import (
    Affinities,
    load_head,
    new_head,
    save_head,
    train_affinities,
    write_confident_labels,
)
from pssl_ext.ops.cam_sweep import power_thresholds

Step = Callable[[str, Tensor, Tensor], Tensor]
"""From an image's id, its pixels uint8 [3,H,W] and scores [1+k,H,W] to new scores."""


@dataclass
class RefineConfig(RefineSettings):
    """`python -m pssl.refine`: pseudo labels from CAMs."""

    cams: Path = Path("runs/cams")
    """Folder of pssl.cams, or .npz files of another program like its."""
    checkpoint: Path | None = None
    """The CAM network, for its features and its threshold. None: the one that cams.yaml beside the CAMs names."""
    data: FolderConfig = field(default_factory=FolderConfig)
    split: str = "train"
    """ImageSets split to label; every image of it needs CAMs."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data = narrowed(FolderConfig, self.data)  # a training's says more


@dataclass(frozen=True)
class Background:
    """Its score, a threshold or a power, and whence: "given", "CAMs" (their best one), or "labels of N images"."""

    threshold: float | None
    power: float | None
    chosen_by: str


def resolve(config: RefineConfig) -> tuple[RefineConfig, CamsConfig | None, Background]:
    """Fill in checkpoint and sharpness from what is known of the CAMs, and find their background; errors say what to
    give where it is not known."""
    source = made_from(config.cams)
    readout = "cam" if source is None else source.readout
    if config.sharpness is None:
        config.sharpness = SHARPNESS[readout]
    if config.checkpoint is None and source is not None:
        config.checkpoint = source.checkpoint
    background = Background(config.threshold, config.power, "given")
    if config.threshold is None and config.power is None:
        if config.checkpoint is None:
            raise ValueError(
                "threshold: expected one, or a power, for CAMs without a known checkpoint "
                f"({config.cams} has no cams.yaml)"
            )
        best = load_description(config.checkpoint)["thresholds"][readout]
        background = Background(best, None, "CAMs")
    if "affinity" in config.steps and config.checkpoint is None:
        raise ValueError(
            f"checkpoint: expected one for the affinities' features ({config.cams} has no cams.yaml to name it)"
        )
    return config, source, background


def open_affinities(
    config: RefineConfig,
    source: CamsConfig | None,
    background: Background,
    folder: DataFolder,
    ids: Sequence[str],
    log: Log,
) -> Affinities:
    """The CAM network with affinities, loaded or trained on this split."""
    settings = config.affinity
    trained = load_net(config.checkpoint, resolve_device(config.device))
    data = DataConfig(
        **vars(config.data), size=trained.size
    )  # in memory: labels lie on one grid for all images
    scales = {1.0, settings.scale, *(source.inference.scales if source else ())}
    inputs = build_inputs(folder, ids, trained.net, data, trained.model, scales, log)
    digest = file_digest(config.checkpoint)
    if settings.checkpoint is not None:
        head = load_head(settings.checkpoint, trained.net, settings, digest)
        return Affinities(trained.net, head.eval(), inputs, settings.scale)
    affinities = Affinities(trained.net, new_head(trained.net, settings, config.seed), inputs, settings.scale)
    confident = config.out / "confident"
    threshold = background.threshold
    if background.power is not None:
        threshold = power_thresholds([background.power])[0]
    write_confident_labels(confident, folder, list(ids), config.cams, threshold, config, config.workers, log)
    train_affinities(affinities, confident, settings, config.seed, config.out / "affinity.state.pt", log)
    if ranks.is_first():
        save_head(config.out / "affinity.safetensors", affinities.head, settings.scale, digest)
    affinities.head.eval()
    return affinities


def build_steps(config: RefineConfig, affinities: Affinities | None) -> list[tuple[str, Step]]:
    """The steps of the method by name."""
    settings, sure = config.affinity, partial(probabilities, sharpness=config.sharpness)

    def walk(image_id: str, image: Tensor, scores: Tensor) -> Tensor:
        features = affinities.features(index_of[image_id])
        return walk_step(features, scores, settings.radius, settings.beta, settings.log2_steps)

    index_of = {} if affinities is None else {i: n for n, i in enumerate(affinities.inputs.ids)}
    steps = {
        "crf": lambda _, image, scores: crf_step(image, sure(scores), config.crf),
        "par": lambda _, image, scores: par_step(image, sure(scores), config.par),
        "affinity": walk,
    }
    return [(name, steps[name]) for name in config.steps]


def refined_scores(
    config: RefineConfig,
    folder: DataFolder,
    steps: list[tuple[str, Step]],
    background: Background,
    image_id: str,
) -> tuple[Tensor, list[int], dict[str, float]]:
    """An image's scores [1+k,H,W] after all steps, the regions of their rows, and the seconds of each step."""
    image = torch.from_numpy(folder.image(image_id)).permute(2, 0, 1)
    cams, class_ids = read_cams(config.cams, image_id)
    if cams.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"{config.cams / image_id}.npz: expected CAMs of the image's size {list(image.shape[1:])}, "
            f"got {list(cams.shape[1:])}"
        )
    scores, regions = label_scores(cams, class_ids, background.threshold, background.power)
    seconds = {}
    for name, step in steps if len(regions) > 1 else ():
        before = time.perf_counter()
        scores = step(image_id, image, scores)
        seconds[name] = time.perf_counter() - before
    return scores, regions, seconds


def choose_background(
    config: RefineConfig,
    folder: DataFolder,
    steps: list[tuple[str, Step]],
    background: Background,
    ids: Sequence[str],
    log: Log,
) -> Background:
    """The CAMs' own, or on the CAM network's training split the one whose labels are best there."""
    if background.chosen_by != "CAMs" or config.threshold_images == 0:
        return background
    if config.split != load_description(config.checkpoint).get("train_split", "train"):
        return background

    def label(image_id: str, threshold: float) -> Tensor:
        at = Background(threshold, None, "")
        scores, regions, _ = refined_scores(config, folder, steps, at, image_id)
        return best_regions(scores, regions)

    threshold, images = choose_threshold(
        label,
        folder,
        ids,
        config.threshold_images,
        background.threshold,
        config.out / "threshold.json",
        config.workers,
        log,
    )
    return Background(threshold, None, f"labels of {images} images") if images else background


def label_image(
    config: RefineConfig,
    folder: DataFolder,
    steps: list[tuple[str, Step]],
    background: Background,
    image_id: str,
) -> dict[str, float]:
    """Write one image's labels; returns the seconds of each step and of the whole."""
    begin = time.perf_counter()
    scores, regions, seconds = refined_scores(config, folder, steps, background, image_id)
    labels = best_regions(scores, regions, config.unsure)
    write_label_png(config.out / f"{image_id}.png", labels.numpy())
    return {**seconds, "image": time.perf_counter() - begin}


def run(config: RefineConfig, log: Log | None = None) -> dict:
    """Label a split; returns what refine.json holds."""
    ranks.start(resolve_device(config.device))
    log = log or Log()
    config, source, background = resolve(config)
    folder = open_data(config.data)
    ids = folder.ids(config.split)
    ids = [ids[i] for i in even_selection(len(ids), config.images)]
    settings = {
        key: value for key, value in to_dict(config).items() if key not in ("out", "workers", "device")
    }
    digest = None if config.checkpoint is None else file_digest(config.checkpoint)
    claim(config.out / "refine.yaml", {**settings, "checkpoint_digest": digest})
    todo = [image_id for image_id in ranks.share(ids) if not (config.out / f"{image_id}.png").is_file()]
    affinities = None
    if "affinity" in config.steps:
        affinities = open_affinities(config, source, background, folder, ids, log)
    steps = build_steps(config, affinities)
    background = choose_background(config, folder, steps, background, ids, log)
    names = [*config.steps, "image"]
    sums = dict.fromkeys(names, 0.0)
    begin = time.perf_counter()
    with log.progress(f"{config.method} of {config.split}", len(todo)) as bar:
        for seconds in over_images(
            partial(label_image, config, folder, steps, background), todo, config.workers
        ):
            for name, value in seconds.items():
                sums[name] += value
            bar.advance()
    elapsed = time.perf_counter() - begin
    totals = ranks.sum_over_ranks(torch.tensor([len(todo), *sums.values()], dtype=torch.float64)).tolist()
    written = int(totals[0])
    per_image = {n: round(t / max(written, 1), 4) for n, t in zip(names, totals[1:], strict=True)}
    path = config.out / "refine.json"
    if not written and path.is_file():  # what the run that wrote them took stays known
        per_image = json.loads(path.read_text(encoding="utf-8"))["seconds_per_image"]
    result = {
        "method": config.method,
        "data": folder.name,
        "split": config.split,
        "background": asdict(background),
        "sharpness": config.sharpness,
        "images": len(ids),
        "written": written,
        "kept": len(ids) - written,
        "seconds": round(elapsed, 2),
        "seconds_per_image": per_image,
    }
    if ranks.is_first():
        write_text(path, json.dumps(result, indent=1))
        each = ", ".join(f"{name} {value:.3f} s" for name, value in per_image.items())
        log.say(f"{written} labels written, {result['kept']} kept in {config.out}; a thread's time: {each}")
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        run(parse(RefineConfig, argv, prog="python -m pssl.refine"))
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
