"""Affinities of a CAM network's features: confident labels, training on them, the trained features of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pssl.config.refine import AffinityConfig, RefineSettings
from pssl.core import checkpoint
from pssl.core.errors import InputError
from pssl.core.log import Log
from pssl.core.ranks import is_first, share, wait
from pssl.core.seeding import derive_seed
from pssl.core.threads import over_images
from pssl.data.open import DataFolder
from pssl.data.palette import write_label_png
from pssl.inputs.images import Inputs, grid_labels
from pssl.method.affinity import AffinityHead, affinity_losses
from pssl.method.pseudo_labels import (
    best_regions,
    confident_regions,
    crf_step,
    label_scores,
    probabilities,
)
from pssl.models.cam_files import read_cams
from pssl.models.cam_net import CamNet
from pssl.training.base import Draw, Training
from pssl.training.loop import run_training


def confident_labels(
    image: Tensor,  # uint8 [3,H,W]
    cams: Tensor,  # [k,H,W]
    class_ids: Tensor,  # [k]
    threshold: float,
    settings: RefineSettings,
) -> Tensor:
    """Labels uint8 [H,W] of the pixels that two thresholds agree on, 255 elsewhere (see `confident_regions`)."""
    labels, config = [], settings.affinity
    for margin in (config.foreground_margin, -config.background_margin):
        scores, regions = label_scores(cams, class_ids, min(max(threshold + margin, 1e-3), 1 - 1e-3))
        if config.crf:
            scores = crf_step(image, probabilities(scores, settings.sharpness), settings.crf)
        labels.append(best_regions(scores, regions))
    return confident_regions(*labels)


def write_confident_labels(
    out: Path,
    folder: DataFolder,
    ids: list[str],
    cams: Path,
    threshold: float,
    settings: RefineSettings,
    workers: int | None,
    log: Log,
) -> None:
    """A palette PNG in `out` for each image, ranks sharing them; those that are there are kept."""
    out.mkdir(parents=True, exist_ok=True)
    todo = [image_id for image_id in share(ids) if not (out / f"{image_id}.png").is_file()]

    def work(image_id: str) -> None:
        image = torch.from_numpy(folder.image(image_id)).permute(2, 0, 1)
        labels = confident_labels(image, *read_cams(cams, image_id), threshold, settings)
        write_label_png(out / f"{image_id}.png", labels.numpy())

    with log.progress("confident labels", len(todo)) as bar:
        for _ in over_images(work, todo, workers):
            bar.advance()
    wait()


@dataclass
class AffinityTraining(Training):
    """Training of an :class:`AffinityHead` on the features of a frozen network."""

    net: AffinityHead
    features: Callable[[list[int]], Tensor]
    """From indices to the CAM network's features [B,D,h,w]."""
    labels: Tensor
    """Confident labels on the grid, uint8 [N,h,w]."""
    config: AffinityConfig
    seed: int
    state_path: Path | None = None
    name: str = "affinity"
    draws: str = "affinity"
    heads: tuple[str, ...] = ()
    seconds: float = field(default=0.0, init=False)

    @property
    def schedule(self) -> AffinityConfig:
        return self.config

    @property
    def epochs(self) -> int:
        return self.config.epochs

    @property
    def lr(self) -> float:
        return self.config.lr

    @property
    def images(self) -> int:
        return len(self.labels)

    def feed(self, draws: Iterator[Draw]) -> Iterator[tuple[Tensor, Tensor]]:
        for draw in draws:
            features = self.features(draw.indices)
            yield features, self.labels[draw.indices].to(features.device)

    def losses(self, fed: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        features, labels = fed
        return affinity_losses(self.net(features), labels, self.config.radius)

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])


@dataclass(frozen=True)
class Affinities:
    """A frozen CAM network with trained affinities on top."""

    cam_net: CamNet
    head: AffinityHead
    inputs: Inputs
    scale: float

    @torch.no_grad()
    def cam_features(self, indices: list[int]) -> Tensor:
        """The CAM network's features [B,D,h,w]."""
        return self.cam_net(self.inputs.plain(indices, self.scale, False)).features

    @torch.no_grad()
    def features(self, index: int) -> Tensor:
        """The affinity features [dim,h,w] of one image, on the CPU."""
        return self.head(self.cam_features([index]))[0].float().cpu()


def train_affinities(
    affinities: Affinities, labels: Path, config: AffinityConfig, seed: int, state_path: Path, log: Log
) -> None:
    """Train the head in place on the confident labels in folder `labels`; carries on from `state_path`."""
    inputs = affinities.inputs
    grid = tuple(affinities.cam_features([0]).shape[2:])
    training = AffinityTraining(
        affinities.head,
        affinities.cam_features,
        grid_labels(labels, inputs.ids, grid, affinities.cam_net.classes),
        config,
        seed,
        state_path,
    )
    with log.progress("train affinities", training.steps) as bar:

        def on_step(values: dict[str, float]) -> None:
            kinds = (f"{name} {values[name]:.3f}" for name in ("foreground", "background", "different"))
            bar.reach(int(values["step"]) + 1, "  ".join(kinds))

        run_training(training, resume=True, on_step=on_step)
        bar.reach(training.steps)


def new_head(net: CamNet, config: AffinityConfig, seed: int) -> AffinityHead:
    """A head for the features of `net`, random by `seed`, on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "affinity", "weights"))
        head = AffinityHead(net.dim, config.dim)
    return head.to(next(net.parameters()).device)


def save_head(path: Path, head: AffinityHead, scale: float, cam_digest: str) -> None:
    """Write a head, and the SHA-256 of the CAM network's checkpoint that it stands on."""
    description = {"dim": head.out.out_channels, "scale": scale, "cam_checkpoint_digest": cam_digest}
    checkpoint.save_weights(path, head.state_dict(), description)


def load_head(path: Path, net: CamNet, config: AffinityConfig, cam_digest: str) -> AffinityHead:
    """The head of :func:`save_head`; ValueError if it stands on another network, or other features of it."""
    tensors, description = checkpoint.load_weights(path)
    expected = {"dim": config.dim, "scale": config.scale, "cam_checkpoint_digest": cam_digest}
    if description != expected:
        raise InputError(f"{path}: expected affinities of {expected}, got {description}")
    head = new_head(net, config, 0)
    head.load_state_dict(tensors)
    return head


def open_affinities(
    cam_net: CamNet,
    inputs: Inputs,
    settings: RefineSettings,
    folder: DataFolder,
    cams: Path,
    threshold: float,
    cam_digest: str,
    seed: int,
    out: Path,
    workers: int | None,
    log: Log,
) -> Affinities:
    """Return the CAM network with affinities: those of `settings.affinity.checkpoint`, or trained on `inputs`' images.

    Training leaves OUT/confident, OUT/affinity.state.pt and OUT/affinity.safetensors behind, and carries on from them.
    """
    config = settings.affinity
    if config.checkpoint is not None:
        head = load_head(config.checkpoint, cam_net, config, cam_digest)
        return Affinities(cam_net, head.eval(), inputs, config.scale)
    affinities = Affinities(cam_net, new_head(cam_net, config, seed), inputs, config.scale)
    confident = out / "confident"
    write_confident_labels(confident, folder, list(inputs.ids), cams, threshold, settings, workers, log)
    train_affinities(affinities, confident, config, seed, out / "affinity.state.pt", log)
    if is_first():
        save_head(out / "affinity.safetensors", affinities.head, config.scale, cam_digest)
    affinities.head.eval()
    return affinities
