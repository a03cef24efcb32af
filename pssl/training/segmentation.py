"""The training of a segmentation network on label PNGs, and the labelling of images with one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pssl.config.optimizer import OptimizerConfig
from pssl.config.reading import PredictConfig
from pssl.config.refine import CRFConfig
from pssl.config.segment import SegmentSettings
from pssl.core.errors import InputError
from pssl.core.log import Log
from pssl.core.ranks import is_first
from pssl.core.seeding import generator
from pssl.core.threads import one_thread_pool, read_ahead, worker_count
from pssl.data.open import DataFolder
from pssl.data.palette import write_label_png
from pssl.data.split import Split
from pssl.data.transforms import random_labelled_crop
from pssl.data.voc import read_label_png
from pssl.inputs.activations import frozen_activations
from pssl.inputs.images import grid_labels, load_square_images
from pssl.method.pseudo_labels import best_regions, crf_step
from pssl.models.build import new_segmenter, weights_path
from pssl.models.checkpoints import save_segmenter
from pssl.models.deeplab import DeepLab, segmentation_loss
from pssl.training.base import Draw, Training
from pssl.training.loop import run_training

STEPS_AHEAD = 2  # that images are read ahead


@dataclass
class SegmentTraining(Training):
    """Training of a :class:`DeepLab` on images and label PNGs, read and changed at random in threads."""

    net: DeepLab
    folder: DataFolder
    ids: Sequence[str]
    labels: Path
    size: int
    zoom: tuple[float, float]
    schedule: OptimizerConfig
    epochs: int
    seed: int
    state_path: Path | None = None
    workers: int | None = None
    name: str = "segment"
    draws: str = "segment"
    heads: tuple[str, ...] = ("head.",)
    seconds: float = field(default=0.0, init=False)

    @property
    def lr(self) -> float:
        return self.schedule.lr

    @property
    def images(self) -> int:
        return len(self.ids)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One image [3,S,S] in 0..1 and its labels uint8 [S,S], changed at random."""
        image = torch.from_numpy(self.folder.image(self.ids[index])).permute(2, 0, 1)
        path = self.labels / f"{self.ids[index]}.png"
        labels = torch.from_numpy(read_label_png(path, len(self.folder.classes)))
        if labels.shape != image.shape[1:]:
            expected, got = list(image.shape[1:]), list(labels.shape)
            raise InputError(f"{path}: expected labels of the image's size {expected}, got {got}")
        return random_labelled_crop(image, labels, self.size, generator, scale=self.zoom)

    def feed(self, draws: Iterator[Draw]) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self.net.parameters()).device

        draws, counted = tee(draws)
        images = (pair for draw in draws for pair in zip(draw.indices, draw.generators, strict=True))
        with one_thread_pool(worker_count(self.workers)) as pool:
            loaded = read_ahead(
                pool, lambda pair: self.load(*pair), images, STEPS_AHEAD * self.schedule.batch_size
            )
            for draw in counted:
                pixels, labels = zip(*islice(loaded, len(draw.indices)), strict=True)
                batch = torch.stack(pixels).to(device, memory_format=torch.channels_last)
                yield self.net.backbone.normalise(batch), torch.stack(labels).to(device)

    def losses(self, fed: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = fed
        return {"total": segmentation_loss(self.net(images), labels)}

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])


@dataclass
class FrozenSegmentTraining(SegmentTraining):
    """The same on cached activations of a frozen backbone, of the mirrored image half the time, at one of `scales` a
    step; labels are brought to the same squares, at most four times as fine as the backbone's grid: finer ones take
    most of a step's time."""

    weights: Path | None = None
    """The file that the backbone's weights are from."""
    backbone: str = ""
    """The backbone's name."""
    scales: Sequence[float] = (1.0,)
    log: Log | None = None

    def __post_init__(self) -> None:
        images = load_square_images(self.folder, self.ids, self.size)
        self.activations = frozen_activations(
            images, self.net.backbone, self.backbone, self.weights, self.scales, self.log
        )
        side = max(self.size // max(self.net.backbone.stride // 4, 1), 1)
        self.squares = grid_labels(self.labels, self.ids, (side, side), len(self.folder.classes))

    def feed(self, draws: Iterator[Draw]) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self.net.parameters()).device
        for draw in draws:
            own = generator(self.seed, self.draws, "scale", draw.step)
            scale = self.scales[int(torch.randint(len(self.scales), (), generator=own))]
            flips = [int(torch.rand((), generator=own) < 0.5) for own in draw.generators]
            pairs = zip(draw.indices, flips, strict=True)
            labels = torch.stack([self.squares[i].flip(1) if flip else self.squares[i] for i, flip in pairs])
            yield self.activations.rows(draw.indices, flips, scale).to(device), labels.to(device)

    def losses(self, fed: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        activations, labels = fed
        return {"total": segmentation_loss(self.net.head(activations), labels)}


def write_prediction(
    net: DeepLab, folder: DataFolder, image_id: str, out: Path, how: PredictConfig, crf: CRFConfig
) -> None:
    """Label one image, at its own size, as a palette PNG in `out`."""
    image = torch.from_numpy(folder.image(image_id)).permute(2, 0, 1)
    scores = net.probabilities(image, how.scales, how.flip).cpu()
    if how.crf:
        scores = crf_step(image, scores, crf)
    labels = best_regions(scores, list(range(len(scores))))
    write_label_png(out / f"{image_id}.png", labels.numpy())


def new_training(
    settings: SegmentSettings,
    folder: DataFolder,
    ids: Sequence[str],
    labels: Path,
    side: int,
    *,
    seed: int,
    out: Path,
    workers: int | None,
    device: torch.device,
    log: Log,
) -> SegmentTraining:
    """Return the training of a new network on label PNGs in squares of side `side`."""
    net = new_segmenter(settings.model, len(folder.classes), seed, log.say)
    kind, more = SegmentTraining, {}
    if settings.model.frozen:
        kind = FrozenSegmentTraining
        more = {
            "weights": settings.model.init or weights_path(settings.model),
            "backbone": settings.model.backbone,
            "scales": settings.frozen_scales,
            "log": log,
        }
    return kind(
        net.to(device),
        folder,
        ids,
        labels,
        side,
        settings.zoom,
        settings.schedule,
        settings.schedule.epochs,
        seed,
        out / "checkpoints/segment.state.pt",
        workers,
        **more,
    )


def train_segmenter(
    settings: SegmentSettings,
    folder: DataFolder,
    split: Split,
    labels: Path,
    side: int,
    *,
    seed: int,
    out: Path,
    workers: int | None,
    resume: bool,
    device: torch.device,
    log: Log,
) -> tuple[DeepLab, dict]:
    """Train a network, or finish training it; return it in eval mode, with how it went.

    OUT/checkpoints holds it afterwards. Raises FileNotFoundError where an image of the split has no label PNG.
    """
    missing = [image_id for image_id in split.ids if not (labels / f"{image_id}.png").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{labels}: expected a label PNG for each of {len(split.ids)} images of {split.name}, "
            f"{len(missing)} are missing: {', '.join(missing[:3])}"
        )
    training = new_training(
        settings, folder, split.ids, labels, side, seed=seed, out=out, workers=workers, device=device, log=log
    )
    trained: list[float] = []
    with log.progress("train segment", training.steps) as bar:

        def on_step(values: dict[str, float]) -> None:
            log.plot("segment", values)
            trained.append(values["step"])
            bar.reach(int(values["step"]) + 1, f"loss {values['total']:.3f}")

        run_training(training, resume=resume, on_step=on_step)
        bar.reach(training.steps)
    if trained:  # else all was resumed
        log.take_losses("segment", training.history)
    outcome = {**split.counts(), "steps": training.steps, "seconds": round(training.seconds, 1)}
    if is_first():
        path = out / "checkpoints/segment.safetensors"
        save_segmenter(path, training.net, settings.model, folder.classes, size=side, steps=training.steps)
        if log.losses:
            log.write_losses(out / "losses.csv")
    return training.net.eval(), outcome
