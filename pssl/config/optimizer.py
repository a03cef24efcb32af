"""Settings of the optimiser, and of how steps are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pssl.config.values import require


@dataclass
class OptimizerConfig:
    """The optimiser and the course of its learning rate."""

    batch_size: int = 16
    """Images a step, over all ranks together. Ranks may get one more or less than others."""
    drop_last: bool = True
    """Leave out an epoch's last images where they do not fill a batch (SEAM, IRN); the order differs every epoch."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """"adamw" (Loshchilov & Hutter 2019), measured on the embedded set; "sgd", as in AffinityNet, SEAM and IRN."""
    momentum: float = 0.0
    """Of SGD. 0: what the PolyOptimizer of AffinityNet, SEAM and IRN amounts to."""
    lr: float = 2e-3
    """Peak learning rate of the backbone (in stage 1 of pssl.train). Measured on the embedded set with AdamW; SEAM
    0.01, IRN 0.1."""
    head_lr_factor: float = 5.0
    """Learning rate of the last layers (and of SEAM's module) over that of the backbone: WSSS code commonly uses 10;
    measured 5."""
    bias_lr_factor: float = 1.0
    """Learning rate of biases over that of weights; biases have no weight decay. 2 in AffinityNet and SEAM, so that
    with the head's 10 the rates are x1, x2, x10 and x20."""
    weight_decay: float = 5e-4
    """Weight decay of what is no bias; 5e-4 in AffinityNet and SEAM, 1e-4 in IRN."""
    poly_power: float = 0.9
    """The learning rate falls as (1 - step/steps)^power (poly schedule of DeepLab; 0 keeps it constant)."""
    warmup: float = 0.05
    """Share of a stage's steps over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        require("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")


@dataclass
class ScheduleConfig(OptimizerConfig):
    """Optimiser and how long each stage runs."""

    classifier_epochs: int = 30
    """Epochs of stage 1, the classifier alone. Measured on the embedded set: from 17 to 30 its CAMs
    change by less than seeds differ, and what the arms add to them doubles."""
    arm_epochs: int = 4
    """Epochs of each arm after stage 1. Recipes measured 3 on the embedded set, 5 on photographs."""
    head_layers: Literal["cam", "new"] = "cam"
    """What `head_lr_factor` applies to. "cam": the CAM layer, measured on the embedded set; "new": all layers that are
    not the backbone's, as AffinityNet, SEAM and IRN do."""
    arm_lr_factor: float = 0.5
    """Learning rate of the arms over that of stage 1. Measured on the embedded set."""


@dataclass
class EngineConfig:
    """How steps are computed and what is kept of them; none of it belongs to the method."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the networks' passes (torch.autocast); losses and prototypes are always float32. "fp16" comes with
    loss scaling; "auto": bf16 on CUDA, fp32 elsewhere."""
    channels_last: bool = True
    """Keep convolutions in the memory order in which they are quickest on CPUs and on tensor cores."""
    accumulate: int = 1
    """Pass a batch in so many parts, one after the other, and step once: less memory. RCM and PPC see a part at a time,
    and batch norms that are not fixed count each part."""
    clip_norm: float | None = None
    """Largest norm of all gradients together; longer ones are shortened. None: no limit (AffinityNet, SEAM, IRN)."""
    compile: str | None = None
    """torch.compile backend for the backbone, such as "inductor" (torch's default). None: not compiled."""
    save_every: int | None = None
    """Keep the training state after every so many steps too. None: after every epoch only."""
    tensorboard: bool = False
    """Write the losses for TensorBoard, into OUT/tensorboard (the extra of that name). CSV is always written."""

    def __post_init__(self) -> None:
        require("accumulate", self.accumulate, self.accumulate >= 1, "1 or more")


@dataclass
class SegmentScheduleConfig(OptimizerConfig):
    """Optimiser and length of the training."""

    epochs: int = 20
    """Epochs over the images with pseudo labels."""
    lr: float = 1e-3
    """Peak learning rate of the backbone."""
    head_lr_factor: float = 10.0
    """Learning rate of the head over that of the backbone (DeepLab)."""
