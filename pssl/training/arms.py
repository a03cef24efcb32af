"""The data of a run, and what every arm has done to it: scored, its prototypes found, saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pssl.config.train import TERMS_OF_ARM, TrainConfig
from pssl.core import ranks
from pssl.core.device import memory_format
from pssl.core.log import Log
from pssl.data.open import DataFolder, open_data
from pssl.data.split import usable_images
from pssl.inputs.build import build_inputs
from pssl.inputs.images import Inputs
from pssl.method.inference import READOUTS, final_prototypes, read_images
from pssl.method.terms.rcm import RCM
from pssl.models.build import new_net
from pssl.models.cam_files import even_selection
from pssl.models.cam_net import CamNet
from pssl.models.checkpoints import save_net
from pssl.models.prototypes import Prototypes
from pssl.scoring.scoring import Score, Scorer


@dataclass
class Experiment:
    """The data of a run, opened once for all seeds and arms."""

    config: TrainConfig
    folder: DataFolder
    inputs: dict[str, Inputs]
    """By role: "train", "val"."""
    scored: dict[str, frozenset[str]]
    """By role, the images that have a mask to be scored by."""
    device: torch.device
    log: Log

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions: background, then the classes."""
        return ("background", *self.folder.classes)

    def scored_indices(self, role: str) -> list[int]:
        """The images of a role that are scored: all, or an even selection of the training images."""
        limit = self.config.evaluation.train_images if role == "train" else None
        having = [i for i, image_id in enumerate(self.inputs[role].ids) if image_id in self.scored[role]]
        return [having[i] for i in even_selection(len(having), limit)]


def open_experiment(config: TrainConfig, device: torch.device, log: Log) -> Experiment:
    """Open the data and make its inputs, activations of a frozen backbone included."""
    folder = open_data(config.data)
    layout = memory_format(config.engine.channels_last)
    net = new_net(config.model, len(folder.classes), config.seed_list[0], log.say, layout).to(device)
    scales = {1.0, *config.inference.scales, *config.method.support.scales, *config.method.mam.scales}
    if any("seam" in TERMS_OF_ARM[arm] for arm in config.arms):
        scales.add(config.method.seam.scale)
    inputs, scored = {}, {}
    for role, split in (("train", config.data.train_split), ("val", config.data.val_split)):
        images = usable_images(folder, split, config.data.check, log)
        ids, scored[role] = images.ids, images.scored
        if not scored[role]:
            raise ValueError(
                f"{folder.root}, split {split}: expected masks to score by (and pick thresholds on), found none; "
                "is data.masks right?"
            )
        inputs[role] = build_inputs(folder, ids, net, config.data, config.model, scales, log, layout)
        log.say(f"{role}: {len(ids)} images of {folder.name}, split {split}, {len(folder.classes)} classes")
    return Experiment(config, folder, inputs, scored, device, log)


def find_prototypes(experiment: Experiment, net: CamNet, rcm: RCM | None) -> Prototypes:
    """RCM's prototypes of the training split, by the module that the network was trained with, if any."""
    config = experiment.config
    return final_prototypes(
        net,
        experiment.inputs["train"],
        config.data.size,
        config.method.rcm,
        config.inference,
        config.method.support.scales,
        trained_with=rcm,
    )


def score_role(
    experiment: Experiment, name: str, net: CamNet, prototypes: Prototypes, role: str
) -> dict[str, Score]:
    """Both readouts on one split, at all thresholds."""
    config, folder, inputs = experiment.config, experiment.folder, experiment.inputs[role]
    indices = experiment.scored_indices(role)
    scorers = {r: Scorer(len(experiment.regions), config.evaluation.steps) for r in READOUTS}
    masks = {}

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
    """Both readouts on both splits, at the threshold that is best on the train split."""
    results = {role: score_role(experiment, name, net, prototypes, role) for role in ("train", "val")}
    summaries = {}
    for readout in READOUTS:
        threshold = results["train"][readout].best_threshold
        split = experiment.config.data.train_split
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
        config.data.size,
        loading=config.data.loading,
        train_split=config.data.train_split,
        seed=seed,
        thresholds=thresholds,
        **more,
    )
