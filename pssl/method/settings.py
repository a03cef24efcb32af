"""Settings of the steps from CAMs to a segmentation network, with what their defaults come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pssl.cli import Floats, Integers
from pssl.config import BackboneConfig, OptimizerConfig

STEPS = ("crf", "par", "affinity")

SHARPNESS = {"cam": 4.0, "prototype": 8.0}
"""`sharpness` by readout, the second of which varies less around its threshold. Measured on training images, embedded
ones and photographs, of 3 to 12."""

RECIPE_OF_SEGMENTER = {
    "small": "synthetic",
    "efficientnet_lite0": "photographs",
    "resnet38d": "voc12_resnet38d",
    "timm": "voc12_resnet101",
}
"""The recipe (``pssl/recipes/segment/NAME.yaml``) that ``recipe: auto`` stands for, by the segmentation network's
backbone."""


@dataclass
class CRFConfig:
    """Fully-connected CRF, as `pssl_ext.dense_crf` takes it."""

    iterations: int = 10
    """Iterations of the mean field (DeepLab's, Chen et al. 2015)."""
    gaussian: Floats = (3.0, 3.0)
    """Standard deviation in pixels and weight of the kernel on positions (AffinityNet, DeepLab)."""
    bilateral: Floats = (50.0, 8.0, 4.0)
    """Standard deviations in pixels and in steps of 0..255, and weight of the kernel on positions and colours. Measured
    on training images, embedded ones and photographs: the (80, 13, 10) of AffinityNet's and DeepLab's code, for surer
    scores, overrules CAMs."""


@dataclass
class PARConfig:
    """Pixel-adaptive refinement, as `pssl_ext.pixel_refine` takes it."""

    dilations: Integers = (1, 2, 4, 8, 12, 24)
    """Distances of the neighbours in pixels (AFA, Ru et al. 2022)."""
    iterations: int = 10
    """Iterations (AFA; ToCo too)."""
    colour_scale: float = 0.3
    """How alike colours must be (PAR's w1)."""
    position_weight: float = 0.01
    """Share of the term of positions (PAR's w2)."""


@dataclass
class AffinityConfig(OptimizerConfig):
    """AffinityNet (Ahn & Kwak 2018) on the frozen features of the CAM network, and its random walk."""

    checkpoint: Path | None = None
    """Affinities that another run of pssl.refine trained (its affinity.safetensors). None: train them on this
    split."""
    foreground_margin: float = 0.15
    """A pixel is surely of its class where it is so at the threshold plus this (IRN: 0.30 beside 0.15)."""
    background_margin: float = 0.1
    """A pixel is surely background where it is so at the threshold less this too (IRN: 0.05 beside 0.15)."""
    crf: bool = True
    """Both labellings go through the CRF first (AffinityNet, IRN)."""
    scale: float = 2.0
    """Scale of the images that features are taken from: the finer the grid, the finer the walk."""
    dim: int = 64
    """Channels of the affinity features (AffinityNet: 448, on a network of its own)."""
    radius: int = 5
    """Cells less than this apart are neighbours (AffinityNet)."""
    beta: float = 8.0
    """Exponent of the affinities in the walk (AffinityNet)."""
    log2_steps: int = 3
    """The walk takes 2^this steps. Measured on training images: 3 and 5 gain on embedded ones, 3 alone on photographs;
    AffinityNet's 8, with affinities of a network of their own, walks too far here."""
    epochs: int = 4
    """Epochs over the split (AffinityNet: 8)."""
    batch_size: int = 8
    """Images a step (AffinityNet)."""
    lr: float = 5e-3
    """Peak learning rate."""
    head_lr_factor: float = 1.0
    """All layers learn at one rate."""


@dataclass
class RefineSettings:
    """What is done to the CAMs."""

    method: str = "crf"
    """Steps in their order, joined by "+": "crf", "par", "affinity", "affinity+crf", ...; "none": the threshold
    alone."""
    threshold: float | None = None
    """Background score. None: the one whose labels are best on training images, see `threshold_images`; on another
    split than the CAM network's training split, the threshold that its CAMs were scored best at."""
    threshold_images: int = 64
    """So many training images are labelled at several thresholds to choose one by their masks. Measured on training
    images: the best is a good deal lower than that of the CAMs on embedded ones, a little higher on photographs. 0: the
    threshold that the CAMs were scored best at."""
    power: float | None = None
    """Background score (1 - max CAM)^power in place of a threshold (AffinityNet: 4 to 32)."""
    sharpness: float | None = None
    """CRF and PAR are given the softmax of this times the scores. None: SHARPNESS, by what the CAMs were read by."""
    unsure: float | None = None
    """Pixels whose best region has less than this share of the scores become 255. None: every pixel gets a region."""
    crf: CRFConfig = field(default_factory=CRFConfig)
    par: PARConfig = field(default_factory=PARConfig)
    affinity: AffinityConfig = field(default_factory=AffinityConfig)

    def __post_init__(self) -> None:
        steps = self.steps
        if any(step not in STEPS for step in steps) or len(set(steps)) != len(steps):
            expected = f"'none', or different names of {', '.join(STEPS)} joined by '+'"
            raise ValueError(f"method: expected {expected}, got {self.method!r}")
        if self.threshold is not None and self.power is not None:
            raise ValueError("power: expected none beside a threshold, got both")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected a value between 0 and 1, got {self.threshold}")
        if self.threshold_images < 0:
            raise ValueError(f"threshold_images: expected 0 or more, got {self.threshold_images}")
        if self.sharpness is not None and self.sharpness <= 0:
            raise ValueError(f"sharpness: expected a value above 0, got {self.sharpness}")
        if self.power is not None and self.power <= 0:
            raise ValueError(f"power: expected a value above 0, got {self.power}")

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps in their order."""
        return () if self.method == "none" else tuple(self.method.split("+"))


@dataclass
class SegmenterConfig(BackboneConfig):
    """DeepLab: backbone and head."""

    init: Path | None = None
    """A checkpoint of pssl.train whose backbone training starts from, in place of `weights`; not one of a frozen
    backbone."""
    frozen: bool = False
    """Keep the backbone fixed. Its activations are then computed once, for squares of side `size` at `frozen_scales`,
    mirrored too, and cached on disk: minutes on a CPU."""
    head: Literal["largefov", "v2", "v3plus"] = "largefov"
    """"largefov": DeepLab v1's; "v2": v2's added classifiers, which with ResNet-101 most WSSS papers report; "v3plus":
    v3+'s pyramid and decoder."""
    dim: int = 256
    """Channels of the head (v3+: 256; LargeFOV: 1024); v2's has none of its own."""
    rates: Integers = (6,)
    """Dilations of the head: one for largefov (DeepLab v1: 12 at stride 8; 6: a quarter of the embedded set's images at
    stride 4), one a classifier for v2 (6,12,18,24 at stride 8), one a branch for v3plus (6,12,18 at stride 16)."""
    dropout: float = 0.5
    """Share of the head's channels that training drops (DeepLab v1; v2's head drops none)."""


@dataclass
class SegmentScheduleConfig(OptimizerConfig):
    """Optimiser and length of the training."""

    epochs: int = 20
    """Epochs over the images with pseudo labels."""
    lr: float = 1e-3
    """Peak learning rate of the backbone."""
    head_lr_factor: float = 10.0
    """Learning rate of the head over that of the backbone (DeepLab)."""


@dataclass
class PredictConfig:
    """How a trained network labels an image."""

    scales: Floats = (0.75, 1.0, 1.25)
    """Scales whose probabilities are averaged."""
    flip: bool = True
    """Also read the mirrored image."""
    crf: bool = False
    """Refine the probabilities by the CRF (DeepLab v1 and v2 do, v3+ does not)."""


@dataclass
class SegmentSettings:
    """What is trained on the pseudo labels, and how it labels images."""

    recipe: str = "auto"
    """Defaults to start from: synthetic, photographs, voc12_resnet38d, voc12_resnet101 (files of pssl/recipes/segment),
    or "auto": the backbone's own; in pssl.pipeline that of the CAM network's backbone."""
    size: int | None = None
    """Side in pixels of the square that training shows. None: `data.size`."""
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    schedule: SegmentScheduleConfig = field(default_factory=SegmentScheduleConfig)
    zoom: Floats = (0.75, 1.5)
    """Training images are resized so that their long side is `size` times a random factor of this range, then cut or
    padded to `size` (DeepLab: 0.5 to 1.5 or 2 times the image's own size)."""
    frozen_scales: Floats = (0.5, 1.0, 1.5, 2.0)
    """Scales of which a step shows one, with a frozen backbone, in place of `zoom`. The default ones are in the cache
    where the CAM network had the same backbone, frozen, and `size`."""
    predict: PredictConfig = field(default_factory=PredictConfig)
    crf: CRFConfig = field(default_factory=CRFConfig)

    def recipe_for(self, backbone: str) -> str:
        """The file of the recipe to start from, below pssl/recipes and without its ending."""
        return f"segment/{RECIPE_OF_SEGMENTER[backbone] if self.recipe == 'auto' else self.recipe}"
