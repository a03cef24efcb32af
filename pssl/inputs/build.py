"""The inputs of a network, as its configuration asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pssl.config.data import DataConfig
from pssl.config.model import ModelConfig
from pssl.core.errors import InputError
from pssl.core.log import Log
from pssl.data.open import DataFolder
from pssl.inputs.activations import frozen_activations
from pssl.inputs.images import ActivationInputs, FileInputs, ImageInputs, Inputs, load_square_images
from pssl.models.build import weights_path
from pssl.models.cam_net import CamNet


def build_inputs(
    folder: DataFolder,
    ids: Sequence[str],
    net: CamNet,
    data: DataConfig,
    model: ModelConfig,
    scales: Sequence[float],
    log: Log,
    memory_format: torch.memory_format = torch.channels_last,
) -> Inputs:
    """Inputs of these images for `net`: activations (computed or found in the cache) if its backbone is frozen."""
    labels = torch.from_numpy(folder.image_labels(ids)).float()
    device = next(net.parameters()).device
    normalise, more = net.backbone.normalise, {"colours": data.colour_jitter, "memory_format": memory_format}
    if data.loading == "files":
        if net.frozen:
            raise InputError(
                "data.loading: expected 'memory' with model.frozen, whose activations are cached for squares, "
                "got 'files'"
            )
        return FileInputs(
            folder, ids, labels, normalise, data.splits.size, data.zoom, device, workers=data.workers, **more
        )
    images = load_square_images(folder, ids, data.splits.size)
    if not net.frozen:
        return ImageInputs(ids, images, labels, normalise, data.zoom, device, **more)
    activations = frozen_activations(images, net.backbone, model.backbone, weights_path(model), scales, log)
    return ActivationInputs(ids, images, activations, labels, device)
