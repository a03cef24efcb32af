"""What the network is fed: images, or a frozen backbone's activations, at the scales a step asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pssl.data.voc import VOCFolder
from pssl.engine.feature_cache import ActivationSet, resized


class Inputs(Protocol):
    """The images of one split as inputs of a CamNet. `ids` in the order of the split; `labels` float32 [N,K]."""

    ids: Sequence[str]
    labels: Tensor

    def training(self, indices: Sequence[int], draws: Tensor, scales: Sequence[float]) -> dict[float, Tensor]:
        """Inputs of these images, changed at random and alike at every scale; `draws` [B,4] in 0..1 decide how."""

    def plain(self, indices: Sequence[int], scale: float, flip: bool) -> Tensor:
        """Inputs of these images as they are, or mirrored."""


def load_square_images(folder: VOCFolder, ids: Sequence[str], size: int) -> Tensor:
    """Images resized (bilinear with antialiasing) to size x size, uint8 [N,3,size,size]."""
    images = torch.empty(len(ids), 3, size, size, dtype=torch.uint8)
    for index, image_id in enumerate(ids):
        pixels = folder.image(image_id)
        if pixels.shape[:2] != (size, size):
            pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
        images[index] = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return images


class ImageInputs:
    """Inputs of a backbone that is trained: images, flipped and cropped at random in training.

    Args:
        ids: image ids.
        images: uint8 [N,3,S,S].
        labels: float32 [N,K].
        normalise: the backbone's.
        crop_scale: least share of the area that a random crop keeps; 1 for none.
        device: where inputs go.
    """

    def __init__(self, ids, images: Tensor, labels: Tensor, normalise, crop_scale: float, device) -> None:
        self.ids = ids
        self.images = images
        self.labels = labels
        self.normalise = normalise
        self.crop_scale = crop_scale
        self.device = device

    def training(self, indices: Sequence[int], draws: Tensor, scales: Sequence[float]) -> dict[float, Tensor]:
        batch = self.normalise(self.images[list(indices)].to(self.device))
        batch = random_crop_and_flip(batch, self.crop_scale, draws)
        return {scale: resized(batch, scale) for scale in scales}

    def plain(self, indices: Sequence[int], scale: float, flip: bool) -> Tensor:
        batch = resized(self.normalise(self.images[list(indices)].to(self.device)), scale)
        return batch.flip(3) if flip else batch


class ActivationInputs:
    """Inputs of a frozen backbone's head: cached activations, of the mirrored image half the time in training."""

    def __init__(self, ids, activations: ActivationSet, labels: Tensor, device) -> None:
        self.ids = ids
        self.activations = activations
        self.labels = labels
        self.device = device

    def training(self, indices: Sequence[int], draws: Tensor, scales: Sequence[float]) -> dict[float, Tensor]:
        flips = (draws[:, 3] < 0.5).long().tolist()
        return {scale: self.activations.rows(indices, flips, scale).to(self.device) for scale in scales}

    def plain(self, indices: Sequence[int], scale: float, flip: bool) -> Tensor:
        return self.activations.rows(indices, [int(flip)] * len(indices), scale).to(self.device)

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [channels] of the activations at scale 1, both flips, in float64 sums."""
        array = self.activations.scales[1.0]
        total = np.zeros((2, array.shape[2]))
        for index in range(array.shape[1]):
            rows = array[:, index].astype(np.float64)
            total += rows.sum((0, 2, 3)), np.square(rows).sum((0, 2, 3))
        mean, square = total / (array.size / array.shape[2])
        std = np.sqrt(np.maximum(square - mean**2, 1e-12))
        return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def random_crop_and_flip(
    images: Tensor,  # float [B,3,S,S]
    crop_scale: float,
    draws: Tensor,  # [B,4] in 0..1: size, top, left, mirrored
) -> Tensor:
    """Each image mirrored with probability 1/2 and cut to a random square of `crop_scale`..1 of its area, resized back.

    Returns [B,3,S,S].
    """
    side = images.shape[-1]
    sides = (torch.sqrt(crop_scale + (1 - crop_scale) * draws[:, 0]) * side).round().long().tolist()
    out = torch.empty_like(images)
    for index, cut in enumerate(sides):
        top = int(draws[index, 1] * (side - cut + 1))
        left = int(draws[index, 2] * (side - cut + 1))
        piece = images[index : index + 1, :, top : top + cut, left : left + cut]
        out[index] = resized(piece, side / cut)[0]
    flip = (draws[:, 3] < 0.5).to(images.device)
    return torch.where(flip[:, None, None, None], out.flip(3), out)
