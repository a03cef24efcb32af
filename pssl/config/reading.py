"""Settings of how a trained network is read and scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pssl.config.values import PART, Floats, require, require_scales


@dataclass
class InferenceConfig:
    """How a trained network is read."""

    scales: Floats = (0.5, 1.0, 1.5, 2.0)
    """Scales whose maps are averaged (the multi-scale CAMs of PSA, SEAM and IRN)."""
    flip: bool = True
    """Also read the mirrored image (same source)."""
    batch_size: int = 32
    """Images of side `data.size` at a time; with `loading: files` those of one size, as many as have no more pixels."""

    def __post_init__(self) -> None:
        require_scales(self.scales)
        require("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")


@dataclass
class SweepConfig:
    """How CAMs are scored."""

    steps: int = 100
    """Background thresholds tried: i/steps for i in 1..steps-1."""

    def __post_init__(self) -> None:
        require("steps", self.steps, self.steps >= 2, "2 or more")


@dataclass
class EvaluationConfig:
    """How and on which images CAMs are scored while training."""

    sweep: Annotated[SweepConfig, PART] = field(default_factory=SweepConfig)

    train_images: int | None = None
    """Score this many images of the training split, evenly spaced in its list. None: all."""
    masks_for_threshold: int | None = None
    """Choose the thresholds by the masks of so many training images, evenly spaced. None: by all masks, where there are
    at least 5. Fewer than 50, of more images, are helped by where thresholds were found elsewhere; without masks a
    rule chooses, and every result names it. 0: by the rule."""
    every: int = 0
    """Score the CAMs on these training images after every so many epochs too, and keep the best network as
    checkpoints/ARM.best.safetensors. Held images have no say in it. 0: never."""

    def __post_init__(self) -> None:
        for name in ("train_images", "masks_for_threshold"):
            value, least = getattr(self, name), 1 if name == "train_images" else 0
            require(name, value, value is None or value >= least, f"{least} or more")


@dataclass
class PredictConfig:
    """How a trained network labels an image."""

    scales: Floats = (0.75, 1.0, 1.25)
    """Scales whose probabilities are averaged."""
    flip: bool = True
    """Also read the mirrored image."""
    crf: bool = False
    """Refine the probabilities by the CRF (DeepLab v1 and v2 do, v3+ does not)."""
