"""The refinement of an image's CAMs to labels: a background score, then the steps of the method in their order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pssl.config.refine import RefineSettings
from pssl.core.errors import InputError
from pssl.data.open import DataFolder
from pssl.method.pseudo_labels import (
    best_regions,
    crf_step,
    label_scores,
    par_step,
    probabilities,
    walk_step,
)
from pssl.models.cam_files import read_cams
from pssl_ext.ops.cam_sweep import power_thresholds


@dataclass(frozen=True)
class Background:
    """Background score: a threshold or a power, and whence: "given", "CAMs" (their best one), "labels of N images"."""

    threshold: float | None
    power: float | None
    chosen_by: str

    @property
    def crossing(self) -> float:
        """The CAM value that equals the background score: the threshold, also where a power is given."""
        return self.threshold if self.power is None else power_thresholds([self.power])[0]


@dataclass(frozen=True)
class Refinement:
    """The refinement of a folder of CAMs.

    Args:
        settings: the steps and their settings; `sharpness` is a number by now.
        folder: the images.
        cams: the folder of CAM files.
        features: from an image's id to its affinity features [D,h,w]; for the step "affinity".
    """

    settings: RefineSettings
    folder: DataFolder
    cams: Path
    features: Callable[[str], Tensor] | None = None

    def scores(self, image_id: str, background: Background) -> tuple[Tensor, list[int], dict[str, float]]:
        """Return an image's scores [1+k,H,W] after all steps, the regions of their rows, the seconds of each step."""
        image = torch.from_numpy(self.folder.image(image_id)).permute(2, 0, 1)
        cams, class_ids = read_cams(self.cams, image_id)
        if cams.shape[1:] != image.shape[1:]:
            expected, got = list(image.shape[1:]), list(cams.shape[1:])
            raise InputError(
                f"{self.cams / image_id}.npz: expected CAMs of the image's size {expected}, got {got}"
            )
        scores, regions = label_scores(cams, class_ids, background.threshold, background.power)
        seconds = {}
        for name in self.settings.steps if len(regions) > 1 else ():
            before = time.perf_counter()
            scores = self._step(name, image_id, image, scores)
            seconds[name] = time.perf_counter() - before
        return scores, regions, seconds

    def _step(self, name: str, image_id: str, image: Tensor, scores: Tensor) -> Tensor:
        settings, sharpness = self.settings, self.settings.sharpness
        if name == "crf":
            return crf_step(image, probabilities(scores, sharpness), settings.crf)
        if name == "par":
            return par_step(image, probabilities(scores, sharpness), settings.par)
        walk = settings.affinity
        return walk_step(self.features(image_id), scores, walk.radius, walk.beta, walk.log2_steps)

    def label(self, image_id: str, threshold: float) -> Tensor:
        """Return an image's labels uint8 [H,W] at a threshold, every pixel given a region."""
        scores, regions, _ = self.scores(image_id, Background(threshold, None, ""))
        return best_regions(scores, regions)
