"""Networks as training starts from them: backbone weights loaded, the rest random by seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pssl.config.model import BackboneConfig, ModelConfig, SegmenterConfig
from pssl.core import checkpoint
from pssl.core.seeding import derive_seed
from pssl.models.backbones import build_backbone
from pssl.models.cam_net import CamNet, build_cam_net
from pssl.models.deeplab import DeepLab
from pssl.models.weights import PACKAGES, find_weights, load_weights


def weights_path(config: BackboneConfig) -> Path | None:
    """The backbone's weights file, None for a backbone that starts from random weights."""
    if config.weights is not None:
        return config.weights
    return find_weights(config.backbone) if config.backbone in PACKAGES else None


def net_of(config: ModelConfig, classes: int) -> CamNet:
    """The network that a configuration describes, with random weights."""
    return build_cam_net(
        config.backbone,
        classes,
        dim=config.dim,
        width=config.width,
        logit_scale=config.logit_scale,
        frozen=config.frozen,
        timm=config.timm,
        output_stride=config.output_stride,
        fixed=config.fixed,
        dropout=config.dropout,
    )


def new_net(
    config: ModelConfig,
    classes: int,
    seed: int,
    say: Callable[[str], None] | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> CamNet:
    """A network as training starts from: backbone weights loaded, the rest random by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        net = net_of(config, classes)
    path = weights_path(config)
    if path is not None:
        report = load_weights(net.backbone, path)
        if say is not None:
            say(f"backbone weights {report}")
    elif config.frozen or config.fixed != "nothing":
        what = "frozen" if config.frozen else f"fixed={config.fixed}"
        raise ValueError(
            f"model.{what}: expected a backbone with weights, got random ones; give --model.weights"
        )
    return net.to(memory_format=memory_format)


def new_pixel_correlation(net: CamNet, seed: int) -> None:
    """Give `net` SEAM's module with weights drawn by `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pixel correlation"))
        net.add_pixel_correlation()


def build_segmenter(config: SegmenterConfig, classes: int) -> DeepLab:
    """The network that a configuration describes, with random weights."""
    backbone = build_backbone(
        config.backbone, config.width, timm=config.timm, output_stride=config.output_stride
    )
    return DeepLab(
        backbone,
        classes + 1,
        head=config.head,
        dim=config.dim,
        rates=config.rates,
        dropout=config.dropout,
        fixed=config.fixed,
        frozen=config.frozen,
    )


def new_segmenter(config: SegmenterConfig, classes: int, seed: int) -> tuple[DeepLab, str]:
    """A network as training starts from, and a line that says where its backbone's weights are from.

    They are those of a checkpoint of pssl.train (`init`), else of a weights file, else random by `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "segment", "weights"))
        net = build_segmenter(config, classes)
    path, told = weights_path(config), "backbone weights random"
    if config.frozen and path is None and config.init is None:
        raise ValueError(
            "model.frozen: expected a backbone with weights, got random ones; give --model.weights"
        )
    if config.init is not None:
        tensors, description = checkpoint.load_weights(config.init)
        prefix = "net.backbone."
        own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        shapes = [
            {name: value.shape for name, value in state.items()} for state in (own, net.backbone.state_dict())
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{config.init}: expected the weights of a trained {config.backbone} backbone of this width, got "
                f"those of {description['model']['backbone']}, {len(own)} tensors"
            )
        net.backbone.load_state_dict(own)
        told = f"backbone weights of {config.init}"
    elif path is not None:
        told = f"backbone weights {load_weights(net.backbone, path)}"
    return net.to(memory_format=torch.channels_last), told
