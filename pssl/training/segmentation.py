"""Training a segmentation network on label PNGs, and labelling images with one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pssl.config.optimizer import OptimizerConfig
from pssl.config.reading import PredictConfig
from pssl.config.refine import CRFConfig
from pssl.core.log import Log
from pssl.core.seeding import generator
from pssl.core.threads import one_thread_pool, worker_count
from pssl.data.open import DataFolder
from pssl.data.palette import write_label_png
from pssl.data.transforms import random_labelled_crop
from pssl.data.voc import read_label_png
from pssl.inputs.activations import frozen_activations
from pssl.inputs.images import grid_labels, load_square_images
from pssl.method.pseudo_labels import best_regions, crf_step
from pssl.models.deeplab import DeepLab, segmentation_loss
from pssl.training.loop import Draw, Training

READ_AHEAD = 2  # steps


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
            raise ValueError(f"{path}: expected labels of the image's size {expected}, got {got}")
        return random_labelled_crop(image, labels, self.size, generator, scale=self.zoom)

    def feed(self, draws: Iterator[Draw]) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self.net.parameters()).device

        def batch(futures: list) -> tuple[Tensor, Tensor]:
            images, labels = (torch.stack(part) for part in zip(*(f.result() for f in futures), strict=True))
            images = images.to(device, memory_format=torch.channels_last)
            return self.net.backbone.normalise(images), labels.to(device)

        with one_thread_pool(worker_count(self.workers)) as pool:
            waiting: deque = deque()
            for draw in draws:
                pairs = zip(draw.indices, draw.generators, strict=True)
                waiting.append([pool.submit(self.load, index, own) for index, own in pairs])
                if len(waiting) > READ_AHEAD:
                    yield batch(waiting.popleft())
            while waiting:
                yield batch(waiting.popleft())

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
