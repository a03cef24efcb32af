"""The data of a run, and what every arm has done to it: scored, its prototypes found, saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pssl.config.train import TrainConfig
from pssl.core import ranks
from pssl.core.device import memory_format
from pssl.core.errors import InputError
from pssl.core.log import Log
from pssl.data.open import DataFolder, open_data
from pssl.data.split import Split, even_selection, open_split
from pssl.inputs.build import build_inputs
from pssl.inputs.images import Inputs
from pssl.method.arms import terms_of
from pssl.method.inference import READOUTS, final_prototypes, read_images
from pssl.method.objective import Objective
from pssl.method.terms.rcm import RCM
from pssl.models.build import new_net
from pssl.models.cam_net import CamNet
from pssl.models.checkpoints import save_net
from pssl.models.prototypes import Prototypes
from pssl.scoring.scoring import Score, Scorer


@dataclass
class Experiment:
    """The data of a run, opened once for all seeds and arms; `splits` and `inputs` by role, "train" and "val"."""

    config: TrainConfig
    folder: DataFolder
    splits: dict[str, Split]
    inputs: dict[str, Inputs]
    device: torch.device
    log: Log

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions: background, then the classes."""
        return ("background", *self.folder.classes)

    def objective(self, arm: str) -> Objective:
        """Return the objective of an arm, on the run's device."""
        return new_objective(self.config, arm, len(self.folder.classes)).to(self.device)

    def scored_indices(self, role: str) -> list[int]:
        """Return the images of a role that are scored: all, or an even selection of the training images."""
        limit = self.config.evaluation.train_images if role == "train" else None
        scored = set(self.splits[role].scored)
        having = [i for i, image_id in enumerate(self.inputs[role].ids) if image_id in scored]
        return even_selection(having, limit)


def new_objective(config: TrainConfig, arm: str, classes: int) -> Objective:
    """Return the objective of an arm."""
    size = config.data.splits.size
    return Objective(config.method, terms_of(arm), classes=classes, dim=config.model.dim, size=size)


def open_experiment(config: TrainConfig, device: torch.device, log: Log) -> Experiment:
    """Open the data and make its inputs, activations of a frozen backbone included."""
    folder = open_data(config.data.folder)
    classes, layout = len(folder.classes), memory_format(config.engine.channels_last)
    net = new_net(config.model, classes, config.seed_list[0], log.say, layout).to(device)
    scales = {1.0, *config.inference.scales, *config.method.support.scales}
    scales |= {scale for arm in config.arms for scale in new_objective(config, arm, classes).scales}
    splits, inputs = {}, {}
    names = {"train": config.data.splits.train_split, "val": config.data.splits.val_split}
    for role, name in names.items():
        split = splits[role] = open_split(folder, name, config.data.folder, log)
        if not split.scored:
            raise InputError(
                f"{folder.root}, split {name}: expected masks to score by (and pick thresholds on), found none; "
                "is data.masks right?"
            )
        inputs[role] = build_inputs(folder, split.ids, net, config.data, config.model, scales, log, layout)
        log.say(f"{role}: {len(split.ids)} images of {folder.name}, split {name}, {classes} classes")
    return Experiment(config, folder, splits, inputs, device, log)


def find_prototypes(experiment: Experiment, net: CamNet, rcm: RCM | None) -> Prototypes:
    """Return RCM's prototypes of the training split, by the module that the network was trained with, if any."""
    config = experiment.config
    return final_prototypes(
        net,
        experiment.inputs["train"],
        config.data.splits.size,
        config.method.rcm,
        config.inference,
        config.method.support.scales,
        trained_with=rcm,
    )


def score_role(
    experiment: Experiment, name: str, net: CamNet, prototypes: Prototypes, role: str
) -> dict[str, Score]:
    """Score both readouts on one split, at all thresholds."""
    config, folder, inputs = experiment.config, experiment.folder, experiment.inputs[role]
    indices = experiment.scored_indices(role)
    scorers = {r: Scorer(len(experiment.regions), config.evaluation.sweep.steps) for r in READOUTS}
    masks = {}  # of the images that are read: each is scored next

    def size_of(image_id: str) -> tuple[int, int]:
        masks[image_id] = folder.mask(image_id)
        return masks[image_id].shape

    with experiment.log.progress(f"score {name} on {role}", len(indices)) as bar:
        own = ranks.share(indices)
        for maps in read_images(net, inputs, own, size_of, config.inference, prototypes):
            mask, parts = masks.pop(maps.id), folder.parts(maps.id)
            for readout, scorer in scorers.items():
                scorer.add(maps.maps[readout], maps.class_ids, mask, parts)
            bar.advance()
    return {readout: scorer.result() for readout, scorer in scorers.items()}


def score(experiment: Experiment, name: str, net: CamNet, prototypes: Prototypes) -> dict[str, dict]:
    """Score both readouts on both splits, at the threshold that is best on the training split."""
    results = {role: score_role(experiment, name, net, prototypes, role) for role in ("train", "val")}
    split = experiment.splits["train"].name
    summaries = {}
    for readout in READOUTS:
        threshold = results["train"][readout].best_threshold
        summaries[readout] = {
            role: results[role][readout].summary(experiment.regions, threshold, split) for role in results
        }
    return summaries


def save(
    experiment: Experiment,
    file: str,
    net: CamNet,
    prototypes: Prototypes,
    seed: int,
    out: Path,
    thresholds: dict[str, float],
    **more,
) -> None:
    """Write the checkpoint FILE.safetensors; only the first rank does."""
    if not ranks.is_first():
        return
    config = experiment.config
    save_net(
        out / "checkpoints" / f"{file}.safetensors",
        net,
        prototypes,
        config.model,
        experiment.folder.classes,
        config.data.splits.size,
        loading=config.data.loading,
        train_split=config.data.splits.train_split,
        seed=seed,
        thresholds=thresholds,
        **more,
    )
