"""Scores of maps against ground truth: IoU at every threshold, and how much is active where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pssl.engine.distributed import sum_over_ranks
from pssl_ext import cam_sweep

AREAS = ("part", "body", "background")


def threshold_steps(steps: int) -> list[float]:
    """Thresholds i/steps, i in 1..steps-1."""
    return [i / steps for i in range(1, steps)]


def iou(counts: Tensor) -> Tensor:  # int64 [T,C,C], rows ground truth
    """IoU of each region at each threshold, float64 [T,C]; NaN where neither truth nor prediction has the region."""
    counts = counts.double()
    hit = counts.diagonal(dim1=1, dim2=2)
    return hit / (counts.sum(1) + counts.sum(2) - hit)


@dataclass(frozen=True)
class Score:
    """Scores of one readout on one split: IoU [T,C] at all thresholds, activation by area."""

    thresholds: list[float]
    iou: Tensor
    images: int
    activation: dict[str, float]

    @property
    def curve(self) -> list[float]:
        """mIoU at each threshold, in percent: the mean over regions that occur, background included."""
        return (100 * self.iou.nanmean(1)).tolist()

    @property
    def best_threshold(self) -> float:
        """The threshold of the highest mIoU on this very split; the lowest of equals."""
        curve = self.curve
        return self.thresholds[curve.index(max(curve))]

    def at(self, threshold: float) -> tuple[float, list[float]]:
        """mIoU and each region's IoU at a threshold of the sweep, in percent."""
        if threshold not in self.thresholds:
            raise ValueError(f"threshold: expected one of {self.thresholds}, got {threshold}")
        index = self.thresholds.index(threshold)
        return self.curve[index], (100 * self.iou[index]).tolist()

    def summary(self, regions: Sequence[str], threshold: float, threshold_from: str) -> dict:
        """The score at `threshold` as JSON values; `threshold_from` says on what split it was picked."""
        miou, per_region = self.at(threshold)
        best = self.best_threshold
        return {
            "images": self.images,
            "miou": round(miou, 4),
            "threshold": threshold,
            "threshold_from": threshold_from,
            "iou": {
                name: None if np.isnan(v) else round(v, 4)
                for name, v in zip(regions, per_region, strict=True)
            },
            "best_miou_on_this_split": round(self.at(best)[0], 4),
            "best_threshold_on_this_split": best,
            "activation": {name: round(value, 5) for name, value in self.activation.items()},
            "curve": [round(value, 4) for value in self.curve],
        }


class Scorer:
    """Takes in images one by one; sums over ranks at the end.

    Args:
        num_regions: C.
        steps: thresholds i/steps.
    """

    def __init__(self, num_regions: int, steps: int) -> None:
        self.num_regions = num_regions
        self.thresholds = threshold_steps(steps)
        self.counts = torch.zeros(len(self.thresholds), num_regions, num_regions, dtype=torch.int64)
        self.areas = torch.zeros(len(AREAS), 2, dtype=torch.float64)
        self.images = torch.zeros(1, dtype=torch.int64)

    def add(
        self,
        maps: Tensor,  # float16 [k,H,W]
        class_ids: Tensor,  # uint8 [k], 1..K
        mask: np.ndarray,  # uint8 [H,W], 255 ignored
        parts: np.ndarray | None = None,  # uint8 [H,W]: 0 background, 1 part, 2 body, 255 border
    ) -> None:
        """Count one image. Activation is taken on each class's own object, or on the background for all its classes."""
        maps = maps.float()
        truth = torch.from_numpy(np.array(mask))
        self.counts += cam_sweep(maps, class_ids, truth, self.thresholds, self.num_regions)
        self.images += 1
        for cam, region in zip(maps, class_ids.tolist(), strict=True):
            if parts is None:
                areas = {"body": mask == region, "background": mask == 0}
            else:
                own = mask == region
                areas = {"part": own & (parts == 1), "body": own & (parts == 2), "background": mask == 0}
            for name, area in areas.items():
                inside = cam[torch.from_numpy(area)]
                self.areas[AREAS.index(name)] += torch.tensor([inside.double().sum(), inside.numel()])

    def result(self) -> Score:
        """The score over all ranks' images. Without part masks, "body" is the whole object and "part" is absent."""
        counts, images = sum_over_ranks(self.counts), int(sum_over_ranks(self.images))
        sums, sizes = sum_over_ranks(self.areas).unbind(1)
        activation = {
            name: float(s / n) for name, s, n in zip(AREAS, sums, sizes, strict=True) if float(n) > 0
        }
        return Score(self.thresholds, iou(counts), images, activation)
