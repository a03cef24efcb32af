"""Settings of the steps from CAMs to pseudo labels, with what their defaults come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pssl.config.optimizer import OptimizerConfig
from pssl.config.values import Floats, Integers
from pssl.core.errors import InputError

STEPS = ("crf", "par", "affinity")

SHARPNESS = {"cam": 4.0, "prototype": 8.0}
"""`sharpness` by readout, the second of which varies less around its threshold. Measured on training images, embedded
ones and photographs, of 3 to 12."""


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
            raise InputError(f"method: expected {expected}, got {self.method!r}")
        if self.threshold is not None and self.power is not None:
            raise InputError("power: expected none beside a threshold, got both")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise InputError(f"threshold: expected a value between 0 and 1, got {self.threshold}")
        if self.threshold_images < 0:
            raise InputError(f"threshold_images: expected 0 or more, got {self.threshold_images}")
        if self.sharpness is not None and self.sharpness <= 0:
            raise InputError(f"sharpness: expected a value above 0, got {self.sharpness}")
        if self.power is not None and self.power <= 0:
            raise InputError(f"power: expected a value above 0, got {self.power}")

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps in their order."""
        return () if self.method == "none" else tuple(self.method.split("+"))
