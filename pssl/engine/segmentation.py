"""Training a segmentation network on label PNGs, and labelling images with one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pssl.cli import from_dict, to_dict
from pssl.config import OptimizerConfig
from pssl.data.open import DataFolder
from pssl.data.palette import write_label_png
from pssl.data.transforms import random_labelled_crop
from pssl.data.voc import read_label_png
from pssl.engine import checkpoint
from pssl.engine.inputs import grid_labels, load_square_images
from pssl.engine.log import Log
from pssl.engine.loop import Draw, Training
from pssl.engine.parallel import one_thread_pool, worker_count
from pssl.engine.seeding import derive_seed, generator
from pssl.engine.workspace import frozen_activations, weights_path
from pssl.method.pseudo_labels import best_regions, crf_step
from pssl.method.settings import CRFConfig, PredictConfig, SegmenterConfig
from pssl.models.backbones import build_backbone
from pssl.models.deeplab import DeepLab, segmentation_loss
from pssl.models.weights import load_weights

READ_AHEAD = 2  # steps


def build_segmenter(config: SegmenterConfig, classes: int) -> DeepLab:
    """The network that a configuration describes, with random weights."""
    backbone = build_backbone(
        config.backbone, config.width, timm=config.timm, output_stride=config.output_stride
    )
    return DeepLab(
        backbone,
        classes + 1,
        head=config.head,
        dim=config.dim,
        rates=config.rates,
        dropout=config.dropout,
        fixed=config.fixed,
        frozen=config.frozen,
    )


def new_segmenter(config: SegmenterConfig, classes: int, seed: int) -> tuple[DeepLab, str]:
    """A network as training starts from, and a line that says where its backbone's weights are from.

    They are those of a checkpoint of pssl.train (`init`), else of a weights file, else random by `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "segment", "weights"))
        net = build_segmenter(config, classes)
    path, told = weights_path(config), "backbone weights random"
    if config.frozen and path is None and config.init is None:
        raise ValueError(
            "model.frozen: expected a backbone with weights, got random ones; give --model.weights"
        )
    if config.init is not None:
        tensors, description = checkpoint.load_weights(config.init)
        prefix = "net.backbone."
        own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        shapes = [
            {name: value.shape for name, value in state.items()} for state in (own, net.backbone.state_dict())
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{config.init}: expected the weights of a trained {config.backbone} backbone of this width, got "
                f"those of {description['model']['backbone']}, {len(own)} tensors"
            )
        net.backbone.load_state_dict(own)
        told = f"backbone weights of {config.init}"
    elif path is not None:
        told = f"backbone weights {load_weights(net.backbone, path)}"
    return net.to(memory_format=torch.channels_last), told


def save_segmenter(path: Path, net: DeepLab, config: SegmenterConfig, classes: Sequence[str], **more) -> None:
    """Write a network and its description."""
    description = {"segmenter": to_dict(config), "classes": list(classes), **more}
    checkpoint.save_weights(path, net.state_dict(), description)


def load_segmenter(path: Path, classes: Sequence[str]) -> DeepLab:
    """The network of :func:`save_segmenter`, in eval mode; ValueError where it knows other classes."""
    tensors, description = checkpoint.load_weights(path)
    if description.get("classes") != list(classes) or "segmenter" not in description:
        raise ValueError(f"{path}: expected a segmentation network of {tuple(classes)}, got {description}")
    net = build_segmenter(from_dict(SegmenterConfig, description["segmenter"], str(path)), len(classes))
    net.load_state_dict(tensors)
    return net.eval().to(memory_format=torch.channels_last)


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
