"""Networks as training starts from them: backbone weights loaded, the rest random by seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from pssl.config.model import BackboneConfig, ModelConfig, SegmenterConfig
from pssl.core import checkpoint
from pssl.core.errors import InputError
from pssl.core.seeding import derive_seed
from pssl.models.backbone_net import BackboneNet
from pssl.models.backbones import Backbone, build_backbone, find_backbone
from pssl.models.cam_net import CamNet
from pssl.models.deeplab import DeepLab
from pssl.models.weights import load_weights

N = TypeVar("N", bound=BackboneNet)
Say = Callable[[str], None]


def weights_path(config: BackboneConfig) -> Path | None:
    """Return the backbone's weights file; None for a backbone that starts from random weights."""
    if config.weights is not None:
        return config.weights
    package = find_backbone(config.backbone).weights
    return None if package is None else package.path()


def build_cam_net(config: ModelConfig, classes: int) -> CamNet:
    """Build the network that a configuration describes, with random weights.

    Activations of a frozen backbone are standardised.
    """
    return CamNet(
        build_backbone(config),
        classes,
        config.dim,
        logit_scale=config.logit_scale,
        standardise=config.frozen,
        frozen=config.frozen,
        fixed=config.fixed,
        dropout=config.dropout,
    )


def build_segmenter(config: SegmenterConfig, classes: int) -> DeepLab:
    """Build the network that a configuration describes, with random weights."""
    return DeepLab(
        build_backbone(config),
        classes + 1,
        head=config.head,
        dim=config.dim,
        rates=config.rates,
        dropout=config.dropout,
        fixed=config.fixed,
        frozen=config.frozen,
    )


def new_net(
    config: ModelConfig,
    classes: int,
    seed: int,
    say: Say | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> CamNet:
    """Build the network that training starts from; `say` takes a line that tells where its backbone's weights are from.

    They are those of a weights file, else random by `seed`, as all other weights are. Raises InputError for a frozen
    or fixed backbone of random weights.
    """
    return _new(build_cam_net, config, classes, derive_seed(seed, "weights"), say).to(
        memory_format=memory_format
    )


def new_segmenter(config: SegmenterConfig, classes: int, seed: int, say: Say | None = None) -> DeepLab:
    """Build the segmentation network that training starts from, as :func:`new_net` does.

    The weights of its backbone are those of a checkpoint of pssl.train where `init` names one.
    """
    net = _new(build_segmenter, config, classes, derive_seed(seed, "segment", "weights"), say)
    return net.to(memory_format=torch.channels_last)


def new_pixel_correlation(net: CamNet, seed: int) -> None:
    """Give `net` SEAM's module with weights drawn by `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pixel correlation"))
        net.add_pixel_correlation()


def _new(
    build: Callable[[BackboneConfig, int], N],
    config: BackboneConfig,
    classes: int,
    seed: int,
    say: Say | None,
) -> N:
    """Build a network with random weights by `seed`, and load those of its backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(config, classes)
    source = _load_backbone(net.backbone, config)
    if source is None and (net.frozen or net.fixed != "nothing"):
        kept = "frozen" if net.frozen else f"fixed={net.fixed}"
        raise InputError(
            f"model.{kept}: expected a backbone with weights, got random ones; give --model.weights"
        )
    if say is not None:
        say(f"backbone weights {source or 'random'}")
    return net


def _load_backbone(backbone: Backbone, config: BackboneConfig) -> str | None:
    """Load the weights that a configuration names, and return their source in words; None where it names none."""
    if isinstance(config, SegmenterConfig) and config.init is not None:
        _load_trained_backbone(backbone, config.backbone, config.init)
        return f"of {config.init}"
    path = weights_path(config)
    return None if path is None else str(load_weights(backbone, path))


def _load_trained_backbone(backbone: Backbone, name: str, path: Path) -> None:
    """Load the backbone of a checkpoint of pssl.train; InputError where it is another or was frozen."""
    tensors, description = checkpoint.load_weights(path)
    prefix = "net.backbone."
    held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    shapes, expected = (
        {key: value.shape for key, value in state.items()} for state in (held, backbone.state_dict())
    )
    if shapes != expected:
        raise InputError(
            f"{path}: expected the weights of a trained {name} backbone of this width, got those of "
            f"{description['model']['backbone']}, {len(held)} tensors"
        )
    backbone.load_state_dict(held)
