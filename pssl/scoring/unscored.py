"""What can be said without masks: the threshold that a rule gives, what lies above it, how well labels are found.

Eleven rules were measured on the embedded set, its control and photographs, against the threshold chosen by masks of
training images. No rule comes within a point everywhere; :data:`RULES` holds the best one of each readout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pssl.core.ranks import sum_over_ranks

BINS = 1000  # of the pixels' largest map values, 0 to 1
LOOK = "look at the pictures at several thresholds, and give --threshold"


@dataclass(frozen=True)
class Rule:
    """A rule for the background threshold.

    `mean` and `worst` are the points of mIoU that it lost in 11 measured cases, against the choice by masks.
    """

    name: str
    mean: float
    worst: float

    def said(self) -> str:
        """Return where a threshold comes from, for results."""
        lost = (
            f"{self.mean:.1f} points of mIoU lost in the mean of 11 measured cases, {self.worst:.1f} at worst"
        )
        return f"{self.name}, without masks ({lost}; {LOOK})"


RULES = {
    "cam": Rule("Otsu's threshold", 1.3, 4.7),
    "prototype": Rule("the constant 0.66", 2.4, 5.4),
}
"""By readout. Otsu (1979), on the largest map value of every pixel of the training images: of the readout's maps, which
lie closer together, it lost 18 points, where a constant lost 5."""
CONSTANT = {"prototype": 0.66}


@dataclass(frozen=True)
class Unscored:
    """Statistics of one readout on images without masks: pixels by their largest map value, int64 [BINS]."""

    counts: Tensor
    images: int

    def threshold(self, readout: str) -> float:
        """Return the threshold that the readout's rule gives."""
        return CONSTANT[readout] if readout in CONSTANT else otsu(self.counts)

    def foreground(self, threshold: float) -> float:
        """Return the share of pixels above a threshold."""
        edges = (torch.arange(BINS) + 0.5) / BINS
        return float(self.counts[edges > threshold].sum()) / max(int(self.counts.sum()), 1)

    def summary(self, regions: object, threshold: float, threshold_from: str) -> dict:
        """Return what is known as JSON values, with the keys of `Score.summary` that mean something without masks."""
        return {
            "images": self.images,
            "miou": None,
            "threshold": threshold,
            "threshold_from": threshold_from,
            "foreground": round(self.foreground(threshold), 5),
            "activation": {},
        }


class UnscoredCounter:
    """Takes in maps image by image; sums over ranks at the end."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.images = torch.zeros(1, dtype=torch.int64)

    def add(self, maps: Tensor) -> None:  # [k,H,W] in 0..1
        """Count one image; without a class all of its pixels count as 0."""
        highest = maps.float().amax(0) if len(maps) else torch.zeros(maps.shape[1:])
        self.counts += torch.histc(highest, BINS, 0, 1).long()
        self.images += 1

    def result(self) -> Unscored:
        """Return the statistics of all ranks' images."""
        return Unscored(sum_over_ranks(self.counts), int(sum_over_ranks(self.images)))


def otsu(counts: Tensor) -> float:  # int64 [BINS]
    """Return the threshold that separates two groups of values best (Otsu 1979), to two digits, in 0.01..0.99.

    The best one has the largest w0·w1·(m0 - m1)², the weights and means of the values below and above it.
    """
    weights = counts.double().numpy()
    values = (np.arange(len(weights)) + 0.5) / len(weights)
    below = np.cumsum(weights)
    sums = np.cumsum(weights * values)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    best = int(np.nanargmax(np.where(np.isfinite(apart), apart, -1.0)))
    return float(np.clip(round((best + 1) / len(weights), 2), 0.01, 0.99))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:  # [N,K], 0/1 [N,K]
    """Return the average precision of each class, float64 [K]; NaN for a class that no image has.

    AP = Σ_n (R_n - R_{n-1}) P_n over the images by falling score, images of equal score taken together.
    """
    found = np.full(scores.shape[1], np.nan)
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")
        hits, total = np.cumsum(labels[order, column]), labels[:, column].sum()
        if not total:
            continue
        last_of_equals = np.append(np.diff(scores[order, column]) != 0, True)
        hits, seen = hits[last_of_equals], np.flatnonzero(last_of_equals) + 1
        found[column] = np.sum(np.diff(hits, prepend=0) * hits / seen) / total
    return found
