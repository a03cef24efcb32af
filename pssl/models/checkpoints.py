"""Trained networks as files, with what is needed to use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pssl.config.mapping import from_dict, to_dict
from pssl.config.model import ModelConfig, SegmenterConfig
from pssl.core import checkpoint
from pssl.core.errors import InputError
from pssl.models.build import build_cam_net, build_segmenter, weights_path
from pssl.models.cam_net import CamNet
from pssl.models.deeplab import DeepLab
from pssl.models.prototypes import Prototypes
from pssl.models.weights import file_digest, load_weights


@dataclass(frozen=True)
class TrainedNet:
    """A network from a checkpoint, with what is needed to use it."""

    net: CamNet
    prototypes: Prototypes
    model: ModelConfig
    classes: tuple[str, ...]
    size: int
    loading: Literal["memory", "files"]
    """How training read its images (`DataConfig.loading`)."""
    description: dict


def save_net(
    path: Path,
    net: CamNet,
    prototypes: Prototypes,
    model: ModelConfig,
    classes: Sequence[str],
    size: int,
    **more,
) -> None:
    """Write a network, its prototypes and its description; a frozen backbone is named by digest, not copied."""
    source = weights_path(model)
    description = {
        "model": {**to_dict(model), "weights": None if model.weights is None else str(model.weights)},
        "backbone_digest": file_digest(source) if net.frozen else None,
        "classes": list(classes),
        "size": size,
        "temperature": prototypes.temperature,
        "pixel_correlation": net.pixel_correlation is not None,
        **more,
    }
    tensors = {f"net.{name}": value for name, value in net.trained_state().items()}
    tensors |= {"prototypes.rows": prototypes.rows, "prototypes.valid": prototypes.valid}
    checkpoint.save_weights(path, tensors, description)


def load_net(path: Path, device: torch.device | str = "cpu") -> TrainedNet:
    """Load the network of :func:`save_net`, in eval mode."""
    tensors, description = checkpoint.load_weights(path)
    model = from_dict(ModelConfig, description["model"], str(path))
    net = build_cam_net(model, len(description["classes"]))
    if description.get("pixel_correlation"):
        net.add_pixel_correlation()
    if model.frozen:
        source = weights_path(model)
        if file_digest(source) != description["backbone_digest"]:
            raise InputError(
                f"{path}: expected backbone weights with sha256 {description['backbone_digest'][:12]}, "
                f"got {file_digest(source)[:12]} from {source}"
            )
        load_weights(net.backbone, source)
    net.load_trained_state({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
    rows = Prototypes(
        tensors["prototypes.rows"].to(device),
        tensors["prototypes.valid"].to(device),
        description["temperature"],
    )
    return TrainedNet(
        net.eval().to(device, memory_format=torch.channels_last),
        rows,
        model,
        tuple(description["classes"]),
        description["size"],
        description.get("loading", "memory"),
        description,
    )


def save_segmenter(path: Path, net: DeepLab, config: SegmenterConfig, classes: Sequence[str], **more) -> None:
    """Write a network and its description."""
    description = {"segmenter": to_dict(config), "classes": list(classes), **more}
    checkpoint.save_weights(path, net.state_dict(), description)


def load_segmenter(path: Path, classes: Sequence[str]) -> DeepLab:
    """Load the network of :func:`save_segmenter`, in eval mode; InputError where it knows other classes."""
    tensors, description = checkpoint.load_weights(path)
    if description.get("classes") != list(classes) or "segmenter" not in description:
        raise InputError(f"{path}: expected a segmentation network of {tuple(classes)}, got {description}")
    net = build_segmenter(from_dict(SegmenterConfig, description["segmenter"], str(path)), len(classes))
    net.load_state_dict(tensors)
    return net.eval().to(memory_format=torch.channels_last)
