"""The data of a run, and what every arm has done to it: scored, its prototypes found, saved."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
from pssl.method.pseudo_labels import best_regions, label_scores
from pssl.method.terms.rcm import RCM
from pssl.models.build import new_net
from pssl.models.cam_net import CamNet
from pssl.models.checkpoints import save_net
from pssl.models.prototypes import Prototypes
from pssl.scoring.scoring import Score, Scorer
from pssl.scoring.unscored import RULES, Unscored, UnscoredCounter, average_precision

ENOUGH_MASKS = 5  # of training images, for thresholds to be chosen by
FEW_MASKS = (
    50  # below which, if not all training images have one, the threshold is held near where others were found
)
USUAL_THRESHOLD = {"cam": 0.25, "prototype": 0.58}
COMPARED_IMAGES = 64  # held out, at most, of which the arms' labels are compared


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

    def has_truth(self, role: str) -> bool:
        """Return whether a role is scored by masks: the training images where enough of them have one."""
        evaluation, scored = self.config.evaluation, len(self.splits[role].scored)
        if role == "train":
            return scored >= ENOUGH_MASKS and evaluation.masks_for_threshold != 0
        return scored > 0

    def scored_indices(self, role: str) -> list[int]:
        """Return the images of a role that are scored: all with a mask, or an even selection of the training images.

        Of a role without truth these are all images, or a selection, whatever masks they have.
        """
        limits = [
            n for n in (self.config.evaluation.train_images, self._masks_for_threshold) if n is not None
        ]
        limit = min(limits) if role == "train" and limits else None
        ids = self.inputs[role].ids
        scored = set(self.splits[role].scored) if self.has_truth(role) else set(ids)
        return even_selection([i for i, image_id in enumerate(ids) if image_id in scored], limit)

    @property
    def _masks_for_threshold(self) -> int | None:
        return self.config.evaluation.masks_for_threshold or None


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
        inputs[role] = build_inputs(folder, split.ids, net, config.data, config.model, scales, log, layout)
        log.say(f"{role}: {len(split.ids)} images of {folder.name}, split {name}, {classes} classes")
    experiment = Experiment(config, folder, splits, inputs, device, log)
    if config.evaluation.every and not experiment.has_truth("train"):
        raise InputError("evaluation.every: expected 0 without masks of training images to score by")
    if not experiment.has_truth("val"):
        log.say(
            "no masks of held-out images: no mIoU; how well image labels are found, and pictures, stand instead"
        )
    return experiment


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


def describe_role(
    experiment: Experiment, name: str, net: CamNet, prototypes: Prototypes, role: str
) -> dict[str, Unscored]:
    """Count the maps of both readouts on a split without masks."""
    folder, inputs = experiment.folder, experiment.inputs[role]
    indices = experiment.scored_indices(role)
    counters = {readout: UnscoredCounter() for readout in READOUTS}

    def size_of(image_id: str) -> tuple[int, int]:
        return folder.image(image_id).shape[:2]

    with experiment.log.progress(f"read {name} on {role}", len(indices)) as bar:
        own = ranks.share(indices)
        for maps in read_images(net, inputs, own, size_of, experiment.config.inference, prototypes):
            for readout, counter in counters.items():
                counter.add(maps.maps[readout])
            bar.advance()
    return {readout: counter.result() for readout, counter in counters.items()}


def score(experiment: Experiment, name: str, net: CamNet, prototypes: Prototypes) -> dict[str, dict]:
    """Score both readouts on both splits, at the threshold that is best on the training split; without masks, at the
    one that the readout's rule gives."""
    results = {}
    for role in ("train", "val"):
        read = score_role if experiment.has_truth(role) else describe_role
        results[role] = read(experiment, name, net, prototypes, role)
    summaries = {}
    for readout in READOUTS:
        threshold, source = choose_threshold(experiment, readout, results["train"][readout])
        summaries[readout] = {
            role: results[role][readout].summary(experiment.regions, threshold, source) for role in results
        }
    return summaries


def choose_threshold(experiment: Experiment, readout: str, found: Score | Unscored) -> tuple[float, str]:
    """Return a readout's threshold by its results on training images, and where it comes from."""
    split = experiment.splits["train"].name
    if isinstance(found, Unscored):
        return found.threshold(readout), RULES[readout].said()
    if found.images < min(FEW_MASKS, len(experiment.splits["train"].ids)):
        return found.best_near(USUAL_THRESHOLD[readout]), f"{found.images} masks of {split}"
    return found.best_threshold, split


@torch.no_grad()
def label_precision(experiment: Experiment, net: CamNet) -> dict:
    """Return how well the network finds the image labels of held-out images: average precision by class, and the mean.

    The network is read at scale 1, as it was trained. Figures are percentages; None for a class that no image has.
    """
    inputs, classes = experiment.inputs["val"], experiment.folder.classes
    scores = torch.zeros(len(inputs.ids), len(classes), dtype=torch.float64)
    net.eval()
    for batch in inputs.batches(ranks.share(range(len(inputs.ids))), experiment.config.inference.batch_size):
        scores[batch] = CamNet.logits(net(inputs.plain(batch, 1.0, False)).cam).double().cpu()
    found = average_precision(ranks.sum_over_ranks(scores).numpy(), (inputs.labels > 0).numpy())
    by_class = {n: None if np.isnan(v) else round(100 * v, 2) for n, v in zip(classes, found, strict=True)}
    known = found[~np.isnan(found)]
    return {"mean": round(100 * float(known.mean()), 2) if len(known) else None, "classes": by_class}


def agreement(experiment: Experiment, nets: dict[str, CamNet], thresholds: dict[str, float]) -> dict:
    """Return how many pixels of held-out images every two arms label alike by their CAMs, in percent."""
    indices = even_selection(list(range(len(experiment.inputs["val"].ids))), COMPARED_IMAGES)
    own = ranks.share(indices)
    sizes = lambda image_id: experiment.folder.image(image_id).shape[:2]  # noqa: E731
    labels = {}
    for arm, net in nets.items():
        read = read_images(net, experiment.inputs["val"], own, sizes, experiment.config.inference, None)
        at = thresholds[arm]
        labels[arm] = {m.id: best_regions(*label_scores(m.maps["cam"], m.class_ids, at)) for m in read}
    found = {}
    for first, second in itertools.combinations(nets, 2):
        pairs = [(mask, labels[second][image_id]) for image_id, mask in labels[first].items()]
        same = torch.tensor(
            [sum(int((a == b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)],
            dtype=torch.float64,
        )
        same, pixels = ranks.sum_over_ranks(same).tolist()
        found[f"{first} | {second}"] = round(100 * same / max(pixels, 1), 2)
    return {"images": len(indices), "same_pixels": found}


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
